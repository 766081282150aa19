# SPDX-License-Identifier: Apache-2.0
"""End a rank that fails: one rank prints for all what happened, and the job ends."""

from __future__ import annotations

import io
import os
import socket
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import NoReturn

from ..errors import DistributedTrainerError, RankLostError, RankTraceback
from . import call_sites, job_record
from .launcher import Launcher

# Longest time that a rank waits so that rank 0 prints first: launchers end a job at its first failed process.
_HOLD_BACK_SECONDS = 2.0


def raise_once(error: Exception, launcher: Launcher | None) -> NoReturn:
    """Raise an error that every process of a launch gets before they are connected; only rank 0 prints it.

    All of them end with an exit code other than 0. The other ranks end later: launchers kill a job at its first failed
    process, and rank 0 must have printed by then.
    """
    if isinstance(error, DistributedTrainerError):
        error.is_for_rank_0 = True
    previous = sys.excepthook

    def leave_silently(kind: type, value: BaseException, trace: TracebackType | None) -> None:
        if value is error:
            time.sleep(_HOLD_BACK_SECONDS)
        else:
            previous(kind, value, trace)

    if launcher is not None and launcher.rank > 0:
        sys.excepthook = leave_silently
    raise error


def install_excepthook(abort: Callable[[int], object], rank: int, world_size: int) -> None:
    """Make an uncaught exception end the job, since the other ranks would wait for this one for ever.

    The hook gets the main thread's exceptions. An exception in another thread ends neither a Python process nor the
    job. Python calls no hook for SystemExit.

    Args:
        abort: Function that ends the job with an exit code. It need not return.
        rank: Rank of this process.
        world_size: Number of ranks; with 1 nothing is installed.
    """
    if world_size == 1:
        return
    previous = sys.excepthook

    def end_job(kind: type, error: BaseException, trace: TracebackType | None) -> None:
        exit_code = 130 if issubclass(kind, KeyboardInterrupt) else 1
        place = f"rank {rank} of {world_size} on {socket.gethostname()}"
        call_sites.report_failure()
        is_by_death = issubclass(kind, RankLostError)
        if not (is_by_death or (issubclass(kind, DistributedTrainerError) and call_sites.is_rank_lost())):
            job_record.append(f"{job_record.FAILED}: {kind.__name__} on {place}")
        if isinstance(sys.stderr, io.StringIO):
            # torch.distributed's hook collects what is printed here and prints it later, when this process has ended.
            sys.stderr = sys.__stderr__
        try:
            # A mistake in the script raises on all ranks at once: the lowest rank prints it, and so ends the others.
            # An exception that came from another rank is printed by that rank.
            is_copy = isinstance(error.__cause__, RankTraceback)
            time.sleep(min(0.5 * rank, _HOLD_BACK_SECONDS) + is_copy * _HOLD_BACK_SECONDS)
            if exit_code == 130:
                print(f"{place} was interrupted", file=sys.stderr)
            else:
                print(f"{place} failed:", file=sys.stderr)
                previous(kind, error, trace)
            flush_output()
            time.sleep(0.3)  # mpirun may handle the abort before it has read this output
        finally:
            try:
                abort(exit_code)
            finally:
                os._exit(exit_code)  # exit handlers would wait for the other ranks

    sys.excepthook = end_job


def flush_output() -> None:
    """Write out this process's output that Python still buffers. Local."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
