# SPDX-License-Identifier: Apache-2.0
"""Restart this script under mpirun, or say which command starts ranks, and redirect the output of ranks."""

from __future__ import annotations

import multiprocessing
import os
import shlex
import shutil
import sys
from typing import NoReturn

from ..errors import LaunchError, MPINotFoundError
from .failure import flush_output, raise_once
from .launcher import Launcher
from .mpi_library import MPILibrary
from .mpirun import find_mpirun, mpirun_environment

# Folder in which a restart begins: the one in which the script began, even if it has called os.chdir since.
START_DIRECTORY = os.readlink("/proc/self/cwd")

# Variable with the folder for the output of processes that ranks start, if their output goes to files.
LOG_DIRECTORY = "DTRAIN_LOG_DIR"


def restart_under_mpirun(num_ranks: int, mpi: MPILibrary) -> NoReturn:
    """Become `mpirun -np num_ranks` with this process's command line; each rank runs the whole script.

    Call it without a launcher, and before MPI_Init and any use of a GPU. It prints on stderr what it runs.

    Args:
        num_ranks: Number of ranks to start, all on this machine.
        mpi: Library that the ranks will use; its own mpirun is taken.

    Raises:
        LaunchError: The command line cannot be run again, or was already run again.
        MPINotFoundError: The library has no mpirun.
    """
    if command_line := os.environ.get("DTRAIN_RESTARTED"):
        raise LaunchError(
            f"num_gpus={num_ranks} made this script run again as `{command_line}`, but no variable of a "
            f"launcher is set: mpirun started no MPI job, or the script has removed its variables from os.environ. "
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
        environ.setdefault("PYTHONUNBUFFERED", "1")  # else an MPICH rank's lines would stay in its buffer
    flush_output()
    os.chdir(START_DIRECTORY)
    os.execve(mpirun, command, environ)


def _obstacle_to_restart() -> str | None:
    """Return the reason why this process's command line cannot be run again; None if it can."""
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


def check_world_size(launcher: Launcher | None, world_size: int, mpi: MPILibrary) -> None:
    """Refuse, right after MPI_Init, processes that were started as N ranks but are each rank 0 of 1.

    Local. Every process raises; only the launcher's rank 0 prints.

    Raises:
        LaunchError: MPI sees one rank where the launcher started several. The message says what to type.
    """
    if launcher is None or world_size > 1 or max(launcher.size or 1, launcher.local_size or 1) == 1:
        return
    started = launcher.size or f"at least {launcher.local_size}"
    if launcher.name == "srun":
        manager = "pmi2" if mpi.family == "mpich" else "pmix"
        reason = (
            f"srun offered no process manager that {mpi} understands. Type `srun --mpi={manager}` "
            f"(`srun --mpi=list` shows what this Slurm has), or mpirun in place of srun."
        )
    elif launcher.name == "torchrun":
        reason = f"torchrun starts no MPI job. Type `{_command_to_type(started, mpi)}` instead."
    else:
        reason = (
            f"{mpi} did not find its job, which happens when library and launcher are of two installations. "
            f"Type `{_command_to_type(started, mpi)}`, or set DTRAIN_LIBMPI to the launcher's libmpi."
        )
    message = f"{launcher.name} started {started} processes, but MPI made each of them rank 0 of 1: {reason}"
    raise_once(LaunchError(message), launcher)


def _command_to_type(num_ranks: int | str, mpi: MPILibrary) -> str:
    """Return the command that starts the script properly, with mpirun's path unless the shell finds the same mpirun."""
    try:
        mpirun = find_mpirun(mpi)
    except MPINotFoundError:  # the error for which this command is needed is more important
        mpirun = "mpirun"
    name = "mpirun" if shutil.which("mpirun") == mpirun else mpirun
    return f"{shlex.quote(name)} -np {num_ranks} python train.py"


def command_line(num_ranks: int) -> str:
    """Return the command that starts this script as that number of ranks on this machine. Local."""
    words = ["python", "train.py"] if _obstacle_to_restart() else sys.orig_argv
    return shlex.join(["mpirun", "-np", str(num_ranks), *words])


def redirection(log_dir: str | None, name: str) -> list[str]:
    """Return the words to put before a command so that its output goes to a file `log_dir`/`name`.log. Local.

    The words start a shell, which then becomes the command. The options of the MPIs for this purpose differ, and that
    of Open MPI 5.0 loses lines.

    Args:
        log_dir: Folder, made if it does not exist; None for no redirection, and no words.
        name: Name of the file without its suffix; the shell replaces variables in it.
    """
    if log_dir is None:
        return []
    return ["sh", "-c", f'mkdir -p "$0" && exec "$@" >"$0/{name}.log" 2>&1', log_dir]
