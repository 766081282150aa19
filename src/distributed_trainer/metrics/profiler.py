# SPDX-License-Identifier: Apache-2.0
"""Write a timeline of some steps of all ranks to one file in Chrome's Trace Event Format.

Each rank records what it does, by its own clock (`clock_sync.py`). At the end rank 0 gathers the records and writes
the file.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ..backend.gather import call_on_rank_0, gather_objects
from .clock_sync import ClockReadings, clock_name, compare, meet


class Life(NamedTuple):
    """A bucket's life in one step; times in ns."""

    number: int
    parameters: list[str]
    num_bytes: int
    first_ready: int
    """Time when the first gradient was in the bucket; equal to `started` if there was none."""
    last_ready: int
    """Time when the last gradient was in the bucket; equal to `started` if there was none."""
    started: int
    """Time when the bucket's reduction was started."""
    waited: int
    """Time when the trainer began to wait for all buckets."""
    done: int
    """Time when the bucket was reduced; when the wait ended if the process group does not report that time."""


@dataclass
class Recorder:
    """Record of this rank's profiled steps, by perf_counter's clock; `StepClock` and `GradientReducer` fill it."""

    begin: int
    slices: list[tuple[str, int, int]] = field(default_factory=list)
    """Name, begin and end (in ns) of each phase, of each step around them and of each wait within them."""
    lives: list[Life] = field(default_factory=list)
    _ready: dict[str, int] = field(default_factory=dict)
    _started: list[Life] = field(default_factory=list)
    _waited: int = 0

    def add_slice(self, name: str, begin: float, end: float) -> None:
        """Record a phase or a step, whose times are in seconds. Local."""
        self.slices.append((name, max(self.begin, int(1e9 * begin)), int(1e9 * end)))

    def gradient_ready(self, name: str) -> None:
        """Record that a parameter's gradient is in its bucket, or will be copied there unchanged. Local."""
        self._ready[name] = time.perf_counter_ns()

    def bucket_started(self, number: int, parameters: list[str], num_bytes: int) -> None:
        """Record that a bucket is about to be started. Local."""
        now = time.perf_counter_ns()
        if number == 0:
            self._started.clear()  # buckets of a step that failed
        ready = [self._ready[name] for name in parameters if name in self._ready] or [now]
        self._started.append(Life(number, parameters, num_bytes, min(ready), max(ready), now, 0, 0))

    def wait_began(self) -> None:
        """Record that all buckets have been started. Local."""
        self._ready.clear()
        self._waited = time.perf_counter_ns()

    def wait_ended(self, done: Sequence[int | None]) -> None:
        """Record that all buckets are reduced. Local.

        Args:
            done: Time in ns when each bucket was reduced, by its number; None if that is not known.
        """
        now = time.perf_counter_ns()
        self.slices.append(("wait", self._waited, now))
        self.lives += [life._replace(waited=self._waited, done=done[life.number] or now) for life in self._started]
        self._started.clear()


@dataclass
class Track:
    """Record of one rank, which rank 0 gathers at the end."""

    host: str
    clock: ClockReadings
    slices: list[tuple[str, int, int]]
    lives: list[Life]


@contextlib.contextmanager
def profile(path: str | os.PathLike[str], group: Any, sources: Sequence[Any]) -> Iterator[None]:
    """Profile the steps inside the context, for `DistributedTrainer.profile`. Collective and blocking at both ends.

    Args:
        path: Path of the file, on rank 0.
        group: Process group of the ranks.
        sources: Objects with an attribute `recorder`. They record into it while it is not None.

    Raises:
        ValueError: Another profile() is active, or there was no step in the context.
        OSError: Rank 0 cannot write the file. The same on every rank.
    """
    path = Path(path)
    if any(source.recorder is not None for source in sources):
        raise ValueError("profile() was called inside of profile(): end the first before you begin another")
    _on_rank_0(group, lambda: _check_writable(path))
    first = meet(group)
    recorder = Recorder(time.perf_counter_ns())
    for source in sources:
        source.recorder = recorder
    try:
        yield
    finally:
        for source in sources:
            source.recorder = None
    clock = ClockReadings(clock_name(), (first, meet(group)))
    tracks = gather_objects(group, Track(socket.gethostname(), clock, recorder.slices, recorder.lives))
    if not any(track.slices for track in tracks):
        raise ValueError("there was no step inside `with trainer.profile(...):`, so no file was written")
    _on_rank_0(group, lambda: path.write_text(json.dumps(timeline(tracks), separators=(",", ":"))))


