# SPDX-License-Identifier: Apache-2.0
"""This process's place in the job: MPI and the engine, started once, and their end."""

from __future__ import annotations

import atexit
import ctypes
import functools
import importlib
import itertools
import math
import os
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from ..errors import LaunchError, MismatchError, RankLostError
from ..launch import (
    call_sites,
    devices,
    hooks_for_tests,
    host_facts,
    job_record,
    mpi_environment,
    mpi_library,
    mpirun,
    separate_models,
    stall_limits,
)
from ..launch.failure import install_excepthook, raise_once
from ..launch.launcher import Launcher, find_launcher, find_launcher_process, in_data_worker, mark_rank
from ..launch.mpi_library import MPILibrary
from ..launch.relaunch import check_world_size, restart_under_mpirun
from . import version_check
from .accelerator_group import ProcessGroupShmpiWithAccelerator
from .placement import place, summarize, warn_of_num_gpus
from .process_group import ProcessGroupShmpi
from .store import MPIStore

if TYPE_CHECKING:
    from .._engine import Engine


@dataclass(frozen=True)
class Job:
    """State that one communicator's ranks share. `start` makes it."""

    engine: Engine
    """The communication engine of this rank."""
    module: Any
    """The engine's module, for the MPI in use."""
    node_of_rank: list[int]
    """Number of each rank's machine."""
    device: torch.device
    """This rank's device."""
    summary: str
    """Line that says what was found: MPI, ranks, machines, devices and threads."""
    obstacle_to_elastic: str | None = None
    """Reason why the other ranks cannot continue when a rank is killed; None if they can."""
    is_replacement: bool = False
    """Whether a rank has started this process to replace a killed one, and the job has not yet admitted it."""
    recoveries: weakref.WeakSet[Any] = field(default_factory=weakref.WeakSet)
    """Objects by which trainers over these ranks survive deaths (`trainer.recovery.ElasticRecovery`)."""
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
        """Store of all ranks. The first access is collective and blocks."""
        return MPIStore(self.engine.create_mailbox())

    def create_group(
        self,
        ranks: Sequence[int] | None = None,
        wire_dtype: str | None = None,
        timeout: timedelta = dist.default_pg_timeout,
        for_torch: bool = False,
    ) -> ProcessGroupShmpi:
        """Make a process group, which has its own order of collectives. Collective over `ranks` (None: all), blocks.

        CUDA tensors go to NCCL where torch has it. (This was never run: no GPU was available.)

        Args:
            ranks: Ranks of the job, in the order that they get in the group.
            wire_dtype: "bfloat16" or "float16": type in which all_reduce sends sums of float32 between machines.
            timeout: How long a wait for an operation of the group lasts.
            for_torch: Whether callbacks of futures may call collectives, as torch's communication hooks do.
        """
        members = list(range(self.engine.size) if ranks is None else ranks)
        options: dict[str, Any] = {
            "wire_dtype": None if wire_dtype is None else getattr(self.module.WireDtype, wire_dtype),
            "timeout": timeout,
            "create_group": lambda some, limit: self.create_group(some, wire_dtype, limit, for_torch),
            "callback_group": self.engine.create_group(members) if for_torch else None,
        }
        group = self.engine.create_group(members)
        accelerator = "cuda" if self.device.type == "cuda" and dist.is_nccl_available() else None
        if accelerator is not None:
            store = PrefixStore(f"accelerator/{next(self._group_numbers)}/{ranks}", self.store)
            make_group = functools.partial(_make_nccl, store, group.rank, group.size)
            made: ProcessGroupShmpi = ProcessGroupShmpiWithAccelerator(
                group, self.module.ReduceOp, accelerator, make_group, **options
            )
        else:
            made = ProcessGroupShmpi(group, self.module.ReduceOp, **options)
        self._groups.add(made)
        return made

    def leave_groups(self, kept: Sequence[Any]) -> None:
        """Close this rank's groups, except those kept. Local; other ranks that wait for this one get an error.

        Args:
            kept: Groups to keep open.
        """
        for group in list(self._groups):
            if not any(group is one for one in kept):
                group.close()


