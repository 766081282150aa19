# SPDX-License-Identifier: Apache-2.0
"""Where the time of training steps goes, on each rank and between them.

A rank notes when each phase of a step ends. Ranks meet twice in a step: where they compare the batch, and where they
sum gradients. So a slow rank makes all others wait there, and what the phases before took tells which rank it was, and
why. Of the exchange itself, what the rank that waited least took is its price; more than that is waiting for others.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from .backend import gather_objects

if TYPE_CHECKING:
    from .profile import Recorder

PHASES = ("data", "agreement", "forward", "backward", "exchange", "optimizer")
AGREEMENT, FORWARD, BACKWARD, EXCHANGE, OPTIMIZER = range(1, len(PHASES))
_OWN = ("data", "forward", "backward", "optimizer")  # which no other rank can prolong
_NUM_KEPT_STEPS = 1000


class StepClock:
    """The last steps of this rank: seconds of each phase, and samples.

    Attributes:
        recorder: Is told when they begin and end, unless it is None.
    """

    def __init__(self) -> None:
        self.num_steps = 0
        self.recorder: Recorder | None = None
        self._rows: deque[list[float]] = deque(maxlen=_NUM_KEPT_STEPS)
        self._row: list[float] = []
        self._since: float | None = None
        self._began = 0.0

    def start(self, num_samples: float) -> None:
        """Begins a step, of this rank's share of the samples. The time since the last one was spent on data. Local."""
        now = time.perf_counter()
        self._row = [0.0] * len(PHASES) + [float(num_samples)]
        self._began = now if self._since is None else self._since
        self._row[0] = now - self._began
        if self.recorder is not None:
            self.recorder.note(PHASES[0], self._began, now)
        self._since = now

    def skip(self) -> None:
        """Leaves out the time since the last step. Local."""
        self._since = time.perf_counter()

    def mark(self, phase: int) -> None:
        """Ends a phase, by its number in PHASES, at whose end the next begins. Local."""
        now = time.perf_counter()
        self._row[phase] += now - self._since
        if self.recorder is not None:
            self.recorder.note(PHASES[phase], self._since, now)
        self._since = now

    def computed(self) -> float:
        """Seconds of forward and backward in this step so far. Local."""
        return self._row[FORWARD] + self._row[BACKWARD]

    def end(self) -> tuple[float, float]:
        """Ends the step. Local.

        Returns:
            The seconds that this rank took by itself, and those that it spent where ranks meet.
        """
        self._rows.append(self._row)
        self.num_steps += 1
        if self.recorder is not None:
            self.recorder.note(f"step {self.num_steps}", self._began, self._since)
        waited = self._row[AGREEMENT] + self._row[EXCHANGE]
        return sum(self._row[: len(PHASES)]) - waited, waited

    def rows(self) -> np.ndarray:
        """The steps that are kept, [steps, phases and samples], but for the first, which has no data time."""
        rows = np.array(self._rows, dtype=np.float64).reshape(-1, len(PHASES) + 1)
        return rows[1:] if self.num_steps == len(rows) else rows


@dataclass(frozen=True)
class Summary:
    """Where the time of the last steps went, the same on every rank. `str()` of it is for people."""

    num_steps: int
    """Of the training so far."""
    num_measured: int
    """Steps that the rest is about: the last 1000 at most, without the first."""
    samples_per_second: float
    """Of the global batch."""
    seconds: dict[str, float]
    """Of each phase, the mean over steps and ranks."""
    exchange_seconds: float
    """Of a step: what the rank that waited least spent in agreement and exchange."""
    waiting_seconds: float
    """Of a step: what the others spent there beyond that, the mean over ranks."""
    slowest_rank: int | None
    """Which came last to the exchange most often; None with one rank."""
    slowest_share: float
    """In what share of the steps."""
    slowest_phase: str | None
    """In which of data, forward, backward and optimizer it took longer than the others, by most."""
    slowest_excess_seconds: float
    """How much longer than the median of the others."""
    mebibytes: dict[str, float] = field(default_factory=dict)
    """Sent and received between machines by all ranks, since the job began."""

    def __str__(self) -> str:
        total = sum(self.seconds.values())
        lines = [
            f"{self.num_steps} steps; the last {self.num_measured} of them: {1e3 * total:.1f} ms a step, "
            f"{self.samples_per_second:.0f} samples/s"
        ]
        for phase, seconds in self.seconds.items():
            lines.append(f"  {phase:10} {1e3 * seconds:8.2f} ms  {seconds / total if total else 0:6.1%}")
        if self.slowest_rank is not None:
            lines.append(
                f"of agreement and exchange: {1e3 * self.exchange_seconds:.2f} ms themselves, "
                f"{1e3 * self.waiting_seconds:.2f} ms waiting for other ranks"
            )
            lines.append(
                f"last to the exchange: rank {self.slowest_rank} in {self.slowest_share:.0%} of the steps; its "
                f"{self.slowest_phase} took {1e3 * self.slowest_excess_seconds:.1f} ms longer than others'"
            )
        if self.mebibytes:
            moved = ", ".join(f"{number:.0f} MiB {what}" for what, number in self.mebibytes.items())
            lines.append(f"between machines: {moved}")
        return "\n".join(lines)


def summarise(clock: StepClock, counters: dict[str, int], group: Any) -> Summary:
    """What all ranks' clocks and counters tell. Collective, blocks."""
    gathered = gather_objects(group, (clock.num_steps, clock.rows(), counters))
    length = min(len(rows) for _, rows, _ in gathered)
    steps = np.stack([rows[len(rows) - length :] for _, rows, _ in gathered])  # [ranks, steps, phases and samples]
    seconds, samples = steps[..., :-1], steps[..., -1]
    mean = seconds.mean((0, 1)) if length else np.zeros(len(PHASES))
    own = seconds[..., [PHASES.index(phase) for phase in _OWN]]
    waits = seconds[..., PHASES.index("agreement")] + seconds[..., PHASES.index("exchange")]
    slowest, share, phase, excess = None, 0.0, None, 0.0
    if len(gathered) > 1 and length:
        (slowest, count), *_ = Counter(own.sum(-1).argmax(0).tolist()).most_common(1)
        share = count / length
        others = np.delete(own, slowest, 0)
        differences = np.median(own[slowest], 0) - np.median(others, (0, 1))
        phase, excess = _OWN[int(differences.argmax())], float(differences.max())
    total = float(mean.sum())
    sums = {
        what: sum(counts.get(f"bytes_{what}", 0) for *_, counts in gathered) / 2**20 for what in ("sent", "received")
    }
    return Summary(
        num_steps=gathered[0][0],
        num_measured=length,
        samples_per_second=float(samples.sum(0).mean()) / total if total else 0.0,
        seconds=dict(zip(PHASES, mean.tolist(), strict=True)),
        exchange_seconds=float(waits.min(0).mean()) if length else 0.0,
        waiting_seconds=float((waits - waits.min(0)).mean()) if length else 0.0,
        slowest_rank=slowest,
        slowest_share=share,
        slowest_phase=phase,
        slowest_excess_seconds=excess,
        mebibytes=sums if any(sums.values()) else {},
    )
