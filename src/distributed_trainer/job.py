# SPDX-License-Identifier: Apache-2.0
"""This process's place in the job: the engine, started once, and the job's orderly or disorderly end."""

from __future__ import annotations

import atexit
import ctypes
import functools
import itertools
import logging
import math
import os
import sys
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any
from urllib.parse import parse_qs, urlsplit

import torch
import torch.distributed as dist
from torch._C._dynamo import eval_frame

from . import devices, host_facts, launch, library, mpi_environment, mpirun, places, record, versions
from .backend import ProcessGroupShmpi, gather_objects
from .errors import LaunchError, MismatchError, RankLostError
from .inner import ProcessGroupShmpiWithInner
from .store import MPIStore
from .work import Work

logger = logging.getLogger("distributed_trainer")


@dataclass(frozen=True)
class Job:
    """What one communicator's ranks share. `start` makes it."""

    engine: Any
    """The engine's `Engine`."""
    module: Any
    """The engine's module, for the MPI in use."""
    node_of_rank: list[int]
    """Number of each rank's machine."""
    device: torch.device
    """Of this rank."""
    summary: str
    """What was found, in one line."""
    obstacle_to_elastic: str | None = None
    """Why the others cannot go on all the same when a rank is killed."""
    is_replacement: bool = False
    """Started by a rank in the place of a killed one, and not admitted yet."""
    _group_numbers: Iterator[int] = field(default_factory=itertools.count)
    _groups: weakref.WeakSet[ProcessGroupShmpi] = field(default_factory=weakref.WeakSet)

    @property
    def rank(self) -> int:
        """This process's number in the job."""
        return self.engine.rank

    @property
    def local_ranks(self) -> list[int]:
        """Ranks on this rank's machine, ascending."""
        own = self.node_of_rank[self.rank]
        return [rank for rank, node in enumerate(self.node_of_rank) if node == own]

    @property
    def local_rank(self) -> int:
        """This process's number on its machine."""
        return self.local_ranks.index(self.rank)

    @functools.cached_property
    def store(self) -> MPIStore:
        """A store of all ranks. The first access is collective and blocks."""
        return MPIStore(self.engine.create_mailbox())

    def create_group(
        self,
        ranks: Sequence[int] | None = None,
        wire_dtype: str | None = None,
        timeout: timedelta = dist.default_pg_timeout,
        for_torch: bool = False,
    ) -> ProcessGroupShmpi:
        """Makes a process group with an order of calls of its own. Collective over `ranks` (None: all), blocks.

        CUDA tensors go to NCCL where torch has it. (Written with care, but not run: no GPU was at hand.)

        Args:
            ranks: In the order of the group.
            wire_dtype: "bfloat16" or "float16": type in which all_reduce sends sums of float32 between machines.
            timeout: How long a wait for an operation of the group lasts.
            for_torch: Callbacks of futures may call collectives, as torch's communication hooks do.
        """
        members = list(range(self.engine.size) if ranks is None else ranks)
        options = {
            "wire_dtype": None if wire_dtype is None else getattr(self.module.WireDtype, wire_dtype),
            "timeout": timeout,
            "create_group": lambda some, limit: self.create_group(some, wire_dtype, limit, for_torch),
            "callback_group": self.engine.create_group(members) if for_torch else None,
        }
        group = self.engine.create_group(members)
        inner_device = "cuda" if self.device.type == "cuda" and dist.is_nccl_available() else None
        if inner_device is not None:
            store = dist.PrefixStore(f"inner/{next(self._group_numbers)}/{ranks}", self.store)
            make_inner = functools.partial(_make_nccl, store, group.rank, group.size)
            made = ProcessGroupShmpiWithInner(group, self.module.ReduceOp, inner_device, make_inner, **options)
        else:
            made = ProcessGroupShmpi(group, self.module.ReduceOp, **options)
        self._groups.add(made)
        return made


_jobs: list[Job] = []  # the first initialised MPI, unless the script did
_job_of_world: Job | None = None