def timeline(tracks: Sequence[Track]) -> dict[str, Any]:
    """Make the file's contents: a process for each rank, with a thread for its phases and one for each bucket. Local.

    Perfetto identifies threads by their numbers alone, requires whole microseconds where slices meet, and leaves out
    events before time 0.
    """
    differences = compare([track.clock for track in tracks])
    times = [
        when
        for track, difference in zip(tracks, differences, strict=True)
        for when in map(difference.common, _begins(track))
    ]
    start, threads = min(times), itertools.count(len(tracks) + 1)
    events: list[dict[str, Any]] = []
    for rank, (track, difference) in enumerate(zip(tracks, differences, strict=True)):
        process = rank + 1
        name = f"rank {rank} on {track.host}"
        if difference.uncertainty:
            name += f" (clock within {difference.uncertainty / 1e3:.0f} us)"
        events += _names("process", name, rank, pid=process)
        rows: dict[int, list[Any]] = {process: [(*one, {}) for one in track.slices]}
        events += _names("thread", "steps", -1, pid=process, tid=process)
        thread_of_bucket = {number: next(threads) for number in sorted({life.number for life in track.lives})}
        for number, thread in thread_of_bucket.items():
            events += _names("thread", f"bucket {number:02}", number, pid=process, tid=thread)
            rows[thread] = [one for life in track.lives if life.number == number for one in _stages(life)]
        for thread, row in rows.items():
            for slice_name, begin, end, arguments in sorted(row, key=lambda one: (one[1], -one[2])):
                since, until = ((difference.common(when) - start) // 1000 for when in (begin, end))
                event = {"name": slice_name, "ph": "X", "ts": since, "dur": until - since}
                events.append({**event, "pid": process, "tid": thread, "args": arguments})
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _begins(track: Track) -> Iterator[int]:
    yield from (begin for _, begin, _ in track.slices)
    yield from (life.first_ready for life in track.lives)


def _stages(life: Life) -> Iterator[tuple[str, int, int, dict[str, Any]]]:
    contents = {"parameters": life.parameters, "bytes": life.num_bytes}
    yield f"bucket {life.number:02}", life.first_ready, life.done, contents
    times = {
        "fill": (life.first_ready, life.last_ready),
        "hold": (life.last_ready, life.started),
        "reduce": (life.started, life.done),
        "wait": (life.waited, life.done),
    }
    yield from ((name, begin, end, {}) for name, (begin, end) in times.items() if begin < end)


def _names(kind: str, name: str, place: int, **where: int) -> list[dict[str, Any]]:
    """Return metadata events of a process or thread: its name, and its place in the order of display."""
    return [
        {"name": f"{kind}_name", "ph": "M", **where, "args": {"name": name}},
        {"name": f"{kind}_sort_index", "ph": "M", **where, "args": {"sort_index": place}},
    ]


def _check_writable(path: Path) -> None:
    """Raise OSError if the file cannot be written; leave an existing file as it is."""
    is_new = not path.exists()
    with path.open("ab"):
        pass
    if is_new:
        path.unlink()


def _on_rank_0(group: Any, write: Callable[[], object]) -> None:
    """Call `write` on rank 0; raise its OSError on every rank. Collective, blocks."""

    def write_or_explain() -> None:
        try:
            write()
        except OSError as error:
            text = f"rank 0 on {socket.gethostname()} cannot write the timeline: {error.strerror}"
            raise OSError(error.errno, text, error.filename) from None

    call_on_rank_0(group, write_or_explain, keep=(OSError,))
