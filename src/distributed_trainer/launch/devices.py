# SPDX-License-Identifier: Apache-2.0
"""Divide a machine among its ranks: their number, each rank's device, its threads, its use of memory.

The functions that decide get as arguments what all ranks of the machine found, so tests can run them without a GPU.
"""

from __future__ import annotations

import ctypes
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from fractions import Fraction
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import LaunchError
from .host_facts import core_of, cpu_limit

if TYPE_CHECKING:
    import torch

# The stall monitor's thread, which every rank has (engine/runtime/stall_monitor.cpp).
_THREAD_OF_RANKS = "dtrain-stalls\n"
_OBSERVED_SECONDS = 0.2

_HIDE_GPUS = "or hide the GPUs (CUDA_VISIBLE_DEVICES='') to train on the CPU"


def resolve_num_gpus(
    num_gpus: int | None, local_size: int | None, device_count: int, is_launched: bool = True
) -> tuple[int, str | None]:
    """Decide how many ranks this machine has. Local.

    A launcher has already decided it. Without a launcher the number is `num_gpus`, or 1.

    Args:
        num_gpus: Devices per machine that the script requests, None for as many as the launcher started ranks.
        local_size: Number of ranks that a launcher has started on this machine, None without a launcher.
        device_count: Number of GPUs that the ranks of this machine see; with 0 any number of ranks trains on the CPU.
        is_launched: Whether a launcher has started the ranks, for the line.

    Returns:
        The number of ranks, and a line for rank 0 to print if `num_gpus` has no effect, else None.

    Raises:
        TypeError: `num_gpus` is no integer.
        ValueError: `num_gpus` is below 1.
        LaunchError: There are GPUs, but fewer than ranks or than `num_gpus`.
    """
    if num_gpus is not None:
        if isinstance(num_gpus, bool) or not isinstance(num_gpus, Integral):
            raise TypeError(f"num_gpus must be an int or None, not {type(num_gpus).__name__} ({num_gpus!r})")
        if num_gpus < 1:
            raise ValueError(f"num_gpus is the number of devices per machine and at least 1, not {num_gpus}")
    host = os.uname().nodename
    if 0 < device_count < (num_gpus or 0):
        raise LaunchError(
            f"num_gpus={num_gpus}, but {host} has {device_count} GPU(s). Pass num_gpus={device_count} or "
            f"leave it out, {_HIDE_GPUS}."
        )
    if 0 < device_count < (local_size or 0):
        raise LaunchError(
            f"{local_size} ranks were started on {host}, which has {device_count} GPU(s), and each needs its "
            f"own. Start {device_count} on this machine, {_HIDE_GPUS}."
        )
    if local_size is None:
        return num_gpus or 1, None
    if num_gpus in (None, local_size):
        return local_size, None
    cause = "the launcher started" if is_launched else "MPI runs already, with"
    return local_size, f"num_gpus={num_gpus} has no effect: {cause} {local_size} rank(s) on {host}, which train."


def visible_devices() -> list[str]:
    """Return names of the accelerators that this process sees. On one machine, equal names mean the same device. Local.

    Numbers do not identify a device: schedulers show each rank its own GPU as number 0.
    """
    import torch

    if not torch.accelerator.is_available():
        return []
    accelerator = torch.accelerator.current_accelerator()
    assert accelerator is not None  # one is available
    kind = accelerator.type
    count = torch.accelerator.device_count()
    properties = getattr(torch.get_device_module(kind), "get_device_properties", lambda index: None)
    # If devices have no uuid and this process sees only one, that one is assumed to be this process's alone.
    fallback = f"{kind} of process {os.getpid()}" if count == 1 else kind
    return [str(getattr(properties(index), "uuid", f"{fallback}:{index}")) for index in range(count)]