def start(num_gpus: int | None, comm: Any) -> Job:
    """Makes this process a rank: starts MPI, the engine and the exit handling, or returns what it started before.

    Collective over the ranks of `comm`, blocks. May not return: without a launcher and with `num_gpus` above 1 the
    process becomes mpirun.

    Args:
        num_gpus: Devices per machine, None for what the launcher started.
        comm: An mpi4py communicator, or None for all ranks of the launch.

    Raises:
        MPINotFoundError: No MPI library, or none that fits.
        LaunchError: The processes were not started as one MPI job, or not as the script asks.
        MismatchError: Machines run different versions. The same on every rank.
    """
    global _job_of_world
    if launch.in_data_worker():
        raise LaunchError(
            "create_distributed_trainer was called in a DataLoader worker or another forked child of a rank, which "
            "can't use MPI. Create the trainer in the main process, outside of what the workers import or run."
        )
    devices.resolve_num_gpus(num_gpus, None, 0)  # refuses what is no number of devices, in a later call too
    if comm is None and _job_of_world is not None:
        return _job_of_world
    launcher = launch.find_launcher(os.environ)
    mpi_was_loaded = library.loaded_mpi() is not None
    try:
        module = library.load_engine()
    except Exception as error:
        launch.raise_once(error, launcher)
    mpi = library.loaded_mpi()
    assert mpi is not None
    num_ranks, _ = devices.resolve_num_gpus(num_gpus, launcher and launcher.local_size, 0)
    if launcher is None and comm is None and num_ranks > 1 and not (mpi_was_loaded and _is_initialized()):
        devices.resolve_num_gpus(num_gpus, None, torch.accelerator.device_count())
        launch.restart_under_mpirun(num_ranks, mpi)

    mpirun.skip_network_search()
    mpi_environment.prepare(os.environ, launcher, mpi)
    devices.keep_freed_memory(os.environ)
    introductions, initialized_mpi = module.introduce(_address_of(comm), versions.introduce(module))
    world_rank, world_size = module.world_rank_and_size()
    launch.check_world_size(launcher, world_size, mpi)
    try:
        versions.check_alike(introductions)
    except MismatchError as error:
        launch.raise_once(error, launcher)
    ranks_per_node = int(os.environ.get("DTRAIN_RANKS_PER_NODE", "0"))
    obstacle = None
    if not module.survives_deaths():
        obstacle = "it needs Open MPI 5, started with `--with-ft ulfm`"
    elif comm is not None:
        obstacle = "the trainer's ranks are those of a communicator of the script's"
    survives_deaths = wants_elastic() and obstacle is None
    limit = host_facts.cpu_limit()
    cpu_limit = limit and math.ceil(limit[1])
    options = {"initialized_mpi": initialized_mpi, "cpu_limit": cpu_limit, "survives_deaths": survives_deaths}
    engine = module.Engine(_address_of(comm), ranks_per_node, **options)
    places.watch(engine)
    if not _jobs:
        record.note(record.STARTED)
        launch.mark_rank()
        atexit.register(_close_all, os.getpid())
        launch.install_excepthook(module.abort, world_rank, world_size)
        if launcher_process := launch.find_launcher_process(launcher):
            module.end_with_launcher(launcher_process)

    nodes = engine.node_of_rank
    local_ranks = [rank for rank, node in enumerate(nodes) if node == nodes[engine.rank]]
    local_rank = local_ranks.index(engine.rank)
    first_group = ProcessGroupShmpi(engine.create_group(list(range(engine.size))), module.ReduceOp)
    visible, limits = zip(*gather_objects(first_group, (devices.visible_devices(), limit)), strict=True)
    cores = [set(engine.cores_of(rank)) for rank in local_ranks]
    local_limits = [limits[rank] for rank in local_ranks]
    threads = devices.fit_threads(cores, local_rank, os.environ, launch.cpus_of_launcher(launcher), local_limits)
    threads_of_ranks, warnings = zip(*gather_objects(first_group, (threads.text, threads.warning)), strict=True)
    local_visible = [visible[rank] for rank in local_ranks]
    num_visible = len({name for names in local_visible for name in names})
    _, notice = devices.resolve_num_gpus(num_gpus, len(local_ranks) if launcher else None, num_visible)
    accelerator = torch.accelerator.current_accelerator()
    device = devices.pick_device(local_visible, local_rank, accelerator.type if accelerator else "cpu")
    if threads.number is not None and engine.size > 1:
        torch.set_num_threads(threads.number)
    elif threads.number is not None and limit is not None:  # of which torch does not know
        torch.set_num_threads(min(torch.get_num_threads(), math.ceil(limit[1])))
    if engine.rank == 0:
        badly_bound = list(filter(None, (warnings[nodes.index(node)] for node in range(max(nodes) + 1))))
        if len(badly_bound) > 1:
            badly_bound = [f"{badly_bound[0]} (and so on {len(badly_bound) - 1} more)"]
        for line in filter(None, [notice, *badly_bound]):
            logger.warning(line)
    summary = _summary(module, nodes, device, threads_of_ranks)
    job = Job(engine, module, nodes, device, summary, obstacle, module.is_replacement())
    _jobs.append(job)
    if comm is None:
        _job_of_world = job
    return job


