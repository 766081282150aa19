# SPDX-License-Identifier: Apache-2.0
"""Estimate how far the ranks' clocks differ: the clocks that time.perf_counter_ns() reads.

Ranks of one machine share a clock. To compare the clocks of different machines, all ranks take part in some gathers
before and after the time of interest. No rank leaves a gather before all ranks have arrived. So in true time each
rank's leaving is later than every other rank's arrival, which bounds the difference of two clocks. The estimate is the
middle of the bounds, and assumes that between the two series of gathers a clock drifts evenly.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..backend.gather import gather_bytes

_NUM_MEETINGS = 10  # gathers before, and as many after; the one with the closest bounds counts
Meetings = list[tuple[int, int]]  # times in ns, by a rank's own clock, at which it arrived at each gather and left it


class ClockReadings(NamedTuple):
    """Readings of one rank's clock at the gathers."""

    clock: str
    """Name of the clock; ranks with the same name share a clock."""
    meetings: tuple[Meetings, Meetings]
    """Readings at the gathers before the time of interest, and at those after it."""


class ClockDifference(NamedTuple):
    """Difference between a rank's clock and rank 0's."""

    at: int
    """Time by this clock, in ns, at which `ahead` holds."""
    ahead: float
    """Time in ns by which this clock was ahead of rank 0's at `at`."""
    drift: float
    """Growth of `ahead`, in ns per ns."""
    uncertainty: float
    """Largest error of `common`, in ns."""

    def common(self, when: int) -> int:
        """Convert a time by this clock to one by rank 0's clock; both in ns."""
        return when - round(self.ahead + self.drift * (when - self.at))


def meet(group: Any, now: Callable[[], int] = time.perf_counter_ns) -> Meetings:
    """Take part in several gathers with all ranks, and return when each began and ended here. Collective, blocks."""
    meetings = []
    for _ in range(_NUM_MEETINGS if group.size() > 1 else 1):
        arrived = now()
        gather_bytes(group, b"\0")
        meetings.append((arrived, now()))
    return meetings


def compare(readings: Sequence[ClockReadings]) -> list[ClockDifference]:
    """Return the difference of each rank's clock from rank 0's, by rank. Local."""
    # [ranks, before and after, meetings, arrived and left]
    times = np.array([reading.meetings for reading in readings], dtype=np.int64)
    names = [reading.clock for reading in readings]
    # Among ranks that share a clock, the last one to arrive and the first one to leave give the closest bounds.
    arrived = {name: times[[other == name for other in names], ..., 0].max(0) for name in names}
    left = {name: times[[other == name for other in names], ..., 1].min(0) for name in names}
    differences = []
    for name in names:
        low, high = (arrived[name] - left[names[0]]).max(1), (left[name] - arrived[names[0]]).min(1)
        if name == names[0]:
            low = high = np.zeros(2)
        (first, last), (before, after) = arrived[name][:, 0].tolist(), ((low + high) / 2).tolist()
        uncertainty = float((high - low).max() / 2)
        differences.append(ClockDifference(first, before, (after - before) / (last - first), uncertainty))
    return differences


def clock_name() -> str:
    """Name this process's clock: processes of one boot and one time namespace share it, and share its name. Local.

    If the system does not say which these are, the name is this process's alone.
    """
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text() + os.readlink("/proc/self/ns/time")
    except OSError:
        return f"{socket.gethostname()} {os.getpid()}"
