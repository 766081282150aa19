# SPDX-License-Identifier: Apache-2.0
"""Finds the mpirun of an MPI library, and sets for it what users would have to know otherwise."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

from .errors import MPINotFoundError
from .host_facts import has_network_cards
from .library import MPILibrary

# As two PRTE_MCA_ and OMPI_MCA_ twins each: Open MPI 5 reads the first, Open MPI 4 the second.
_OVERSUBSCRIBE = {  # more ranks than cores would be refused
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
}
_FILL_HOSTS = {  # ranks of a host have successive numbers
    "PRTE_MCA_rmaps_default_mapping_policy": "slot",
    "OMPI_MCA_rmaps_base_mapping_policy": "slot",
}
_FILL_AND_OVERSUBSCRIBE = {"PRTE_MCA_rmaps_default_mapping_policy": "slot:oversubscribe"}
_NO_BINDING = {  # two ranks would get one core each, however many there are
    "PRTE_MCA_hwloc_default_binding_policy": "none",
    "OMPI_MCA_hwloc_base_binding_policy": "none",
}


def mpirun_environment(num_ranks: int) -> dict[str, str]:
    """Variables for an mpirun that starts all its ranks on this machine, less those that are set already.

    They are what users have to know otherwise. MPICH needs none and reads none.
    """
    is_crowded = num_ranks > len(os.sched_getaffinity(0))
    return _without_set(_OVERSUBSCRIBE | _settings(is_crowded, has_network_cards()))


def mpirun_environment_for_hosts(is_crowded: bool, has_cards: bool, is_elastic: bool = False) -> dict[str, str]:
    """The same for several machines, where a hostfile or a scheduler says how many ranks each takes.

    Args:
        is_crowded: A machine gets more ranks than it has cores.
        has_cards: A machine may have network cards of the kind that `has_network_cards` looks for.
        is_elastic: New processes may take the places of killed ones, which Open MPI takes for occupied.
    """
    placement = _FILL_HOSTS | (_FILL_AND_OVERSUBSCRIBE if is_elastic else {})
    return _without_set(placement | _settings(is_crowded, has_cards))


def elastic_settings(mpi: MPILibrary) -> tuple[list[str], dict[str, str]]:
    """Options and variables for an mpirun whose ranks are to go on when one is killed, if this MPI can have that.

    So far Open MPI 5 alone: MPICH has the functions for it, but they end the job.
    """
    settings = {"DTRAIN_ELASTIC": "1"}
    if mpi.family != "openmpi" or not hasattr(ctypes.CDLL(mpi.path), "MPIX_Comm_shrink"):
        return [], settings
    settings["OMPI_MCA_async_mpi_finalize"] = "1"  # else the end of MPI may wait for the dead
    # Of a new process not all ranks know whether it is on their machine, and they would choose different algorithms.
    settings["OMPI_MCA_coll"] = "^han"
    return ["--with-ft", "ulfm"], settings


def skip_network_search() -> None:
    """Spares Open MPI, before MPI_Init, the search for network cards that this machine has not."""
    os.environ.update(_without_set(_network_settings(has_network_cards())))


def _settings(is_crowded: bool, has_cards: bool) -> dict[str, str]:
    settings = _NO_BINDING | _network_settings(has_cards) | {"HOME": home_folder()}
    if os.geteuid() == 0:  # as in most containers; mpirun would refuse
        settings |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    if is_crowded:
        settings["OMPI_MCA_mpi_yield_when_idle"] = "1"
    return settings


def home_folder() -> str:
    """What HOME would be, without which Open MPI does not start; services of systemd have none."""
    home = os.path.expanduser("~")  # from HOME or the user database
    return "/" if home == "~" else home


def _network_settings(has_cards: bool) -> dict[str, str]:
    # Looking for cards, this part of Open MPI 5 sleeps 1 s.
    return {} if has_cards else {"OMPI_MCA_btl": "^ofi"}


def _without_set(settings: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in settings.items() if name not in os.environ}


def find_mpirun(mpi: MPILibrary) -> str:
    """Finds the mpirun of an MPI library: beside it, in this Python environment, then on PATH.

    PATH may lead to that of another MPI, which would start unconnected processes, so each is asked.

    Raises:
        MPINotFoundError: There is none.
    """
    names = ("mpirun", "mpirun.openmpi" if mpi.family == "openmpi" else "mpiexec.hydra")
    # The library lies in <prefix>/lib or deeper, in Debian behind a link. (mpirun takes no prefix "/".)
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
        return False  # such as a shim of a Python version manager
    if family == "openmpi":
        return b"open-mpi.org" in version
    return b"HYDRA" in version or b"Intel(R) MPI" in version