_jobs: list[Job] = []  # the first one initialized MPI, unless the script did
_job_of_world: Job | None = None


def start(num_gpus: int | None, comm: Any, trains: bool = False) -> Job:
    """Make this process a rank: start MPI, the engine and the exit handling, or return the job started before.

    Collective over the ranks of `comm`, blocks. May not return: without a launcher and with `num_gpus` above 1 the
    process becomes mpirun.

    Args:
        num_gpus: Devices per machine, None for as many as the launcher started ranks.
        comm: An mpi4py communicator, or None for all ranks of the launch.
        trains: Whether the script is about to make an optimizer.

    Raises:
        ValueError: A limit on waits in the environment is no number of seconds above 0.
        MPINotFoundError: There is no MPI library, or none that fits.
        LaunchError: The processes were not started as one MPI job, or not as the script asks.
        MismatchError: Machines run different versions. The same on every rank.
    """
    global _job_of_world
    separate_models.note_connection()
    if in_data_worker():
        raise LaunchError(
            "create_distributed_trainer was called in a DataLoader worker or another forked child of a rank, which "
            "can't use MPI. Create the trainer in the main process, outside of what the workers import or run."
        )
    limits = stall_limits.read_stall_limits(os.environ)
    devices.resolve_num_gpus(num_gpus, None, 0)  # refuses a wrong num_gpus, in a later call too
    if comm is None and _job_of_world is not None:
        if _job_of_world.rank == 0:
            warn_of_num_gpus(num_gpus, _job_of_world.node_of_rank, find_launcher(os.environ) is not None)
        return _job_of_world
    launcher = find_launcher(os.environ)
    module, mpi = _load_engine(num_gpus, comm, launcher)
    if trains:
        # The first optimizer imports it, which takes a second or more. Here no rank waits for another under the stall
        # monitor yet, which would report the import.
        importlib.import_module("torch._dynamo")
    has_initialized, world_rank, world_size = _initialize(module, mpi, comm, launcher)
    limit = host_facts.cpu_limit()
    obstacle = _obstacle_to_elastic(module, comm)
    engine = module.Engine(
        _address_of(comm),
        hooks_for_tests.ranks_per_node(os.environ),
        initialized_mpi=has_initialized,
        cpu_limit=limit and math.ceil(limit[1]),
        survives_deaths=wants_elastic() and obstacle is None,
    )
    engine.set_limits(*limits)
    call_sites.add_engine(engine)
    if not _jobs:
        _prepare_end(module, launcher, world_rank, world_size)
    group = ProcessGroupShmpi(engine.create_group(list(range(engine.size))), module.ReduceOp)
    placement = place(group, engine, num_gpus, launcher, limit)
    nodes = engine.node_of_rank
    summary = summarize(module, nodes, placement)
    job = Job(engine, module, nodes, placement.device, summary, obstacle, module.is_replacement())
    _jobs.append(job)
    if comm is None:
        _job_of_world = job
    return job


def _load_engine(num_gpus: int | None, comm: Any, launcher: Launcher | None) -> tuple[ModuleType, MPILibrary]:
    """Load MPI and the engine's module for it, or become mpirun if the script asks for ranks and nobody started any."""
    mpi_was_loaded = mpi_library.loaded_mpi() is not None
    try:
        module = mpi_library.load_engine()
    except Exception as error:
        raise_once(error, launcher)
    mpi = mpi_library.loaded_mpi()
    assert mpi is not None
    num_ranks, _ = devices.resolve_num_gpus(num_gpus, launcher.local_size if launcher else None, 0)
    if launcher is None and comm is None and num_ranks > 1 and not (mpi_was_loaded and _is_initialized()):
        devices.resolve_num_gpus(num_gpus, None, torch.accelerator.device_count())
        restart_under_mpirun(num_ranks, mpi)
    return module, mpi


