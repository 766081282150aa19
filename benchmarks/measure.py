# SPDX-License-Identifier: Apache-2.0
"""How ranks measure: contenders take turns in one job, and figures are medians of the slowest rank."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from datetime import timedelta
from statistics import median

import torch
import torch.distributed as dist
from mpi4py import MPI

import distributed_trainer  # noqa: F401  makes the backend known


def start_groups() -> dist.ProcessGroup:
    """Start torch.distributed on `shmpi`. Collective, blocks.

    Returns:
        Another group of all ranks, on gloo.
    """
    dist.init_process_group("shmpi")
    return dist.new_group(backend="gloo", timeout=timedelta(minutes=2))


def allocate_bucket(num_bytes: int) -> torch.Tensor:
    """Allocate memory that the ranks of a machine share, like the trainer's buckets. Collective, blocks.

    Returns:
        float32 tensor of zeros, for collectives of torch's default group.
    """
    return dist.group.WORLD.allocate(num_bytes).view(torch.float32)


def interleave(
    contenders: dict[str, Callable[[], object]],
    options: argparse.Namespace,
    align: Callable[[], object] = MPI.COMM_WORLD.Barrier,
    turn_seconds: float = 0.02,
    warm: bool = True,
) -> dict[str, float]:
    """Return the median seconds of a call of each contender, on the rank where they are largest. Collective, blocks.

    Contenders take turns, so that a noisy moment affects all of them. A turn begins with a call that does not count,
    since it finds the caches and threads of the contender before; then calls follow that count.

    Args:
        contenders: Functions to measure, by name.
        options: `seconds` is how long to continue, for at least 5 rounds; with `quick` there is one short round.
        align: Function that makes all ranks continue at the same time; called before each call.
        turn_seconds: Approximate length of a turn; at least one call counts.
        warm: Whether a turn begins with a call that does not count.
    """
    world = MPI.COMM_WORLD
    times: dict[str, list[float]] = {name: [] for name in contenders}
    num_calls = {}
    for name, call in contenders.items():
        call()
        align()
        before = time.perf_counter()
        call()
        seconds = 0.0 if options.quick else turn_seconds
        num_calls[name] = world.bcast(max(1, min(50, int(seconds / (time.perf_counter() - before)))))
    started, num_rounds = time.perf_counter(), 0
    # Rank 0's clock decides how many rounds all ranks make.
    while world.bcast(
        num_rounds < 1 if options.quick else num_rounds < 5 or time.perf_counter() - started < options.seconds
    ):
        for name, call in contenders.items():
            if warm:
                call()
            for _ in range(num_calls[name]):
                align()
                before = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - before)
        num_rounds += 1
    return {name: world.allreduce(median(values), MPI.MAX) for name, values in times.items()}
