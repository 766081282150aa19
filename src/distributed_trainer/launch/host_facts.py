# SPDX-License-Identifier: Apache-2.0
"""Find what a machine is and has installed, to compare it with others, without importing torch or starting MPI.

The pre-flight check sends this file's text to hosts that may have another version of this package or of Python, or
none. So this file imports nothing but the standard library.
"""

from __future__ import annotations

import ctypes
import glob
import hashlib
import math
import os
import re
import runpy
import sys
from importlib import metadata, util
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any


def host_facts(mpi_path: str, mpi_family: str, files: list[str], module: str | None) -> dict[str, Any]:
    """Gather the facts of this machine. Local; takes about 0.1 s.

    Args:
        mpi_path: Path of the MPI library that the ranks will use.
        mpi_family: `MPILibrary.family` of this library.
        files: Paths that must exist.
        module: Module that must exist, None if the ranks run a script.

    Returns:
        Values that JSON can represent; None for software that is not installed.
    """
    torch = _folder_of("torch")
    package = _folder_of("distributed_trainer")
    return {
        "name": os.uname().nodename,
        # Host names for which all three values are equal are names of one machine.
        "machine": [
            _read("/proc/sys/kernel/random/boot_id"),
            *(os.readlink(f"/proc/self/ns/{n}") for n in ("uts", "net")),
        ],
        "missing": [file for file in files if not os.path.exists(file)]
        + ([f"module {module}"] if module and util.find_spec(module.partition(".")[0]) is None else []),
        "python": "{}.{}".format(*sys.version_info),
        "torch": torch and runpy.run_path(str(torch / "version.py"))["__version__"],
        "package": package and package_version(package),
        "engine": package and _engine_version(package, mpi_family),
        "mpi": _mpi_version(mpi_path),
        "paths": {"python": sys.executable, "torch": str(torch), "package": str(package), "mpi": mpi_path},
        "has_home": "HOME" in os.environ,
        "cores": num_cores(),
        "gpus": num_gpus(),
        "network_cards": has_network_cards(),
        "free_shared_memory": free_shared_memory(),
    }


def is_like_facts(value: Any) -> bool:
    """Return whether a value from another machine has the form of `host_facts`. Local."""
    kinds: dict[str, Any] = {
        **dict.fromkeys(("name", "python"), str),
        **dict.fromkeys(("torch", "package", "engine", "mpi"), (str, type(None))),
        **dict.fromkeys(("machine", "missing"), list),
        **dict.fromkeys(("cores", "gpus", "free_shared_memory"), int),
        **dict.fromkeys(("has_home", "network_cards"), bool),
        "paths": dict,
    }
    if not isinstance(value, dict) or not all(isinstance(value.get(key, ...), kind) for key, kind in kinds.items()):
        return False
    texts = [*value["machine"], *value["missing"], *map(value["paths"].get, ("python", "torch", "package", "mpi"))]
    return all(isinstance(text, str) for text in texts) and value["cores"] > 0 and value["gpus"] >= 0


