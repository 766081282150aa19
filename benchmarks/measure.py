# SPDX-License-Identifier: Apache-2.0
"""How the benchmarks measure: contenders in turn, in one job, and medians of the slowest rank."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from mpi4py import MPI


def interleave(
    contenders: dict[str, Callable[[], object]],
    seconds: float,
    align: Callable[[], object] = MPI.COMM_WORLD.Barrier,
    turn_seconds: float = 0.02,
    warm: bool = True,
) -> dict[str, float]:
    """Median seconds of one call of each contender, of the rank where that is largest. Collective, blocks.

    Contenders take turns, so that a noisy moment meets all of them. A turn is one call that does not count, since it
    finds the caches, and the threads, of the contender before, and then calls that count.

    Args:
        contenders: What to call, by name.
        seconds: How long to go on; at least 5 rounds.
        align: Brings the ranks together before a call.
        turn_seconds: About how long a turn may be; one call at least counts.
        warm: False measures the first call of a turn as well.
    """
    world = MPI.COMM_WORLD
    times: dict[str, list[float]] = {name: [] for name in contenders}
    num_calls = {}
    for name, call in contenders.items():
        call()
        align()
        before = time.perf_counter()
        call()
        num_calls[name] = world.bcast(max(1, min(50, int(turn_seconds / (time.perf_counter() - before)))))
    started, num_rounds = time.perf_counter(), 0
    # Rank 0's clock decides for all how many rounds there are.
    while world.bcast(num_rounds < 5 or time.perf_counter() - started < seconds):
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


def report(result: dict[str, Any], line: str) -> None:
    """Prints a line on rank 0, and appends the result to the file BENCH_RESULTS, one JSON object a line."""
    if MPI.COMM_WORLD.rank != 0:
        return
    print(line, flush=True)
    if file := os.environ.get("BENCH_RESULTS"):
        with Path(file).open("a") as results:
            results.write(json.dumps(result) + "\n")
