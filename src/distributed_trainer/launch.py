# SPDX-License-Identifier: Apache-2.0
"""How this process was started, the restart under mpirun, and how a failing rank ends the job.

A launcher is known by the variables that it sets. They are read before MPI_Init only; afterwards MPI itself
is asked, and `check_world_size` compares the two.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import shlex
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from . import places, record
from .errors import DistributedTrainerError, LaunchError, MPINotFoundError, RankLostError
from .library import MPILibrary
from .mpirun import find_mpirun, mpirun_environment

# A restart begins where the script began, even if the script has called os.chdir since.
START_DIRECTORY = os.readlink("/proc/self/cwd")

# Names the variable with the folder for the output of processes that ranks start, if that goes to files.
LOG_DIRECTORY = "DTRAIN_LOG_DIR"

# Name: the variable that gives it away, then rank, size, local rank, local size, "" where it does not tell.
# The innermost comes first: torchrun is started by others, and mpirun inside a step of srun.
_LAUNCHERS = {
    "torchrun": ("TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    "mpirun of Open MPI": (
        "OMPI_COMM_WORLD_SIZE",
        *(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
    ),
    "mpiexec of MPICH": ("MPI_LOCALNRANKS", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    "PALS": ("PALS_RANKID", "PALS_RANKID", "PMI_SIZE", "PALS_LOCAL_RANKID", "PALS_LOCAL_SIZE"),
    "srun": ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", ""),
    "a PMI launcher": ("PMI_RANK", "PMI_RANK", "PMI_SIZE", "", ""),
    "a PMIx launcher": ("PMIX_RANK", "PMIX_RANK", "", "", ""),
}

# How the names of launching processes begin: Open MPI 5 and 4, MPICH and Intel MPI, Slurm, PALS.
_LAUNCHER_PROCESSES = ("prte", "orte", "mpirun", "mpiexec", "hydra_", "slurmstepd", "pals")

# How long at most a rank keeps silent so that rank 0 speaks first: launchers end a job at its first failure.
_HOLD_BACK_SECONDS = 2.0

_rank_pid: int | None = None  # the process in which `mark_rank` was called; a forked child inherits the value


@dataclass(frozen=True)
class Launcher:
    """What started this process as one of several, as far as its variables tell."""

    name: str
    """As messages call it, a key of `_LAUNCHERS`."""
    rank: int
    size: int | None
    local_rank: int | None
    local_size: int | None


def find_launcher(environ: Mapping[str, str]) -> Launcher | None:
    """Finds the launcher that started this process; None for plain `python train.py`.

    A Slurm allocation is no launcher: batch scripts and the shell of salloc have SLURM_NTASKS and
    SLURM_PROCID=0 as well. Nor is a step of one task, which is how `srun --pty bash` makes a shell.

    Raises:
        LaunchError: A rank has started this process, which has inherited that rank's place in its job.
    """
    for name, (sign, *variables) in _LAUNCHERS.items():
        if sign in environ:
            rank, size, local_rank, local_size = (
                int(environ[variable]) if variable in environ else None for variable in variables
            )
            # Slurm may make salloc's shell as a step, "interactive", that bears the size of the whole job.
            if name == "srun" and (size == 1 or environ.get("SLURM_STEP_ID") == str(0xFFFFFFFA)):
                return None
            launcher = Launcher(name, rank or 0, size, local_rank, local_size)
            _refuse_child_of_rank(launcher, environ)
            return launcher
    return None


def _refuse_child_of_rank(launcher: Launcher, environ: Mapping[str, str]) -> None:
    """MPI takes the child for the rank that started it: Open MPI then crashes the rank, MPICH the child."""
    rank_pid = environ.get("DTRAIN_RANK_PID")
    for pid, name in _parents() if rank_pid else ():
        if name.startswith(_LAUNCHER_PROCESSES):
            return  # a launcher stands between: this is a job of its own
        if str(pid) == rank_pid:
            raise LaunchError(
                f"Process {os.getpid()} was started by process {pid}, rank {launcher.rank} of a job of "
                f"{launcher.name}, and has inherited the variables that make it that rank. MPI would take "
                f"the two for one. Train in the rank itself, or start this program with an mpirun of its own."
            )


def mark_rank() -> None:
    """Notes that this process holds a place in an MPI job, so that no child of it is taken for the rank."""
    global _rank_pid
    _rank_pid = os.getpid()
    os.environ["DTRAIN_RANK_PID"] = str(_rank_pid)
    os.environ.pop("DTRAIN_RESTARTED", None)  # a script that this rank starts may in turn restart itself


def in_data_worker() -> bool:
    """Whether this process is a DataLoader worker or another forked child of a rank, and must not use MPI."""
    if _rank_pid not in (None, os.getpid()):
        return True
    data = sys.modules.get("torch.utils.data")  # a worker has imported it
    return data is not None and data.get_worker_info() is not None


def check_world_size(launcher: Launcher | None, world_size: int, mpi: MPILibrary) -> None:
    """Refuses, right after MPI_Init, processes that were started as N but are each rank 0 of 1.

    Local. Every process raises, the launcher's rank 0 alone prints.

    Raises:
        LaunchError: Names what was started, what MPI made of it, and what to type.
    """
    if launcher is None or world_size > 1 or max(launcher.size or 1, launcher.local_size or 1) == 1:
        return
    started = launcher.size or f"at least {launcher.local_size}"
    if launcher.name == "srun":
        manager = "pmi2" if mpi.family == "mpich" else "pmix"
        reason = (
            f"srun offered {mpi} no process manager that it understands. Type `srun --mpi={manager}` "
            f"(`srun --mpi=list` shows what this Slurm has), or mpirun in place of srun."
        )
    elif launcher.name == "torchrun":
        reason = f"torchrun starts no MPI job. Type `{_command_to_type(started, mpi)}` instead."
    else:
        reason = (
            f"{mpi} did not find its job, as happens when library and launcher are of two installations. "
            f"Type `{_command_to_type(started, mpi)}`, or set DTRAIN_LIBMPI to the launcher's libmpi."
        )
    message = f"{launcher.name} started {started} processes, but MPI made each of them rank 0 of 1: {reason}"
    raise_once(LaunchError(message), launcher)


def raise_once(error: Exception, launcher: Launcher | None) -> NoReturn:
    """Raises an error that all processes of a launch meet before they are connected; rank 0 alone prints it.

    All of them end with an exit code that is not 0. The others end late: launchers kill a job at its first
    failed process, and rank 0 must have printed by then.
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


