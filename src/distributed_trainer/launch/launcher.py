# SPDX-License-Identifier: Apache-2.0
"""Find the launcher that started this process, and the place in a job that it gave this process.

A launcher is recognized by the variables that it sets. They are read only before MPI_Init. Afterwards MPI itself is
asked, and `relaunch.check_world_size` compares its answer with the variables.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import LaunchError

# For each launcher the variable that shows it, then those with rank, size, local rank and local size ("" for none).
# Inner launchers are listed first: others may start torchrun, and a step of srun may start mpirun.
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

# Prefixes of the names of launchers' processes: Open MPI 5 and 4, MPICH and Intel MPI, Slurm, PALS.
_LAUNCHER_PROCESSES = ("prte", "orte", "mpirun", "mpiexec", "hydra_", "slurmstepd", "pals")

_rank_pid: int | None = None  # the process in which `mark_rank` was called; a forked child inherits the value


@dataclass(frozen=True)
class Launcher:
    """Launcher that started this process as one of several; None for values that its variables do not give."""

    name: str
    """Name for messages, a key of `_LAUNCHERS`."""
    rank: int
    """Rank of this process; 0 if the launcher sets no variable for it."""
    size: int | None
    """Number of ranks."""
    local_rank: int | None
    """Number of this process among those on its machine."""
    local_size: int | None
    """Number of ranks on this machine."""


def find_launcher(environ: Mapping[str, str]) -> Launcher | None:
    """Find the launcher that started this process; None for plain `python train.py`.

    A Slurm allocation is no launcher: batch scripts and the shell of salloc have SLURM_NTASKS and SLURM_PROCID=0, too.
    A step of one task is no launcher either, since `srun --pty bash` makes a shell in this way.

    Raises:
        LaunchError: A rank has started this process, which has inherited that rank's place in its job.
    """
    for name, (sign, *variables) in _LAUNCHERS.items():
        if sign in environ:
            rank, size, local_rank, local_size = (
                int(environ[variable]) if variable in environ else None for variable in variables
            )
            # Slurm may start salloc's shell as a step "interactive", whose variables give the size of the whole job.
            if name == "srun" and (size == 1 or environ.get("SLURM_STEP_ID") == str(0xFFFFFFFA)):
                return None
            launcher = Launcher(name, rank or 0, size, local_rank, local_size)
            _refuse_child_of_rank(launcher, environ)
            return launcher
    return None


def _refuse_child_of_rank(launcher: Launcher, environ: Mapping[str, str]) -> None:
    """Refuse a child of a rank. MPI would take it for that rank: Open MPI then crashes the rank, MPICH the child."""
    rank_pid = environ.get("DTRAIN_RANK_PID")
    for pid, name in _parents() if rank_pid else ():
        if name.startswith(_LAUNCHER_PROCESSES):
            return  # there is a launcher between that rank and this process, so this is another job
        if str(pid) == rank_pid:
            raise LaunchError(
                f"Process {os.getpid()} was started by process {pid}, rank {launcher.rank} of a job of "
                f"{launcher.name}, and has inherited the variables of that rank. MPI would take the two processes for "
                f"one. Train in the rank itself, or start this program with another mpirun."
            )


def mark_rank() -> None:
    """Record that this process is a rank of an MPI job, so that its children are not taken for the rank. Local."""
    global _rank_pid
    _rank_pid = os.getpid()
    os.environ["DTRAIN_RANK_PID"] = str(_rank_pid)
    os.environ.pop("DTRAIN_RESTARTED", None)  # a script that this rank starts may restart itself under mpirun, too


def in_data_worker() -> bool:
    """Return whether this process is a DataLoader worker or a forked child of a rank, so must not use MPI. Local."""
    if _rank_pid not in (None, os.getpid()):
        return True
    data = sys.modules.get("torch.utils.data")  # every DataLoader worker has imported it
    return data is not None and data.get_worker_info() is not None


def find_launcher_process(launcher: Launcher | None) -> int | None:
    """Find the launcher's process on this machine; when it ends, this rank must end. Local.

    Returns:
        The pid. None without a launcher, since such a run continues when its shell ends, and if the process is not
        visible from here.
    """
    if launcher is not None:
        for pid, name in _parents():
            if name.startswith(_LAUNCHER_PROCESSES):
                return pid
    return None


def is_started_by_launcher() -> bool:
    """Return whether a launcher has started this process, and not a Python program between the two. Local.

    A process that a rank starts inherits the rank's variables. A shell or another wrapper in between does not matter.
    """
    for _, name in _parents():
        if name.startswith((*_LAUNCHER_PROCESSES, "python")):
            return not name.startswith("python")
    return False


def cpus_of_launcher(launcher: Launcher | None) -> set[int]:
    """Return the CPUs that mpirun itself may use on this machine, and its ranks without binding; empty if unknown.

    Other launchers are daemons of the system: they may use the whole machine, but their ranks may not.
    """
    if launcher is None or not launcher.name.startswith("mpi"):
        return set()
    pid = find_launcher_process(launcher)
    return set() if pid is None else os.sched_getaffinity(pid)


def _parents() -> Iterator[tuple[int, str]]:
    """Yield pid and name (which Linux cuts to 15 bytes) of this process's ancestors, nearest first."""
    pid = os.getppid()
    while pid > 0:
        try:
            name, _, rest = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")
        except OSError:
            return  # the process has ended, or another user owns it and it is hidden
        yield pid, name.partition("(")[2]
        pid = int(rest.split()[1])
