# SPDX-License-Identifier: Apache-2.0
"""`distributed-trainer run --restarts`: starts a job again after a killed rank or a lost host has ended it.

The script itself continues from its newest checkpoint. A job that the script's exception ended is not started again.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

from ..launch import job_record
from .hostfile import Host

_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_ENDING = (signal.SIGINT, signal.SIGTERM)
_PR_SET_PDEATHSIG = 1
_BY_SIGNAL = 128  # lowest exit code that means an end by a signal


def supervise(
    make_command: Callable[[Sequence[Host] | None], list[str]],
    hosts: Sequence[Host] | None,
    find_lost: Callable[[Sequence[Host]], Mapping[str, str]],
    environment: Mapping[str, str],
    num_restarts: int,
) -> int:
    """Run mpirun, and run it again when a rank or host was lost; print a line on stderr for each start and loss.

    Args:
        make_command: Function that returns mpirun's command line for some hosts; its argument is None without a
            hostfile.
        hosts: Hosts with their numbers of ranks as slots; None without a hostfile.
        find_lost: Function that returns those hosts that do not answer, each with the reason.
        environment: Environment of mpirun, with the path of the job's record.
        num_restarts: Largest number of restarts.

    Returns:
        mpirun's exit code, but never 0 for a job that has begun and was not completed.
    """
    path = Path(environment[job_record.VARIABLE])
    for attempt in range(num_restarts + 1):
        command = make_command(hosts)
        _say(f"running {shlex.join(command)}")
        began = time.monotonic()
        path.unlink(missing_ok=True)
        with _place_for_segments(environment, hosts) as place:
            code, was_told_to_end = _run(command, {**environment, **place})
        lines = job_record.read(path)
        path.unlink(missing_ok=True)
        has_started, is_complete = job_record.STARTED in lines, job_record.COMPLETED in lines
        has_failed = any(line.startswith(job_record.FAILED) for line in lines)
        if is_complete and not has_failed and code >= _BY_SIGNAL and environment.get("DTRAIN_ELASTIC") == "1":
            return 0  # the exit code is that of a killed rank, after which the others have completed the job
        if is_complete or has_failed or was_told_to_end or (not has_started and code < _BY_SIGNAL):
            return code or int(has_failed)
        code = code or 1  # mpirun may return 0 for a job that has lost a host
        text = f"the job has ended with exit code {code} after {time.monotonic() - began:.0f} s"
        if attempt == num_restarts:
            _say(f"{text}; {num_restarts} restart{'s' if num_restarts > 1 else ''} did not help")
            return code
        if hosts is not None:
            lost = find_lost(hosts)
            hosts = [host for host in hosts if host.name not in lost]
            text += "".join(f"; {name} is left out: {why}" for name, why in lost.items())
            if not hosts:
                _say(f"{text}; no host is left")
                return code
        _say(f"{text}; restart {attempt + 1} of {num_restarts}")
    raise AssertionError("unreachable")


def _run(command: Sequence[str], environment: Mapping[str, str]) -> tuple[int, bool]:
    """Run a command and pass signals to it; return its exit code, and whether a signal told it to end."""
    process = subprocess.Popen(command, env=dict(environment), preexec_fn=_end_with_parent)
    was_told_to_end = False

    def pass_on(number: int, _frame: FrameType | None) -> None:
        nonlocal was_told_to_end
        was_told_to_end = was_told_to_end or number in _ENDING
        process.send_signal(number)

    previous = {number: signal.signal(number, pass_on) for number in _PASSED_ON}
    try:
        code = process.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return code if code >= 0 else _BY_SIGNAL - code, was_told_to_end


@contextlib.contextmanager
def _place_for_segments(environment: Mapping[str, str], hosts: Sequence[Host] | None) -> Iterator[dict[str, str]]:
    """Make Open MPI put shared memory into a folder that is removed afterwards: it leaves that of killed ranks."""
    name, folder = "OMPI_MCA_btl_sm_backing_directory", "/dev/shm"
    if hosts is not None or name in environment or not os.access(folder, os.W_OK):
        yield {}
        return
    prefix = f"distributed-trainer-{os.getpid()}-"
    with tempfile.TemporaryDirectory(prefix=prefix, dir=folder, ignore_cleanup_errors=True) as made:
        yield {name: made}


def _end_with_parent() -> None:
    """Arrange in the child that mpirun will get SIGTERM when this process is killed."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _say(text: str) -> None:
    print(f"distributed_trainer: {text}", file=sys.stderr, flush=True)


def record_path(has_hosts: bool) -> Path:
    """Return the path of the job's record: with several hosts it is in the current folder, which they should share.

    Local.
    """
    folder = Path.cwd() if has_hosts else Path(os.environ.get("TMPDIR", "/tmp"))
    return folder / f".distributed-trainer-{os.getpid()}.record"
