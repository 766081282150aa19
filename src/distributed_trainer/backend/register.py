# SPDX-License-Identifier: Apache-2.0
"""Make `shmpi` a backend of torch.distributed, and list what this package does to torch's internals.

Two more replacements in torch happen elsewhere, while a step runs: `F.linear` in gradients/direct_linear.py, and the
classes of BatchNorm modules in replica/batchnorm.py.

torch has public ways to register a backend and an init_method. They do not suffice for six purposes. The list names
for each the internal that is used, why, and what happens if torch changes it. All hold for torch 2.10 and newer.

1. `torch.distributed.rendezvous._rendezvous_handlers["env"]` is replaced, so that init_process_group without arguments
   works under mpirun: torch registers no second handler for a scheme. Without it importing this package fails.
2. The local variable `backend_config` of the function that creates a backend (`_new_process_group_helper`) is read from
   its frame, since torch does not tell a backend which others were requested. Without it a mix such as
   "cpu:shmpi,cuda:nccl" is not refused, and shmpi silently serves all devices.
3. `torch._C._dynamo.eval_frame` (`set_code_exec_strategy`, `_FrameExecStrategy`, `_FrameAction`) keeps torch.compile
   away from the process group's methods and, with the attribute `_torchdynamo_disable` of functions, from the trainer's
   public methods. Without it importing this package fails.
4. A process group that is written in Python needs the private methods that torch calls on C++ ones: those with an
   underscore in process_group.py, such as `_device_types` and `_get_backend`. gather.py calls them on other groups.
   Without them functions of torch.distributed fail, and tests of each function show it.
5. `torch._C._storage_Use_Count` counts the tensors on a bucket's memory (gradients/buckets.py). Nothing public says
   whether a script has kept a gradient or a view of one. Without it the first step fails.
6. `torch.distributed.distributed_c10d._FR_SELF_RECORDING_BACKENDS` names the backends to which torch 2.15 attaches no
   flight recorder. It can attach none to a group in Python. Without it init_process_group fails there.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any
from urllib.parse import parse_qs, urlsplit

import torch.distributed as dist
from torch._C._dynamo import eval_frame
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import register_rendezvous_handler

from ..errors import LaunchError
from ..launch.call_sites import records_block, records_call
from ..launch.launcher import find_launcher
from ..launch.separate_models import report_at_exit
from . import job as jobs
from .accelerator_group import ProcessGroupShmpiWithAccelerator
from .engine_group import EngineGroup
from .process_group import ProcessGroupShmpi
from .work import Work


def register() -> None:
    """Make `shmpi` a backend, and `mpi://` an init_method, of torch.distributed. Local; starts nothing.

    A rank that ends without either, and without a trainer, reports that it has trained alone.

    `mpi://` also replaces the default `env://` in a process that an MPI launcher has started without setting RANK:
    torch's own `env://` could only fail there.
    """
    dist.Backend.register_backend("shmpi", _create_backend, extended_api=True, devices=["cpu", "cuda"])
    register_rendezvous_handler("mpi", _rendezvous)  # type: ignore[no-untyped-call]  # torch gives it no types
    _serve_env_by_mpi()
    module: Any = sys.modules["torch.distributed.distributed_c10d"]
    getattr(module, "_FR_SELF_RECORDING_BACKENDS", set[str]()).add("shmpi")
    report_at_exit()
    classes = EngineGroup, ProcessGroupShmpi, ProcessGroupShmpiWithAccelerator, Work
    methods = [function for one in classes for function in vars(one).values()]
    # All functions that one decorator has made have the same code.
    _hide_from_dynamo([*methods, records_call(_nothing), records_block(_nothing)])


def _serve_env_by_mpi() -> None:
    """Replace torch's handler for `env://` by one that calls it unless only MPI can help."""
    # As an attribute of torch.distributed, `rendezvous` is a function, not the module.
    handlers = sys.modules["torch.distributed.rendezvous"]._rendezvous_handlers
    from_environment = handlers["env"]

    def env_or_mpi(url: str, **options: Any) -> Iterator[tuple[Store, int, int]]:
        is_by_mpi = "RANK" not in os.environ and find_launcher(os.environ) is not None
        return (_rendezvous if is_by_mpi else from_environment)(url, **options)

    handlers["env"] = env_or_mpi


def _nothing() -> None:
    pass


def _hide_from_dynamo(functions: Iterable[Any]) -> None:
    """Make torch.compile skip functions, and all functions that these call.

    While a compiled model runs, DistributedDataParallel's C++ calls a process group's methods; a function of the script
    that is compiled may call the trainer. torch.compile would try to compile them, and fail. `torch.compiler.disable`
    has the same effect, but imports the compiler, which takes a second.
    """
    strategy = eval_frame._FrameExecStrategy(eval_frame._FrameAction.SKIP, eval_frame._FrameAction.SKIP)
    for function in functions:
        if (code := getattr(function, "__code__", None)) is not None:
            eval_frame.set_code_exec_strategy(code, strategy)


def _create_backend(options: Any, _backend_options: Any) -> ProcessGroupShmpi:
    """Make a group for torch.distributed's init_process_group and new_group."""
    # torch does not tell a backend which others were requested, and a Python class silently replaces all of them.
    config = sys._getframe(1).f_locals.get("backend_config")
    if config is not None and set(config.get_device_backend_map().values()) != {"shmpi"}:
        raise ValueError(
            f'the backend "{config}" mixes shmpi with others. Pass backend="shmpi": it serves the CPU, and passes the '
            f"tensors of GPUs to NCCL where torch has it."
        )
    job = jobs.start(None, None)
    if not options.global_ranks_in_group:
        _check_place(job, options.group_rank, options.group_size)
    return job.create_group(options.global_ranks_in_group or None, timeout=options.timeout, for_torch=True)


def _rendezvous(url: str, **_options: Any) -> Iterator[tuple[Store, int, int]]:
    """Serve `init_method="mpi://"`: MPI knows the rank, the size and how to reach other ranks. Collective, blocks."""
    job = jobs.start(None, None)
    given = parse_qs(urlsplit(url).query)
    _check_place(job, int(given.get("rank", [job.rank])[0]), int(given.get("world_size", [job.engine.size])[0]))
    yield job.store, job.rank, job.engine.size


def _check_place(job: jobs.Job, rank: int, world_size: int) -> None:
    if (rank, world_size) != (job.rank, job.engine.size):
        raise LaunchError(
            f"init_process_group was given rank {rank} of {world_size}, but MPI says rank {job.rank} of "
            f"{job.engine.size}. Pass neither: MPI knows both."
        )
