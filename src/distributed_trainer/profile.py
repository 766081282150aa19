# SPDX-License-Identifier: Apache-2.0
"""A timeline of some steps of all ranks, in one file of Chrome's Trace Event Format.

Ranks note what they do, each by its own clock (`clocks.py`). At the end rank 0 gets all notes, and writes them down.
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

from .backend import gather_objects
from .clocks import ClockReadings, clock_name, compare, meet


class Life(NamedTuple):
    """A bucket in one step; times in ns."""

    number: int
    parameters: list[str]
    num_bytes: int
    first_ready: int
    """When the first of its gradients was in it, and the last; when it was started if none came."""
    last_ready: int
    started: int
    waited: int
    """When the trainer began to wait for it, and all others."""
    done: int
    """When it was reduced, or, where the process group does not tell, when the wait was over."""


@dataclass
class Recorder:
    """What this rank does while it is profiled: a `StepClock` and a `GradientSum` tell it, by perf_counter's clock."""

    begin: int
    slices: list[tuple[str, int, int]] = field(default_factory=list)
    """Phases, the steps around them and the wait within them: name, begin, end in ns."""
    lives: list[Life] = field(default_factory=list)
    _ready: dict[str, int] = field(default_factory=dict)
    _started: list[Life] = field(default_factory=list)
    _waited: int = 0

    def note(self, name: str, begin: float, end: float) -> None:
        """Takes down a phase or a step, in seconds. Local."""
        self.slices.append((name, max(self.begin, int(1e9 * begin)), int(1e9 * end)))

    def gradient_ready(self, name: str) -> None:
        """The parameter's gradient is in its bucket, or will be copied there as it is. Local."""
        self._ready[name] = time.perf_counter_ns()

    def bucket_started(self, number: int, parameters: list[str], num_bytes: int) -> None:
        """The bucket is about to be started. Local."""
        now = time.perf_counter_ns()
        if number == 0:
            self._started.clear()  # what a step left that failed
        ready = [self._ready[name] for name in parameters if name in self._ready] or [now]
        self._started.append(Life(number, parameters, num_bytes, min(ready), max(ready), now, 0, 0))

    def wait_began(self) -> None:
        """All buckets have been started. Local."""
        self._ready.clear()
        self._waited = time.perf_counter_ns()

    def wait_ended(self, done: Sequence[int | None]) -> None:
        """All buckets are reduced. Local.

        Args:
            done: For each bucket by its number, when it was; None if that is not known.
        """
        now = time.perf_counter_ns()
        self.slices.append(("wait", self._waited, now))
        self.lives += [life._replace(waited=self._waited, done=done[life.number] or now) for life in self._started]
        self._started.clear()


@dataclass
class Track:
    """What a rank tells of itself at the end."""

    host: str
    clock: ClockReadings
    slices: list[tuple[str, int, int]]
    lives: list[Life]


@contextlib.contextmanager
def profile(path: str | os.PathLike[str], group: Any, sources: Sequence[Any]) -> Iterator[None]:
    """`DistributedTrainer.profile`. Collective over the group at both ends, where it blocks.

    Args:
        path: Of the file, on rank 0.
        group: A process group.
        sources: What has a `recorder` to tell while it is not None.
    """
    path = Path(path)
    if any(source.recorder is not None for source in sources):
        raise ValueError("profile() inside of profile(): end the one before you begin the next")
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
    """The file: for each rank a process, with a thread for the phases of its steps and one for each bucket.

    Perfetto knows threads by their numbers alone, wants whole microseconds where slices meet, and leaves out what is
    before 0.
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
    """Metadata of a process or thread: its name, and where among the others it is shown."""
    return [
        {"name": f"{kind}_name", "ph": "M", **where, "args": {"name": name}},
        {"name": f"{kind}_sort_index", "ph": "M", **where, "args": {"sort_index": place}},
    ]


def _check_writable(path: Path) -> None:
    """Raises OSError if the file cannot be written; one that is there stays as it is."""
    is_new = not path.exists()
    with path.open("ab"):
        pass
    if is_new:
        path.unlink()


def _on_rank_0(group: Any, work: Callable[[], Any]) -> None:
    """Does what may raise OSError on rank 0, and raises that on every rank. Collective, blocks."""
    error = None
    if group.rank() == 0:
        try:
            work()
        except OSError as caught:
            text = f"rank 0 on {socket.gethostname()} cannot write the timeline: {caught.strerror}"
            error = OSError(caught.errno, text, caught.filename)
    error = gather_objects(group, error)[0]
    if error is not None:
        raise error
