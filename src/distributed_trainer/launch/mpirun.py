# SPDX-License-Identifier: Apache-2.0
"""Find the mpirun of an MPI library, and its settings, which users would otherwise have to know."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

from ..errors import LaunchError, MPINotFoundError
from .host_facts import has_network_cards
from .mpi_library import MPILibrary

# Open MPI 5 reads the PRTE_MCA_ variable of each pair below, Open MPI 4 the OMPI_MCA_ variable.
_OVERSUBSCRIBE = {  # without it Open MPI refuses more ranks than cores
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
}
_FILL_HOSTS = {  # gives the ranks of a host successive numbers
    "PRTE_MCA_rmaps_default_mapping_policy": "slot",
    "OMPI_MCA_rmaps_base_mapping_policy": "slot",
}
_FILL_AND_OVERSUBSCRIBE = {"PRTE_MCA_rmaps_default_mapping_policy": "slot:oversubscribe"}
_PIDFD_OPEN = 434  # number of the system call on every processor
_NO_BINDING = {  # without it two ranks get one core each, however many cores there are
    "PRTE_MCA_hwloc_default_binding_policy": "none",
    "OMPI_MCA_hwloc_base_binding_policy": "none",
}


def mpirun_environment(num_ranks: int) -> dict[str, str]:
    """Return variables for an mpirun that starts all its ranks on this machine, without those that are already set.

    Users would otherwise have to know them. MPICH needs none and reads none of them.
    """
    is_crowded = num_ranks > len(os.sched_getaffinity(0))
    return _without_set(_OVERSUBSCRIBE | _settings(is_crowded, has_network_cards()))


def mpirun_environment_for_hosts(is_crowded: bool, has_cards: bool, is_elastic: bool = False) -> dict[str, str]:
    """Return variables for an mpirun on several machines, where a hostfile or a scheduler says each machine's ranks.

    Args:
        is_crowded: Whether a machine gets more ranks than it has cores.
        has_cards: Whether a machine may have network cards of the kind that `has_network_cards` looks for.
        is_elastic: Whether new processes may replace killed ones, whose slots Open MPI still counts as occupied.
    """
    placement = _FILL_HOSTS | (_FILL_AND_OVERSUBSCRIBE if is_elastic else {})
    return _without_set(placement | _settings(is_crowded, has_cards))


def elastic_settings(mpi: MPILibrary) -> tuple[list[str], dict[str, str]]:
    """Return options and variables for an mpirun whose ranks continue when one is killed, if this MPI can do that.

    So far only Open MPI 5 can: MPICH has the functions for it, but they end the job.

    Raises:
        LaunchError: Linux cannot tell the ranks of this machine that one of them has ended.
    """
    descriptor = ctypes.CDLL(None).syscall(_PIDFD_OPEN, os.getpid(), 0)
    if descriptor < 0:
        raise LaunchError(f"--elastic needs Linux 5.3 or newer (pidfd_open), and this is {os.uname().release}")
    os.close(descriptor)
    settings = {"DTRAIN_ELASTIC": "1"}
    if mpi.family != "openmpi" or not hasattr(ctypes.CDLL(mpi.path), "MPIX_Comm_shrink"):
        return [], settings
    settings["OMPI_MCA_async_mpi_finalize"] = "1"  # without it MPI_Finalize may wait for killed ranks
    # Not every rank knows whether a new process is on its own machine, so ranks would choose different algorithms.
    settings["OMPI_MCA_coll"] = "^han"
    return ["--with-ft", "ulfm"], settings


def skip_network_search() -> None:
    """Make Open MPI skip the search for network cards if this machine has none. Local; call it before MPI_Init."""
    os.environ.update(_without_set(_network_settings(has_network_cards())))


def _settings(is_crowded: bool, has_cards: bool) -> dict[str, str]:
    settings = _NO_BINDING | _network_settings(has_cards) | {"HOME": home_folder()}
    if os.geteuid() == 0:  # mpirun would refuse to run as root, which is the user in most containers
        settings |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    if is_crowded:
        settings["OMPI_MCA_mpi_yield_when_idle"] = "1"
    return settings


def home_folder() -> str:
    """Return the home folder. Open MPI does not start without HOME, and services of systemd have no HOME."""
    home = os.path.expanduser("~")  # read from HOME or the user database
    return "/" if home == "~" else home


def _network_settings(has_cards: bool) -> dict[str, str]:
    # The part "ofi" of Open MPI 5 sleeps 1 s when it looks for cards.
    return {} if has_cards else {"OMPI_MCA_btl": "^ofi"}


def _without_set(settings: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in settings.items() if name not in os.environ}


def find_mpirun(mpi: MPILibrary) -> str:
    """Find the mpirun of an MPI library: beside the library, in this Python environment, then on PATH.

    The mpirun on PATH may belong to another MPI and would start unconnected processes, so each one found is asked for
    its version.

    Raises:
        MPINotFoundError: There is no mpirun of this MPI.
    """
    names = ("mpirun", "mpirun.openmpi" if mpi.family == "openmpi" else "mpiexec.hydra")
    # The library is in <prefix>/lib or deeper; in Debian its path is a link. (mpirun does not accept "/" as prefix.)
    prefixes = [*Path(mpi.path).parents[:-1], *Path(mpi.path).resolve().parents[:-1], sys.prefix]
    others = []
    for folder in dict.fromkeys([*(f"{prefix}/bin" for prefix in prefixes), *os.get_exec_path()]):
        for name in names:
            if mpirun := shutil.which(name, path=folder):
                if _is_mpirun_of(mpi.family, mpirun):
                    return mpirun
                others.append(mpirun)
    package, debian = ("openmpi", "openmpi-bin") if mpi.family == "openmpi" else ("mpich", "mpich")
    raise MPINotFoundError(
        f"No mpirun for {mpi} was found: not beside the library, nor in {sys.prefix}/bin, nor on PATH"
        + (f" (of another MPI: {', '.join(others)})" if others else "")
        + f". Install one (`pip install {package}`, on Debian `apt install {debian}`), or name the libmpi of "
        f"another MPI in DTRAIN_LIBMPI."
    )


def _is_mpirun_of(family: str, mpirun: str) -> bool:
    try:
        version = subprocess.run(  # takes 5 ms
            [mpirun, "--version"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=True,
            timeout=10,
            env={**os.environ, "HOME": home_folder()},
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return False  # for example a shim of a Python version manager
    if family == "openmpi":
        return b"open-mpi.org" in version
    return b"HYDRA" in version or b"Intel(R) MPI" in version