def core_of(cpu: int) -> int:
    """Return the physical core of a CPU number of Linux, as the number of the core's first hyperthread. Local."""
    siblings = _read(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
    return int(siblings.replace("-", ",").split(",")[0]) if siblings else cpu


def num_cores() -> int:
    """Count the physical cores that this process may use, at most as many as its CPU time allows. Local."""
    cores, limit = len({core_of(cpu) for cpu in os.sched_getaffinity(0)}), cpu_limit()
    return min(cores, math.ceil(limit[1])) if limit else cores


def cpu_limit(groups: str = "/proc/self/cgroup", folder: str = "/sys/fs/cgroup") -> tuple[int, float] | None:
    """Find the limit on CPU time of this process's control groups: with `docker run --cpus=2` it is 2 CPUs. Local.

    Returns:
        A number that identifies the group (the same in every container), and the number of CPUs that the group's
        processes have together. If several groups have limits, those of the tightest, since a group's limit holds for
        all groups inside it. None without a limit.
    """
    limits = []
    for line in _read(groups).splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not path.startswith("/") or (controllers and "cpu" not in controllers.split(",")):
            continue  # a hierarchy of version 1 without the cpu controller
        root = Path(folder, "cpu") if controllers else Path(folder)
        # In a container the path may be the host's path, while the root is already the group at that path.
        below = Path(path.lstrip("/"))
        for group in (below, *below.parents):
            place = root / group
            if controllers:
                quota, period = (_read(f"{place}/cpu.cfs_{name}_us") for name in ("quota", "period"))
            else:
                quota, _, period = _read(f"{place}/cpu.max").partition(" ")
            if quota.isdigit():  # not "max" or -1
                limits.append((int(quota) / int(period), os.stat(place).st_ino))
    return min(limits)[::-1] if limits else None


def num_gpus() -> int:
    """Count the GPUs that torch would use here, by the drivers' device files, since asking torch takes seconds."""
    torch = _folder_of("torch")
    version = runpy.run_path(str(torch / "version.py")) if torch else {}
    for kind, variables, files in (
        ("cuda", ("CUDA_VISIBLE_DEVICES",), "/dev/nvidia[0-9]*"),
        ("hip", ("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"), "/dev/dri/renderD*"),
    ):
        if version.get(kind):  # torch was built for GPUs of this kind
            shown = next((os.environ[name].split(",") for name in variables if name in os.environ), glob.glob(files))
            return len([gpu for gpu in shown if gpu.strip() not in ("", "-1")])
    return 0


def has_network_cards() -> bool:
    """Return whether there is a network card that MPI drives without the kernel: InfiniBand, RoCE, Slingshot. Local."""
    return bool(glob.glob("/sys/class/infiniband/*") or glob.glob("/sys/class/cxi/*"))


def free_shared_memory() -> int:
    """Return the free bytes of /dev/shm, where MPI puts its messages; the engine's memory is elsewhere. Local."""
    status = os.statvfs("/dev/shm")
    return status.f_bavail * status.f_frsize


def warn_of_shared_memory(mpi_family: str, num_ranks: int, free_bytes: int, host: str = "") -> list[str]:
    """Return a warning if a machine's /dev/shm is too small for its ranks, as a container's often is, else none. Local.

    Measured: Open MPI 5.0 makes segments of 16 MiB, fills only a small part, and works without segments if there is no
    room. MPICH 5.0 takes up to 5.3 MiB for each rank, and crashes in MPI_Init if there is no room.
    """
    mib = 1 << 20
    needed = 17 * mib if mpi_family == "openmpi" else (6 * mib + num_ranks * 11 * mib // 2)
    if num_ranks < 2 or free_bytes >= needed:
        return []
    effect = "Open MPI's messages will be slow" if mpi_family == "openmpi" else "MPICH may crash in MPI_Init"
    return [
        f"/dev/shm{host and ' of ' + host} has {free_bytes // mib} MiB free, but {num_ranks} ranks need "
        f"{needed // mib}: {effect}. Enlarge it: `docker run --shm-size=1g`, or `mount -o remount,size=1g /dev/shm`."
    ]


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace").strip()
    except (OSError, ValueError):  # the latter for a zero byte in the path
        return ""


def _folder_of(package: str) -> Path | None:
    spec = util.find_spec(package)  # imports nothing, since the name is a top-level one
    return Path(spec.origin).parent if spec and spec.origin else None


def package_version(folder: Path) -> str:
    """Return the package's version and a fingerprint of its sources. Local.

    In a checkout the sources change while the version stays.
    """
    try:
        version = metadata.version("distributed_trainer")
    except metadata.PackageNotFoundError:
        version = "checkout"
    sources = {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*.py")}
    digest = hashlib.sha256(b"".join(name.encode() + sources[name] for name in sorted(sources))).hexdigest()
    return f"{version} (sources {digest[:12]})"


def _engine_version(package: Path, mpi_family: str) -> str | None:
    """Return the `engine_version` of the engine's module, without loading it; equal for all builds of one source."""
    names = [package / f"_engine_{mpi_family}{suffix}" for suffix in EXTENSION_SUFFIXES]
    for path in filter(Path.exists, names):  # an import would take the first that exists
        found = re.search(rb"distributed_trainer engine ([0-9a-f]{12})", path.read_bytes())
        return found[1].decode() if found else "an old version"
    return None


def _mpi_version(path: str) -> str | None:
    try:
        library = ctypes.CDLL(path)
        text, length = ctypes.create_string_buffer(8192), ctypes.c_int()
        library.MPI_Get_library_version(text, ctypes.byref(length))  # allowed before MPI_Init
    except (OSError, AttributeError):
        return None
    return " ".join(text.value.decode(errors="replace").splitlines()[0].partition(",")[0].split())
