# SPDX-License-Identifier: Apache-2.0
"""Show a training's progress on rank 0: a bar or lines, and figures for TensorBoard or other writers."""

from __future__ import annotations

import importlib.util
import struct
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ..backend.gather import gather_bytes

_SECONDS_BETWEEN_LINES = 10.0
_STEP = struct.Struct("<ddd")  # a rank's own seconds in a step, the seconds that it waited, and its samples


class ProgressReporter:
    """Show how far a training is, and write its figures. It continues when the set of ranks changes.

    Attributes:
        loss: Loss of the last step, None before the first.
    """

    def __init__(self) -> None:
        self.loss: float | None = None
        self._writers: list[tuple[Any, int]] = []
        self._num_samples = 0.0

    def add(self, writer: Any, every: int) -> None:
        """Log every `every`-th step to `writer`, if this is rank 0. Local."""
        self._writers.append((writer, every))

    def is_due(self, step: int) -> bool:
        """Return whether a step is to be logged, if this is rank 0. Local."""
        return any(step % every == 0 for _, every in self._writers)

    def record_step(
        self,
        group: Any,
        step: int,
        loss: float,
        num_samples: float,
        own: float,
        waited: float,
        figures: dict[str, Any],
        is_logged: bool,
    ) -> None:
        """Record a step. Collective if it is logged.

        Args:
            group: Process group of the ranks.
            step: Number of the step, from 1.
            loss: Loss of the global batch.
            num_samples: Number of samples of this rank.
            own: Seconds of the step in which this rank did not wait.
            waited: Seconds in which this rank waited for other ranks and for the exchange.
            figures: Further figures to write; those that are None are left out.
            is_logged: Whether rank 0 logs the step; the same on every rank.
        """
        self.loss = loss
        self._num_samples += num_samples * group.size()
        if not is_logged:
            return
        rows = [_STEP.unpack(row) for row in gather_bytes(group, _STEP.pack(own, waited, num_samples))]
        if group.rank() != 0:
            return
        total = own + waited
        figures = {
            "loss": loss,
            **{name: float(value) for name, value in figures.items() if value is not None},
            "samples_per_second": sum(row[2] for row in rows) / total,
            "share_waited": waited / total,
            "slowest_rank": float(max(range(len(rows)), key=lambda rank: rows[rank][0])),
        }
        for writer, every in self._writers:
            if step % every == 0:
                write(writer, figures, step)

    def log(self, figures: dict[str, float], step: int) -> None:
        """Write the user's own figures to all writers. Local, for rank 0."""
        for writer, _ in self._writers:
            write(writer, figures, step)

    def progress(self, batches: Iterable[Any], description: str, is_shown: bool) -> Iterator[Any]:
        """Yield the batches, and show how many are done if `is_shown`. Local."""
        if not is_shown:
            yield from batches
        elif sys.stderr.isatty() and importlib.util.find_spec("tqdm") is not None:
            yield from self._bar(batches, description)
        else:
            yield from self._lines(batches, description, lambda line: print(line, file=sys.stderr, flush=True))

    def _bar(self, batches: Iterable[Any], description: str) -> Iterator[Any]:
        from tqdm import tqdm  # type: ignore[import-untyped]  # an option of users, who seldom have its stubs

        start, before = time.monotonic(), self._num_samples
        with tqdm(batches, desc=description or None) as bar:
            for batch in bar:
                yield batch
                if self.loss is not None:
                    rate = (self._num_samples - before) / (time.monotonic() - start)
                    bar.set_postfix_str(f"loss {self.loss:.4g}, {rate:.0f} samples/s", refresh=False)

    def _lines(self, batches: Iterable[Any], description: str, say: Callable[[str], None]) -> Iterator[Any]:
        """Yield the batches, and report a line every ten seconds and one at the end."""
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
        return len(batches)  # type: ignore[arg-type]  # the TypeError of what has no length is caught
    except TypeError:  # a generator, or a loader of an iterable dataset
        return None


def write(writer: Any, figures: dict[str, float], step: int) -> None:
    """Write figures to an object with add_scalar(name, value, step), or else with log(dict, step). Local."""
    if _has(writer, "add_scalar"):
        for name, value in figures.items():
            writer.add_scalar(name, value, step)
    else:
        writer.log(figures, step)


def check_writer(writer: Any, every: Any) -> None:
    """Check the arguments of `ProgressReporter.add`. Local.

    Raises:
        TypeError: `writer` has neither add_scalar nor log.
        ValueError: `every` is no int of at least 1.
    """
    if not (_has(writer, "add_scalar") or _has(writer, "log")):
        raise TypeError(
            f"a writer must have add_scalar(name, value, step), like torch.utils.tensorboard.SummaryWriter, or "
            f"log(dict, step); this is a {type(writer).__name__}"
        )
    if not isinstance(every, int) or isinstance(every, bool) or every < 1:
        raise ValueError(f"every must be an int of at least 1, not {every!r}")


def _has(writer: Any, method: str) -> bool:
    """Return whether a writer has a method, its own or one that its __getattr__ finds. Local."""
    return callable(getattr(writer, method, None))
