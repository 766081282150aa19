# SPDX-License-Identifier: Apache-2.0
"""The estimated differences between ranks' clocks."""

import os
import time

import torch
from ranks import on_ranks

from distributed_trainer.metrics import clock_sync
from distributed_trainer.metrics.clock_sync import ClockReadings


@on_ranks(1, 2)
def test_clock_name(world, monkeypatch):
    """All processes of a machine name one clock; without the kernel's files each process names its own."""

    def fail(path):
        raise FileNotFoundError(path)

    assert len(set(world.gather(clock_sync.clock_name()))) == 1
    monkeypatch.setattr(os, "readlink", fail)
    assert len(set(world.gather(clock_sync.clock_name()))) == world.size


@on_ranks(2, 3, (3, 2))
def test_clocks(world):
    """With simulated clocks that are ahead and run fast, the bounds hold and are no wider than a gather's duration."""
    group = world.group()
    ahead, rate = 7_000_000_000_000 * world.rank, 1 + 1e-2 * world.rank  # ns
    zero = group_start(group)

    def pretended(true):
        return int((true - zero) * rate) + ahead

    first = clock_sync.meet(group, lambda: pretended(time.perf_counter_ns()))
    times = []
    for _ in range(20):
        times.append(time.perf_counter_ns())
        time.sleep(0.005)
    second = clock_sync.meet(group, lambda: pretended(time.perf_counter_ns()))
    own = ClockReadings(f"clock {world.rank}", (first, second))
    gathered = world.gather((own, [(true - zero, pretended(true)) for true in times]))
    differences = clock_sync.compare([readings for readings, _ in gathered])
    ends = [meetings for readings, _ in gathered for meetings in readings.meetings]
    # The simulated clocks also drift during the gathers, which is negligible at the drift of real clocks.
    slack = 2e-2 * world.size * max(meetings[-1][1] - meetings[0][0] for meetings in ends)
    assert differences[0].uncertainty == 0
    for difference, (_, pairs) in zip(differences, gathered, strict=True):
        assert difference.uncertainty <= max(left - came for meetings in ends for came, left in meetings) + slack
        for true, local in pairs:
            assert abs(difference.common(local) - true) <= difference.uncertainty + slack
    shared = [readings._replace(clock="one clock") for readings, _ in gathered]
    assert all(difference.common(123) == 123 for difference in clock_sync.compare(shared))


def group_start(group):
    """Return rank 0's time on every rank, by the clock that all ranks of this machine share."""
    start = torch.tensor([time.perf_counter_ns()])
    group.broadcast([start]).wait()
    return start.item()