def wants_elastic() -> bool:
    """Whether it was started with `run --elastic`. Local."""
    return os.environ.get("DTRAIN_ELASTIC") == "1"


def recover(job: Job) -> Job:
    """The job of the ranks that live, when others of an elastic one were killed. Collective over them, blocks.

    Raises:
        RankLostError: Some of them have come to their end already.
    """
    engine = job.engine.recover()
    if engine is None:
        raise RankLostError("a rank was killed, and others have come to the end of their script already")
    return _go_on(job, engine)


def admit(job: Job) -> Job:
    """The job of its ranks and a replacement that is ready, the last of them. Collective over all, blocks."""
    return _go_on(job, job.engine.admit())


def join(job: Job) -> Job | None:
    """In a replacement: the job that it is admitted to; None if it is not needed any more. Blocks.

    Raises:
        DistributedTrainerError: The rank that has started it is gone.
    """
    engine = job.engine.join()
    if engine is None:
        return None
    launch.install_excepthook(job.module.abort, engine.rank, engine.size)
    return _go_on(job, engine)


def _go_on(job: Job, engine: Any) -> Job:
    global _job_of_world
    places.watch(engine, instead_of=job.engine)
    recovered = Job(engine, job.module, engine.node_of_rank, job.device, job.summary)
    _jobs[_jobs.index(job)] = recovered
    if _job_of_world is job:
        _job_of_world = recovered
    return recovered


def _make_nccl(store: dist.Store, rank: int, size: int) -> Any:
    return dist.ProcessGroupNCCL(store, rank, size, dist.ProcessGroupNCCL.Options())


def _create_backend(options: Any, _backend_options: Any) -> ProcessGroupShmpi:
    """Makes a group for torch.distributed's init_process_group and new_group."""
    # torch does not tell a backend of the others, and would let this one, a Python class, replace them unsaid.
    config = sys._getframe(1).f_locals.get("backend_config")
    if config is not None and set(config.get_device_backend_map().values()) != {"shmpi"}:
        raise ValueError(
            f'the backend "{config}" mixes shmpi with others. Pass backend="shmpi": it serves the CPU, and hands the '
            f"tensors of GPUs to NCCL where torch has it."
        )
    job = start(None, None)
    if not options.global_ranks_in_group:
        _check_place(job, options.group_rank, options.group_size)
    return job.create_group(options.global_ranks_in_group or None, timeout=options.timeout, for_torch=True)


def _check_place(job: Job, rank: int, world_size: int) -> None:
    if (rank, world_size) != (job.rank, job.engine.size):
        raise LaunchError(
            f"init_process_group was given rank {rank} of {world_size}, but MPI says rank {job.rank} of "
            f"{job.engine.size}. Leave both away: MPI knows them."
        )


