# SPDX-License-Identifier: Apache-2.0
"""Gather facts on the ranks of `distributed-trainer check`: what each rank has, what ranks share, how fast they are."""

from __future__ import annotations

import glob
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ..backend.gather import gather_objects
from ..backend.job import Job
from ..backend.process_group import ProcessGroupShmpi
from ..launch import devices, mpi_library
from ..launch.host_facts import core_of, cpu_limit, host_facts
from ..launch.launcher import Launcher, cpus_of_launcher, find_launcher_process

_BYTES = 25 << 20  # about the size of a bucket of gradients
_TARGET_SECONDS = 0.3  # for one measured call over a network

# Names of shared-memory files of Open MPI 5 and 4, MPICH and Intel MPI.
_SEGMENTS = ("sm_segment.*", "vader_segment.*", "osc_sm*", "mpich_shm*", "Intel_MPI_*", "shm-col-space-*")


def gather_facts(job: Job, launcher: Launcher, is_apart: bool) -> list[dict[str, Any]]:
    """Gather the facts of each rank, by rank. Collective, blocks.

    Args:
        job: Job of all ranks.
        launcher: Launcher that started the ranks.
        is_apart: `mpi_environment.is_apart` of this rank.
    """
    mpi = mpi_library.loaded_mpi()
    assert mpi is not None
    cores = [set(job.engine.cores_of(rank)) for rank in job.local_ranks]
    threads = devices.fit_threads(cores, job.local_rank, os.environ, cpus_of_launcher(launcher))
    pid = find_launcher_process(launcher)
    facts = host_facts(mpi.path, mpi.family, [], None) | {
        "rank": job.rank,
        "node": job.node_of_rank[job.rank],
        "core_ids": sorted({core_of(cpu) for cpu in os.sched_getaffinity(0)}),
        "cpu_limit": cpu_limit(),
        "threads": torch.get_num_threads(),
        "binding": threads.warning,
        "device": str(job.device),
        "gpu": torch.cuda.get_device_name(job.device) if job.device.type == "cuda" else None,
        "has_gpu_driver": bool(glob.glob("/dev/nvidia[0-9]*") or glob.glob("/dev/kfd")),
        "is_apart": is_apart,
        "network": os.readlink("/proc/self/ns/net"),
        "launcher": os.readlink(f"/proc/{pid}/exe") if pid else None,
        "kernels": job.module.kernel_isa(),
        "family": mpi.family,
    }
    # A rank that does not see other processes can't know which files they use.
    facts["leftovers"] = [] if is_apart else _leftovers()
    return gather_objects(job.create_group(), facts)


def _leftovers() -> list[str]:
    """Return files of this user's MPI jobs in /dev/shm that no process has mapped."""
    files = {file for pattern in _SEGMENTS for file in glob.glob(f"/dev/shm/{pattern}")}
    files = {file for file in files if os.access(file, os.W_OK)}
    if files:
        for maps in Path("/proc").glob("[0-9]*/maps"):
            try:
                text = maps.read_text()
            except OSError:
                continue  # the process has ended, or is of another user, who can't map files of this user alone
            files = {file for file in files if file not in text}
    return sorted(files)


def measure(job: Job) -> dict[str, Any]:
    """Time all_reduce within each machine and over all ranks, and the fastest possible time of each.

    Collective, blocks.

    Returns:
        Measurements "inside" and "between" machines, None for what does not exist; seconds are of the slowest rank.
    """
    world = job.create_group()
    nodes = [[r for r, node in enumerate(job.node_of_rank) if node == n] for n in range(max(job.node_of_rank) + 1)]
    return {
        "inside": _measure_inside(job, world) if max(map(len, nodes)) > 1 else None,
        "between": _measure_between(job, world, nodes) if len(nodes) > 1 else None,
    }


def _measure_inside(job: Job, world: ProcessGroupShmpi) -> dict[str, Any]:
    group = job.create_group(job.local_ranks)
    bucket = group.allocate(_BYTES).view(torch.float32)
    other = torch.empty_like(bucket)
    return {
        "bytes": _BYTES,
        "seconds": _time(world, lambda: group.allreduce([bucket]).wait()),
        "copy_seconds": _time(world, lambda: other.copy_(bucket)),
    }


def _measure_between(job: Job, world: ProcessGroupShmpi, nodes: list[list[int]]) -> dict[str, Any]:
    """Time all_reduce between machines, and the network alone: each machine sends to the next, and receives as much.

    On each machine as many ranks send as the machine with the fewest ranks has.
    """
    num_senders = min(map(len, nodes))
    own = job.node_of_rank[job.rank]
    place = nodes[own].index(job.rank)
    bucket = world.allocate(_BYTES).view(torch.float32)
    incoming = torch.empty(_BYTES // 4)

    def exchange(num_bytes: int) -> None:
        if place < num_senders:
            count = num_bytes // 4 // num_senders
            sent = world.send([bucket[:count]], nodes[(own + 1) % len(nodes)][place], 0)
            world.recv([incoming[:count]], nodes[own - 1][place], 0).wait()
            sent.wait()

    exchange(1 << 20)  # makes the connections
    first = _time(world, lambda: exchange(1 << 20), 1)
    num_bytes = max(1 << 20, min(_BYTES, int((1 << 20) * _TARGET_SECONDS / first) >> 20 << 20))
    wire = _time(world, lambda: exchange(num_bytes))
    before = _bytes_sent()
    seconds = _time(world, lambda: world.allreduce([bucket[: num_bytes // 4]]).wait())
    sent = {name: count - before.get(name, 0) for name, count in _bytes_sent().items()}
    carried = {name for name, count in sent.items() if count > num_bytes // 10}
    return {
        "bytes": num_bytes,
        "seconds": seconds,
        # On each machine all_reduce sends and receives this multiple of the buffer, the exchange once the buffer.
        "wire_seconds": wire * 2 * (len(nodes) - 1) / len(nodes),
        "wire_bytes_per_second": num_bytes / wire,
        "interfaces": sorted(set().union(*gather_objects(world, carried))),
    }


def _time(world: ProcessGroupShmpi, call: Callable[[], object], repeats: int = 5) -> float:
    """Return the median, over repeated calls, of the slowest rank's time in seconds. Collective, blocks."""
    times = []
    for _ in range(repeats):
        world.barrier().wait()
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    slowest: list[float] = [max(row) for row in zip(*gather_objects(world, times), strict=True)]
    return median(slowest)


def _bytes_sent() -> dict[str, int]:
    """Return the bytes sent so far by each network interface of this machine or container, without the loopback."""
    sent = {}
    for line in Path("/proc/net/dev").read_text().splitlines()[2:]:
        name, _, numbers = line.partition(":")
        if name.strip() != "lo":
            sent[name.strip()] = int(numbers.split()[8])
    for counter in Path("/sys/class/infiniband").glob("*/ports/*/counters/port_xmit_data"):
        sent[counter.parts[4]] = sent.get(counter.parts[4], 0) + 4 * int(counter.read_text())  # counts 4 bytes as 1
    return sent