def restart_under_mpirun(num_ranks: int, mpi: MPILibrary) -> NoReturn:
    """Becomes `mpirun -np num_ranks` of this process's own command line; each rank runs all of the script.

    To be called without a launcher, and before MPI_Init and any use of a GPU. Says on stderr what it runs.

    Args:
        num_ranks: Ranks to start, all on this machine.
        mpi: The library that the ranks will use; its own mpirun is taken.

    Raises:
        LaunchError: The command line cannot be run again, or has been already.
        MPINotFoundError: The library has no mpirun.
    """
    if command_line := os.environ.get("DTRAIN_RESTARTED"):
        raise LaunchError(
            f"num_gpus={num_ranks} made this script run again as `{command_line}`, but no variable of a "
            f"launcher is set: mpirun started no MPI job, or the script has removed them from os.environ. "
            f"Type `{_command_to_type(num_ranks, mpi)}`, and unset DTRAIN_RESTARTED if your shell has it."
        )
    if obstacle := _obstacle_to_restart():
        raise LaunchError(
            f"num_gpus={num_ranks} needs {num_ranks} processes, and {obstacle} cannot be run again under "
            f"mpirun. Put the code into a file and type `{_command_to_type(num_ranks, mpi)}`, or leave out "
            f"num_gpus."
        )
    mpirun = find_mpirun(mpi)
    command = [mpirun, "-np", str(num_ranks), sys.executable, *sys.orig_argv[1:]]
    command_line = shlex.join(command)
    print(f"distributed_trainer: num_gpus={num_ranks}, so running {command_line}", file=sys.stderr)
    environ = {**os.environ, **mpirun_environment(num_ranks), "DTRAIN_RESTARTED": command_line}
    if sys.stdout is not None and sys.stdout.isatty():
        environ.setdefault("PYTHONUNBUFFERED", "1")  # lines would pile up in the pipe of an MPICH rank
    _flush()
    os.chdir(START_DIRECTORY)
    os.execve(mpirun, command, environ)