def _rendezvous(url: str, **_options: Any) -> Iterator[tuple[dist.Store, int, int]]:
    """`init_method="mpi://"`: MPI knows rank, size and how to reach the others."""
    job = start(None, None)
    given = parse_qs(urlsplit(url).query)
    _check_place(job, int(given.get("rank", [job.rank])[0]), int(given.get("world_size", [job.engine.size])[0]))
    yield job.store, job.rank, job.engine.size


def register() -> None:
    """Makes `shmpi` a backend, and `mpi://` an init_method, of torch.distributed. Local; starts nothing.

    `mpi://` also takes the place of the default `env://` in a process that an MPI launcher has started and for which
    RANK is not set: there torch could only fail.
    """
    dist.Backend.register_backend("shmpi", _create_backend, extended_api=True, devices=["cpu", "cuda"])
    dist.register_rendezvous_handler("mpi", _rendezvous)
    handlers = sys.modules["torch.distributed.rendezvous"]._rendezvous_handlers  # the name is a function too
    from_environment = handlers["env"]

    def env_or_mpi(url: str, **options: Any) -> Iterator[tuple[dist.Store, int, int]]:
        is_by_mpi = "RANK" not in os.environ and launch.find_launcher(os.environ) is not None
        return (_rendezvous if is_by_mpi else from_environment)(url, **options)

    handlers["env"] = env_or_mpi
    _hide_from_dynamo(ProcessGroupShmpi, ProcessGroupShmpiWithInner, Work)


def _hide_from_dynamo(*classes: type) -> None:
    """Has torch.compile leave functions of classes, and what these call, as they are.

    It would try each that runs while a compiled model does, called from DistributedDataParallel's C++, and can't.
    `torch.compiler.disable` says the same, but imports the compiler, which takes a second.
    """
    strategy = eval_frame._FrameExecStrategy(eval_frame._FrameAction.SKIP, eval_frame._FrameAction.SKIP)
    for function in (value for one in classes for value in vars(one).values()):
        if (code := getattr(function, "__code__", None)) is not None:
            eval_frame.set_code_exec_strategy(code, strategy)


def _summary(module: Any, nodes: list[int], device: torch.device, threads_of_ranks: Sequence[str]) -> str:
    def count(number: int, what: str) -> str:
        return f"{number} {what}{'s' if number > 1 else ''}"

    size, num_nodes = len(nodes), max(nodes) + 1
    threads = list(dict.fromkeys(threads_of_ranks))  # machines may differ
    threads[2:] = ["others"] if len(threads) > 2 else []
    facts = [
        " ".join(module.library_version().split(",")[0].split()),
        f"{count(size, 'rank')} on {count(num_nodes, 'machine')}",
        "CPU (no GPU found)" if device.type == "cpu" else f"one {device.type} device per rank",
        " or ".join(threads) if size > 1 else f"{count(torch.get_num_threads(), 'thread')}",
    ]
    if size > 1:
        facts.append("over shared memory" if num_nodes == 1 else "over shared memory and, between machines, MPI")
    return ", ".join(facts)


def _address_of(comm: Any) -> int:
    if comm is None:
        return 0
    try:
        from mpi4py import MPI
    except ImportError:
        MPI = None
    if MPI is None or not isinstance(comm, MPI.Comm):
        raise TypeError(f"comm must be an mpi4py communicator (mpi4py.MPI.Comm), not {type(comm).__name__}")
    return MPI._addressof(comm)


def _is_initialized() -> bool:
    flag = ctypes.c_int(0)
    ctypes.CDLL(None).MPI_Initialized(ctypes.byref(flag))
    return bool(flag.value)


def leave_groups(kept: list[Any]) -> None:
    """Takes part in no group any more, but in those that are kept. Local; others that wait for this rank are told."""
    for job in _jobs:
        for group in list(job._groups):
            if not any(group is one for one in kept):
                group.close()


def _close_all(pid: int) -> None:
    if os.getpid() == pid:
        for job in reversed(_jobs):
            job.engine.close()
        # MPI has let this rank go, so all ranks have come to their end. (Of an elastic job rank 0 may die just here.)
        if _jobs[0].rank == 0 or wants_elastic():
            record.note(record.COMPLETED)
