# SPDX-License-Identifier: Apache-2.0
"""What rank 0 tells of a training in progress: a bar or lines, and figures for TensorBoard and its like."""

from __future__ import annotations

import importlib.util
import struct
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from .backend import gather_bytes

_SECONDS_BETWEEN_LINES = 10.0
_TIMES = struct.Struct("<dd")  # of a step: what a rank took by itself, and what it waited


class Reporter:
    """Knows the last step, and whom to tell.

    Attributes:
        loss: Of the last one.
    """

    def __init__(self, group: Any) -> None:
        self.loss: float | None = None
        self._group = group
        self._writers: list[tuple[Any, int]] = []
        self._num_samples = 0.0

    def rejoin(self, group: Any) -> None:
        """Goes on among other ranks. Local."""
        self._group = group

    def add(self, writer: Any, every: int) -> None:
        """Has a writer told of every `every`th step. The same on every rank, of which only rank 0 writes."""
        self._writers.append((writer, every))

    def note(
        self, step: int, loss: float, num_samples: float, own: float, waited: float, figures: dict[str, Any]
    ) -> None:
        """Takes down a step. Collective if there are writers.

        Args:
            step: Its number, from 1.
            loss: Of the global batch.
            num_samples: This rank's share of it.
            own: Seconds that this rank took by itself.
            waited: Seconds that it waited for others and for the exchange.
            figures: Others to write; those that are None are not there.
        """
        self.loss = loss
        self._num_samples += num_samples * self._group.size()
        due = [writer for writer, every in self._writers if step % every == 0]
        if not due:
            return
        times = [_TIMES.unpack(row) for row in gather_bytes(self._group, _TIMES.pack(own, waited))]
        if self._group.rank() != 0:
            return
        total = own + waited
        figures = {
            "loss": loss,
            **{name: float(value) for name, value in figures.items() if value is not None},
            "samples_per_second": num_samples * self._group.size() / total,
            "share_waited": waited / total,
            "slowest_rank": float(max(range(len(times)), key=lambda rank: times[rank][0])),
        }
        for writer in due:
            write(writer, figures, step)

    def log(self, figures: dict[str, float], step: int) -> None:
        """Gives the user's own figures to all writers, on rank 0. Local."""
        if self._group.rank() == 0:
            for writer, _ in self._writers:
                write(writer, figures, step)

    def progress(self, batches: Iterable[Any], description: str) -> Iterator[Any]:
        """The batches; rank 0 shows how far they are. Local."""
        if self._group.rank() != 0:
            yield from batches
        elif sys.stderr.isatty() and importlib.util.find_spec("tqdm") is not None:
            yield from self._bar(batches, description)
        else:
            yield from self._lines(batches, description, lambda line: print(line, file=sys.stderr, flush=True))

    def _bar(self, batches: Iterable[Any], description: str) -> Iterator[Any]:
        from tqdm import tqdm

        start, before = time.monotonic(), self._num_samples
        with tqdm(batches, desc=description or None) as bar:
            for batch in bar:
                yield batch
                if self.loss is not None:
                    rate = (self._num_samples - before) / (time.monotonic() - start)
                    bar.set_postfix_str(f"loss {self.loss:.4g}, {rate:.0f} samples/s", refresh=False)

    def _lines(self, batches: Iterable[Any], description: str, say: Callable[[str], None]) -> Iterator[Any]:
        """A line every ten seconds, and one at the end."""
        total = _length(batches)
        start, before, said, number = time.monotonic(), self._num_samples, time.monotonic(), 0

        def line() -> str:
            seconds = time.monotonic() - start
            parts = [f"{number} of {total} batches" if total is not None else f"{number} batches"]
            if self.loss is not None:
                parts.append(f"loss {self.loss:.4g}")
            parts.append(f"{(self._num_samples - before) / seconds:.0f} samples/s")
            if total is not None and number:
                parts.append(f"{seconds / number * (total - number):.0f} s left")
            return f"{description}: {', '.join(parts)}" if description else ", ".join(parts)

        for batch in batches:
            yield batch
            number += 1
            if time.monotonic() - said >= _SECONDS_BETWEEN_LINES:
                said = time.monotonic()
                say(line())
        if number:
            say(line())


def _length(batches: Iterable[Any]) -> int | None:
    try:
        return len(batches)  # type: ignore[arg-type]
    except TypeError:  # a generator, or a loader of an iterable dataset
        return None


def write(writer: Any, figures: dict[str, float], step: int) -> None:
    """Gives figures to torch's SummaryWriter, or to anything with log(dict, step)."""
    if hasattr(writer, "add_scalar"):
        for name, value in figures.items():
            writer.add_scalar(name, value, step)
    else:
        writer.log(figures, step)


def check_writer(writer: Any, every: Any) -> None:
    """Raises TypeError or ValueError for what is no writer. Local."""
    if not (hasattr(writer, "add_scalar") or callable(getattr(writer, "log", None))):
        raise TypeError(
            f"a writer has add_scalar(name, value, step), as torch.utils.tensorboard.SummaryWriter has, or "
            f"log(dict, step); this is a {type(writer).__name__}"
        )
    if not isinstance(every, int) or isinstance(every, bool) or every < 1:
        raise ValueError(f"every must be an int of at least 1, not {every!r}")
