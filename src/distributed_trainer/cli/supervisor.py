# SPDX-License-Identifier: Apache-2.0
"""Run mpirun; with `--restarts`, run it again after a killed rank or a lost host has ended the job.

The script itself continues from its newest checkpoint. A job that the script's exception ended is not started again.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from ..launch import job_record
from .boilerplate import HOLD_SECONDS, Boilerplate
from .hostfile import Host

_PASSED_ON = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_ENDING = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
_PR_SET_PDEATHSIG = 1
_BY_SIGNAL = 128  # lowest exit code that means an end by a signal


def supervise(
    make_command: Callable[[Sequence[Host] | None], list[str]],
    hosts: Sequence[Host] | None,
    find_lost: Callable[[Sequence[Host]], Mapping[str, str]],
    environment: Mapping[str, str],
    num_restarts: int,
    is_verbose: bool = False,
) -> int:
    """Run mpirun, and run it again when a rank or host was lost; print a line on stderr for each loss.

    Args:
        make_command: Function that returns mpirun's command line for some hosts; its argument is None without a
            hostfile.
        hosts: Hosts with their numbers of ranks as slots; None without a hostfile.
        find_lost: Function that returns those hosts that do not answer, each with the reason.
        environment: Environment of mpirun, with the path of the job's record.
        num_restarts: Largest number of restarts.
        is_verbose: As for `run_mpirun`.

    Returns:
        mpirun's exit code, but never 0 for a job that has begun and was not completed.
    """
    path = Path(environment[job_record.VARIABLE])
    for attempt in range(num_restarts + 1):
        began = time.monotonic()
        path.unlink(missing_ok=True)
        with _place_for_segments(environment, hosts) as place:
            code, was_told_to_end = run_mpirun(make_command(hosts), {**environment, **place}, is_verbose)
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


def run_mpirun(command: Sequence[str], environment: Mapping[str, str], is_verbose: bool) -> tuple[int, bool]:
    """Run mpirun; return its exit code, and whether a signal told it to end.

    If it fails after such a signal, the code is that of a shell: 143 after SIGTERM, 130 after SIGINT. mpirun has this
    process's stdin, stdout and process group. It gets the signals that are sent to this process alone, and ends if this
    process is killed.

    Args:
        command: mpirun's command line.
        environment: mpirun's environment.
        is_verbose: Whether to print the command line first, and then all that mpirun prints; False for what
            `Boilerplate` leaves.
    """
    if is_verbose:
        _say(f"running {shlex.join(command)}")
    is_filtered = not is_verbose and sys.stderr is not None
    is_nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    awaited = {*_PASSED_ON, signal.SIGCHLD} - ({signal.SIGHUP} if is_nohup else set())
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # if it were ignored, the exit code would be lost
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, awaited)

    def prepare() -> None:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)

    ending_signal = 0
    try:
        stderr = subprocess.PIPE if is_filtered else None
        process = subprocess.Popen(command, env=dict(environment), stderr=stderr, preexec_fn=prepare)
        with _copying(process):
            while process.poll() is None:
                info = signal.sigwaitinfo(awaited)
                if info.si_signo != signal.SIGCHLD:
                    ending_signal = info.si_signo if info.si_signo in _ENDING else ending_signal
                    # A terminal's signal has reached mpirun already, and a second Ctrl-C makes MPICH kill at once.
                    if info.si_code <= 0:
                        process.send_signal(info.si_signo)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)
    code = process.returncode
    if code and ending_signal:
        return _BY_SIGNAL + ending_signal, True
    return code if code >= 0 else _BY_SIGNAL - code, ending_signal != 0


@contextlib.contextmanager
def _copying(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Copy the process's stderr, if it is a pipe, to this one's, up to what has been written at the end.

    A process does this, not a thread. If this process is killed, the other one continues, and mpirun does not die of a
    broken pipe before it has ended the ranks. Nor does mpirun get SIGTERM twice, as from a parent with two threads.
    """
    if process.stderr is None:
        yield
        return
    told, tell = os.pipe()
    copier = os.fork()
    if copier == 0:
        try:
            os.close(tell)
            _copy(process.stderr.fileno(), told)
        finally:
            os._exit(0)
    process.stderr.close()
    os.close(told)
    try:
        yield
    finally:
        with contextlib.suppress(BrokenPipeError):  # the copier has ended
            os.write(tell, b"!")
        os.close(tell)
        os.waitpid(copier, 0)


def _copy(source: int, told: int) -> None:
    """Copy bytes until `source` ends, or is empty after a byte has come from `told`.

    The end may not come, since processes that mpirun has left hold the pipe open, as ssh with a shared connection does.
    """
    boilerplate = Boilerplate()
    poll = select.poll()
    poll.register(source, select.POLLIN)
    poll.register(told, select.POLLIN)
    while True:
        ready = dict(poll.poll(1000 * HOLD_SECONDS if boilerplate.is_holding else None))
        data = os.read(source, 1 << 16) if source in ready else b""
        _write(boilerplate.feed(data) if data else boilerplate.flush())
        if source in ready and not data:
            return
        if source not in ready and told in ready:
            if os.read(told, 1):
                return
            poll.unregister(told)  # this process's parent was killed


def _write(data: bytes) -> None:
    while data:
        try:
            data = data[os.write(2, data) :]
        except BlockingIOError:
            select.select([], [2], [])
        except OSError:
            return  # the terminal or the reader is gone


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


def _say(text: str) -> None:
    print(f"distributed_trainer: {text}", file=sys.stderr, flush=True)


def record_path(has_hosts: bool) -> Path:
    """Return the path of the job's record: with several hosts it is in the current folder, which they should share.

    Local.
    """
    folder = Path.cwd() if has_hosts else Path(os.environ.get("TMPDIR", "/tmp"))
    return folder / f".distributed-trainer-{os.getpid()}.record"