def pick_device(visible: Sequence[Sequence[str]], local_rank: int, kind: str = "cuda") -> torch.device:
    """Pick a rank's device: number 0 if the rank sees only one, else its local rank; the CPU if no rank sees one.

    Args:
        visible: `visible_devices` of all ranks of this machine, by local rank.
        local_rank: Local rank of this rank.
        kind: Type of the accelerators.

    Raises:
        LaunchError: Two ranks would take the same device, or only some ranks see one.
    """
    import torch

    if not any(visible):
        return torch.device("cpu")
    host = os.uname().nodename
    if not all(visible):
        blind = [rank for rank, names in enumerate(visible) if not names]
        raise LaunchError(
            f"Local ranks {blind} of {host} see no GPU, its other ranks do. Show each rank its GPU, {_HIDE_GPUS}."
        )
    chosen = [names[rank % len(names)] for rank, names in enumerate(visible)]
    for rank, name in enumerate(chosen):
        first = chosen.index(name)
        if first != rank:
            raise LaunchError(
                f"Local ranks {first} and {rank} of {host} would both use GPU {name}: its {len(chosen)} ranks see "
                f"{len(set().union(*visible))} GPU(s) in all. Start one rank per GPU and show each rank all "
                f"GPUs or its own, {_HIDE_GPUS}."
            )
    return torch.device(kind, local_rank % len(visible[local_rank]))


def instruction_sets() -> str:
    """Return the CPU's vendor and the instruction sets by which torch's libraries choose their code. Local."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        import torch

        return torch.backends.cpu.get_cpu_capability()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    fields = {name.strip(): value.strip() for name, value in fields.items()}
    flags = [flag for flag in fields.get("flags", "").split() if flag.startswith(("avx", "fma", "amx"))]
    return f"{fields.get('vendor_id', 'unknown')} ({' '.join(sorted(flags))})"


@dataclass(frozen=True)
class Threads:
    """Threads for one rank's computation."""

    number: int | None
    """Argument for torch.set_num_threads; None to leave the number as the user has set it."""
    text: str
    """Text for the start-up line."""
    warning: str | None
    """Line for rank 0 to print if the launcher keeps the ranks from using some cores, else None."""


def fit_threads(
    cpus_of_ranks: Sequence[AbstractSet[int]],
    local_rank: int,
    environ: Mapping[str, str],
    cpus_of_launcher: AbstractSet[int] = frozenset(),
    limits: Sequence[tuple[int, float] | None] = (),
    core_of: Callable[[int], int] = core_of,
) -> Threads:
    """Fit the number of threads to the cores that a rank may use. Local.

    Under mpirun torch itself would choose 1. A job of one rank does not need the result: torch's own choice is right.
    Cores that several ranks may use are divided among them, and so is the CPU time of a container. If that gives 4
    cores or more, one is left to the engine's thread. Hyperthreads of a core count once, as in torch's own default.

    Args:
        cpus_of_ranks: `os.sched_getaffinity(0)` of all ranks of this machine, by local rank.
        local_rank: Local rank of this rank.
        environ: Environment; OMP_NUM_THREADS and MKL_NUM_THREADS in it are the user's choice. (No mpirun sets them.)
        cpus_of_launcher: `os.sched_getaffinity` of mpirun, if known. CPUs in it that no rank may use are those that
            mpirun's binding has taken away.
        limits: `host_facts.cpu_limit` of all ranks of this machine, by local rank.
        core_of: Function that returns the core of a CPU number.
    """
    cores_of_ranks = [{core_of(cpu) for cpu in cpus} for cpus in cpus_of_ranks]
    users = Counter(core for cores in cores_of_ranks for core in cores)
    num_cores, idle = len(users), {core_of(cpu) for cpu in cpus_of_launcher} - users.keys()
    warning = None
    if idle:
        shared = " (several to one core)" if max(users.values()) > 1 else ""
        warning = (
            f"the launcher binds the {len(cores_of_ranks)} rank(s) on {os.uname().nodename} to {num_cores} of its "
            f"{num_cores + len(idle)} cores{shared}; mpirun --bind-to none lets them use all"
        )
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        if name in environ:
            return Threads(None, f"threads by {name}={environ[name]}", warning)
    share = sum(Fraction(1, users[core]) for core in cores_of_ranks[local_rank])
    limited = ""
    if limits and (limit := limits[local_rank]):
        of_limit = Fraction(math.ceil(limit[1]), limits.count(limit))
        limited = f" with time for {limit[1]:.3g}" if of_limit < share else ""
        share = min(share, of_limit)
    number = int(share) - 1 if share >= 4 else max(int(share), 1)
    text = f"{number} thread{'s' if number > 1 else ''} per rank ({len(cores_of_ranks)} on {num_cores} cores{limited})"
    return Threads(number, text, warning)


