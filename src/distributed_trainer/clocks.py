# SPDX-License-Identifier: Apache-2.0
"""How far the ranks' clocks are apart: those that time.perf_counter_ns() reads.

Ranks of one machine share a clock. For the others all ranks meet before and after what is to be compared, in gathers:
nobody leaves one before everybody has come. So in true time each rank's leaving is after each other's coming, which
bounds how far two clocks are apart. The middle of the bounds is taken, and between the meetings a clock is taken to
drift evenly.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .backend import gather_bytes

_NUM_MEETINGS = 10  # before, and after; the bounds are those of the closest
Meetings = list[tuple[int, int]]  # when a rank came and left, by its clock in ns


class ClockReadings(NamedTuple):
    """What a rank knows of its clock."""

    clock: str
    """Ranks whose clock has the same name share it."""
    meetings: tuple[Meetings, Meetings]
    """Before and after."""


class ClockDifference(NamedTuple):
    """How a clock differs from rank 0's."""

    at: int
    """A time by this clock, in ns."""
    ahead: float
    """How far it was ahead then, in ns."""
    drift: float
    """How much that grows in a ns."""
    uncertainty: float
    """By how many ns `common` may be wrong."""

    def common(self, when: int) -> int:
        """That time by rank 0's clock."""
        return when - round(self.ahead + self.drift * (when - self.at))


def meet(group: Any, now: Callable[[], int] = time.perf_counter_ns) -> Meetings:
    """Comes together with all ranks, several times. Collective, blocks."""
    meetings = []
    for _ in range(_NUM_MEETINGS if group.size() > 1 else 1):
        came = now()
        gather_bytes(group, b"\0")
        meetings.append((came, now()))
    return meetings


def compare(readings: Sequence[ClockReadings]) -> list[ClockDifference]:
    """The difference of each rank's clock."""
    # [ranks, before and after, meetings, came and left]
    times = np.array([reading.meetings for reading in readings], dtype=np.int64)
    names = [reading.clock for reading in readings]
    # Of the ranks that share a clock, the last that came and the first that left say most.
    came = {name: times[[other == name for other in names], ..., 0].max(0) for name in names}
    left = {name: times[[other == name for other in names], ..., 1].min(0) for name in names}
    differences = []
    for name in names:
        low, high = (came[name] - left[names[0]]).max(1), (left[name] - came[names[0]]).min(1)
        if name == names[0]:
            low = high = np.zeros(2)
        (first, last), (before, after) = came[name][:, 0].tolist(), ((low + high) / 2).tolist()
        uncertainty = float((high - low).max() / 2)
        differences.append(ClockDifference(first, before, (after - before) / (last - first), uncertainty))
    return differences


def clock_name() -> str:
    """The kernel's boot and time namespace, which have one monotonic clock; else this process has its own."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text() + os.readlink("/proc/self/ns/time")
    except OSError:
        return f"{socket.gethostname()} {os.getpid()}"
