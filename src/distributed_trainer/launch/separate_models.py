# SPDX-License-Identifier: Apache-2.0
"""Report at exit that a launcher has started ranks that nothing connected, so that each has trained its own model."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import sys

from ..errors import LaunchError
from . import mpi_library
from .launcher import find_launcher, is_started_by_launcher

_is_connected = False


def note_connection() -> None:
    """Record that this process has called create_distributed_trainer or init_process_group. Local."""
    global _is_connected
    _is_connected = True


def report_at_exit() -> None:
    """Make rank 0 of a launch print a line at its exit if each rank has trained alone. Local."""
    atexit.register(_report, os.getpid())


def _report(pid: int) -> None:
    if os.getpid() != pid or _is_connected or not _has_trained() or _is_connected_by_others():
        return
    try:
        launcher = find_launcher(os.environ)
    except LaunchError:
        return  # a rank has started this process
    size = launcher and (launcher.size or launcher.local_size)
    if launcher is None or launcher.rank > 0 or size in (None, 1) or not is_started_by_launcher():
        return
    print(
        f"distributed_trainer: {launcher.name} started {size} processes, but the script called neither "
        f"create_distributed_trainer nor torch.distributed.init_process_group: {size} separate models were trained. "
        f"Call create_distributed_trainer(model) on every rank, before the first step.",
        file=sys.stderr,
    )


def _has_trained() -> bool:
    """Return whether this process has made an optimizer and ended without an exception. Local."""
    torch = sys.modules.get("torch")
    has_failed = hasattr(sys, "last_type")
    return torch is not None and not has_failed and was_made(torch.optim.Optimizer)


def was_made(kind: type) -> bool:
    """Return whether an optimizer of a class, or of a class derived from it, was made: torch then marks its `step`."""
    return hasattr(kind.step, "hooked") or any(map(was_made, kind.__subclasses__()))  # type: ignore[attr-defined]


def _is_connected_by_others() -> bool:
    """Return whether anything else may connect this process with others: MPI, torch.distributed, multiprocessing."""
    # init_process_group installs a hook, which stays when the group is destroyed.
    has_had_group = sys.excepthook.__module__ == "torch.distributed.distributed_c10d"
    return has_had_group or multiprocessing.parent_process() is not None or mpi_library.loaded_mpi() is not None