def num_usable_cores(
    cpus_of_ranks: Sequence[AbstractSet[int]],
    cpus_of_launcher: AbstractSet[int] = frozenset(),
    limits: Sequence[tuple[int, float] | None] = (),
    core_of: Callable[[int], int] = core_of,
) -> int:
    """Count the cores of a machine for which its ranks have time together, if the launcher binds them well. Local.

    The arguments are those of `fit_threads`.
    """
    num_cores = len({core_of(cpu) for cpu in set(cpus_of_launcher).union(*cpus_of_ranks)})
    if not limits or None in limits:
        return num_cores
    return min(num_cores, math.ceil(sum(limit[1] for limit in set(limits) if limit)))


def find_other_ranks(own_pids: AbstractSet[int], cpus: AbstractSet[int]) -> list[int]:
    """Find this user's ranks of other jobs that compute on the same cores, by their process numbers. Local.

    It takes 0.2 s if there are such ranks, since those that only wait, as an idle notebook does, must be left out.

    Args:
        own_pids: Process numbers of this job's ranks.
        cpus: CPUs that this job's ranks may use on this machine.
    """
    cores = {core_of(cpu) for cpu in cpus}
    others = [path for path in Path("/proc").glob("[0-9]*") if _is_other_rank(path, own_pids, cores)]
    before = [_cpu_seconds(path) for path in others]
    time.sleep(_OBSERVED_SECONDS if others else 0)
    used = [_cpu_seconds(path) - seconds for path, seconds in zip(others, before, strict=True)]
    # A waiting rank uses a hundredth of a core. On a crowded machine a computing one may get a tenth.
    return [int(path.name) for path, seconds in zip(others, used, strict=True) if seconds > _OBSERVED_SECONDS / 15]


def _is_other_rank(process: Path, own_pids: AbstractSet[int], cores: AbstractSet[int]) -> bool:
    try:
        if process.stat().st_uid != os.geteuid():
            return False
        if not any(name.read_text() == _THREAD_OF_RANKS for name in process.glob("task/*/comm")):
            return False
        # The number that the process itself sees, in its container, as the own ones were found.
        pid = int((process / "status").read_text().partition("\nNSpid:")[2].partition("\n")[0].split()[-1])
        cpus = os.sched_getaffinity(int(process.name))
    except OSError:
        return False  # the process has ended
    shares_time = cpu_limit(f"{process}/cgroup") == cpu_limit()
    return pid not in own_pids and shares_time and not cores.isdisjoint(map(core_of, cpus))


def _cpu_seconds(process: Path) -> float:
    try:
        fields = (process / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0  # the process has ended
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# Constants from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory(environ: Mapping[str, str]) -> None:
    """Make the C library keep memory that a step frees, for the next step, instead of returning it to the system.

    Gradients and activations of more than a few MiB would be mapped again in each step, and the system zeroes every
    page of a new mapping. That costs 30% of a step that has 100 MiB of gradients and takes 0.2 s. The price is that the
    process never gets smaller again.

    Args:
        environ: Environment; DTRAIN_MALLOC=default in it leaves malloc as it is.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's
    if mallopt is None or environ.get("DTRAIN_MALLOC") == "default":
        return
    # Older versions of glibc take 32 MiB at most.
    if not mallopt(_M_MMAP_THRESHOLD, 1 << 30):
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)
    mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