def _initialize(module: ModuleType, mpi: MPILibrary, comm: Any, launcher: Launcher | None) -> tuple[bool, int, int]:
    """Initialize MPI unless that has been done, and compare what the ranks run. Collective, blocks.

    Returns:
        Whether MPI was initialized here, and rank and size of MPI_COMM_WORLD.
    """
    mpirun.skip_network_search()
    mpi_environment.prepare(os.environ, launcher, mpi)
    devices.keep_freed_memory(os.environ)
    versions, has_initialized = module.exchange_versions(_address_of(comm), version_check.describe(module))
    world_rank, world_size = module.world_rank_and_size()
    check_world_size(launcher, world_size, mpi)
    try:
        version_check.check_alike(versions)
    except MismatchError as error:
        raise_once(error, launcher)
    return has_initialized, world_rank, world_size


def _obstacle_to_elastic(module: ModuleType, comm: Any) -> str | None:
    if not module.survives_deaths():
        return "it needs Open MPI 5, started with `--with-ft ulfm`"
    if comm is not None:
        return "the script gave the trainer a communicator"
    return None


def _prepare_end(module: ModuleType, launcher: Launcher | None, world_rank: int, world_size: int) -> None:
    """Record that this process is a rank, and prepare for its end, orderly or by an error. Local."""
    job_record.append(job_record.STARTED)
    mark_rank()
    atexit.register(_close_all, os.getpid())
    install_excepthook(module.abort, world_rank, world_size)
    if launcher_process := find_launcher_process(launcher):
        module.end_with_launcher(launcher_process)


def _address_of(comm: Any) -> int:
    if comm is None:
        return 0
    from mpi4py import MPI

    return MPI._addressof(comm)


def _is_initialized() -> bool:
    flag = ctypes.c_int(0)
    ctypes.CDLL(None).MPI_Initialized(ctypes.byref(flag))
    return bool(flag.value)


def wants_elastic() -> bool:
    """Return whether this process was started with `run --elastic`. Local."""
    return os.environ.get("DTRAIN_ELASTIC") == "1"


def recover(job: Job) -> Job:
    """Return a job of the ranks that survived, after others of an elastic job were killed.

    Collective over the surviving ranks, blocks.

    Raises:
        RankLostError: Some surviving ranks have already ended.
    """
    engine = job.engine.recover()
    if engine is None:
        raise RankLostError("a rank was killed, and others have already reached the end of their script")
    return _replace(job, engine)


def admit(job: Job) -> Job:
    """Add a ready replacement to a job as its last rank; return the new job. Collective over all of them, blocks."""
    return _replace(job, job.engine.admit())


def join(job: Job) -> Job | None:
    """Return the job that admits this replacement; None if it is not needed any more. Blocks.

    Args:
        job: The job that this process started alone.

    Raises:
        DistributedTrainerError: The rank that started this process is gone.
    """
    engine = job.engine.join()
    if engine is None:
        return None
    install_excepthook(job.module.abort, engine.rank, engine.size)
    return _replace(job, engine)


def _replace(job: Job, engine: Engine) -> Job:
    """Replace a job by one with the engine that has taken over. Local."""
    global _job_of_world
    call_sites.replace_engine(job.engine, engine)
    recovered = Job(engine, job.module, engine.node_of_rank, job.device, job.summary, recoveries=job.recoveries)
    _jobs[_jobs.index(job)] = recovered
    if _job_of_world is job:
        _job_of_world = recovered
    return recovered


def recoveries() -> list[Any]:
    """Return the objects by which trainers of this process survive deaths (`Job.recoveries`). Local."""
    return [recovery for job in _jobs for recovery in job.recoveries]


def leave_groups(kept: Sequence[Any]) -> None:
    """Close this rank's groups of all jobs, except those kept. Local; other ranks that wait for this one get an error.

    Args:
        kept: Groups to keep open.
    """
    for job in _jobs:
        job.leave_groups(kept)


def _close_all(pid: int) -> None:
    if os.getpid() == pid:
        for job in reversed(_jobs):
            job.engine.close()
        # MPI let this rank end, so all ranks have reached their end. (In an elastic job rank 0 may be killed here.)
        if _jobs[0].rank == 0 or wants_elastic():
            job_record.append(job_record.COMPLETED)


def _make_nccl(store: Store, rank: int, size: int) -> Any:
    return dist.ProcessGroupNCCL(store, rank, size, dist.ProcessGroupNCCL.Options())