def _obstacle_to_restart() -> str | None:
    """What cannot be run again about this process, None if it can."""
    script = getattr(sys.modules["__main__"], "__file__", None)
    if script is None or script.startswith(("<stdin>", "/dev/")) or hasattr(sys, "ps1") or sys.flags.interactive:
        return "a notebook, an interactive session, `python -c` or a script from standard input"
    if multiprocessing.parent_process() is not None:
        return "a process of multiprocessing"
    if "pytest" in sys.modules and "PYTEST_CURRENT_TEST" in os.environ:
        return "pytest, which would lose its tests and their captured output,"
    if ":" in sys.orig_argv:
        return "a command line with an argument ':' (for mpirun it ends the program's arguments)"
    return None


def _command_to_type(num_ranks: int | str, mpi: MPILibrary) -> str:
    """What starts the script properly, with the path of mpirun unless the shell finds the same one."""
    try:
        mpirun = find_mpirun(mpi)
    except MPINotFoundError:  # what is being worded is the more important error
        mpirun = "mpirun"
    name = "mpirun" if shutil.which("mpirun") == mpirun else mpirun
    return f"{shlex.quote(name)} -np {num_ranks} python train.py"


def find_launcher_process(launcher: Launcher | None) -> int | None:
    """Finds the launcher's process on this machine, whose end must end this rank.

    Returns:
        Its pid. None without a launcher, since such a run survives its shell, and where it cannot be seen.
    """
    if launcher is not None:
        for pid, name in _parents():
            if name.startswith(_LAUNCHER_PROCESSES):
                return pid
    return None


def cpus_of_launcher(launcher: Launcher | None) -> set[int]:
    """The CPUs that mpirun itself may use on this machine, so that its ranks could, too; empty if unknown.

    Other launchers are daemons of the system and may use all of the machine, their ranks may not.
    """
    if launcher is None or not launcher.name.startswith("mpi"):
        return set()
    pid = find_launcher_process(launcher)
    return set() if pid is None else os.sched_getaffinity(pid)


def _parents() -> Iterator[tuple[int, str]]:
    """Yields pid and name (which Linux cuts to 15 bytes) of the processes above this one, nearest first."""
    pid = os.getppid()
    while pid > 0:
        try:
            name, _, rest = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")
        except OSError:
            return  # it has ended, or it is another user's and hidden
        yield pid, name.partition("(")[2]
        pid = int(rest.split()[1])


def install_excepthook(abort: Callable[[int], object], rank: int, world_size: int) -> None:
    """Makes an uncaught exception end the job: the other ranks would wait for this one for ever.

    It sees the main thread's exceptions. In another thread one ends neither a Python process nor the job, and
    SystemExit is shown to no hook.

    Args:
        abort: Ends the job with an exit code. Need not return.
        rank: This process's.
        world_size: With 1 nothing is installed.
    """
    if world_size == 1:
        return
    previous = sys.excepthook

    def end_job(kind: type, error: BaseException, trace: TracebackType | None) -> None:
        exit_code = 130 if issubclass(kind, KeyboardInterrupt) else 1
        place = f"rank {rank} of {world_size} on {socket.gethostname()}"
        places.note_failure()
        is_by_death = issubclass(kind, RankLostError)
        if not (is_by_death or (issubclass(kind, DistributedTrainerError) and places.is_rank_lost())):
            record.note(f"{record.FAILED}: {kind.__name__} on {place}")
        if isinstance(sys.stderr, io.StringIO):
            # torch.distributed's hook collects what is printed here and prints it later, but there is no later.
            sys.stderr = sys.__stderr__
        try:
            # A mistake in the script strikes all ranks at once: the lowest prints it and so ends the others.
            time.sleep(min(0.5 * rank, _HOLD_BACK_SECONDS))
            if exit_code == 130:
                print(f"{place} was interrupted", file=sys.stderr)
            else:
                print(f"{place} failed:", file=sys.stderr)
                previous(kind, error, trace)
            _flush()
            time.sleep(0.3)  # mpirun reads this output and hears of the abort in no fixed order
        finally:
            try:
                abort(exit_code)
            finally:
                os._exit(exit_code)  # exit handlers would wait for the other ranks

    sys.excepthook = end_job


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()


def redirection(log_dir: str | None, name: str) -> list[str]:
    """A shell that becomes the process whose command comes after it, and sends its output to a file, if to a folder.

    What the MPIs have for this differs, and Open MPI 5.0's loses lines.

    Args:
        log_dir: Made if need be; None for no redirection.
        name: Of the file, without its end; the shell puts in variables.
    """
    if log_dir is None:
        return []
    return ["sh", "-c", f'mkdir -p "$0" && exec "$@" >"$0/{name}.log" 2>&1', log_dir]
