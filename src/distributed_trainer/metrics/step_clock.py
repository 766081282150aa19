# SPDX-License-Identifier: Apache-2.0
"""Measure where the time of training steps goes, on each rank and between ranks.

Each rank records when each phase of a step ends. Ranks meet twice in a step: where they compare the batch, and where
they sum gradients. A slow rank makes all others wait there; the durations of the phases before show which rank it was,
and why. The cost of the exchange itself is the time of the rank that waited least; more than that is waiting for other
ranks.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ..backend.gather import gather_objects

if TYPE_CHECKING:
    from .profiler import Recorder

PHASES = ("data", "agreement", "forward", "backward", "exchange", "optimizer")
AGREEMENT, FORWARD, BACKWARD, EXCHANGE, OPTIMIZER = range(1, len(PHASES))
_OWN = ("data", "forward", "backward", "optimizer")  # phases that no other rank can prolong
_NUM_KEPT_STEPS = 1000


class StepClock:
    """Seconds of each phase, and number of samples, of this rank's last steps.

    Attributes:
        recorder: Recorder that also gets the begin and end of phases and steps; None without a profile.
    """

    def __init__(self) -> None:
        self.num_steps = 0
        self.recorder: Recorder | None = None
        self._rows: deque[list[float]] = deque(maxlen=_NUM_KEPT_STEPS)
        self._row: list[float] = []
        self._since: float | None = None
        self._began = 0.0

    def start(self) -> None:
        """Begin a step; the time since the last one counts as the phase "data". Local."""
        now = time.perf_counter()
        self._row = [0.0] * (len(PHASES) + 1)
        self._began = now if self._since is None else self._since
        self._row[0] = now - self._began
        if self.recorder is not None:
            self.recorder.add_slice(PHASES[0], self._began, now)
        self._since = now

    def skip(self) -> None:
        """Leave out the time since the last step. Local."""
        self._since = time.perf_counter()

    def mark(self, phase: int) -> None:
        """End a phase, given by its number in PHASES; the next phase begins now. Local."""
        now = time.perf_counter()
        assert self._since is not None, "mark() before start()"
        self._row[phase] += now - self._since
        if self.recorder is not None:
            self.recorder.add_slice(PHASES[phase], self._since, now)
        self._since = now

    def computed(self) -> float:
        """Return the seconds of forward and backward in this step so far. Local."""
        return self._row[FORWARD] + self._row[BACKWARD]

    def end(self, num_samples: float) -> tuple[float, float]:
        """End the step. Local.

        Args:
            num_samples: Number of samples of this rank in the step.

        Returns:
            Seconds of this rank in phases without other ranks, and seconds in phases where ranks meet.
        """
        self._row[-1] = float(num_samples)
        self._rows.append(self._row)
        self.num_steps += 1
        if self.recorder is not None and self._since is not None:
            self.recorder.add_slice(f"step {self.num_steps}", self._began, self._since)
        waited = self._row[AGREEMENT] + self._row[EXCHANGE]
        return sum(self._row[: len(PHASES)]) - waited, waited

    def rows(self) -> np.ndarray:
        """Return the steps that are kept, [steps, phases and samples], without the first, which has no time for data.

        Local.
        """
        rows = np.array(self._rows, dtype=np.float64).reshape(-1, len(PHASES) + 1)
        return rows[1:] if self.num_steps == len(rows) else rows


@dataclass(frozen=True)
class Summary:
    """Times of the last steps, the same on every rank. `str()` formats it as a table.

    The phases of a step are "data", "agreement", "forward", "backward", "exchange" and "optimizer"; see
    `DistributedTrainer.summary`.

    Attributes:
        num_steps: Number of steps of the training so far.
        num_measured: Number of steps that the other fields describe: the last 1000 at most, without the first.
        samples_per_second: Samples of the global batch per second.
        seconds: Seconds per step of each phase, by its name: the mean over steps and ranks.
        exchange_seconds: Seconds per step that the rank that waited least spent in agreement and exchange.
        waiting_seconds: Seconds per step that ranks spent there beyond `exchange_seconds`, the mean over ranks.
        slowest_rank: Rank that most often arrived last at the exchange; None with one rank, and before the second step.
        slowest_share: Fraction of the steps in which `slowest_rank` arrived last.
        slowest_phase: Phase in which `slowest_rank` lost most time to the others: data, forward, backward or optimizer.
        slowest_excess_seconds: Seconds per step by which `slowest_rank` took longer in `slowest_phase` than the others,
            by medians.
        mebibytes: MiB that all ranks have "sent" and "received" between machines since the job began; empty if none.
    """

    num_steps: int
    num_measured: int
    samples_per_second: float
    seconds: dict[str, float]
    exchange_seconds: float
    waiting_seconds: float
    slowest_rank: int | None
    slowest_share: float
    slowest_phase: str | None
    slowest_excess_seconds: float
    mebibytes: dict[str, float] = field(default_factory=dict)

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
                f"agreement and exchange: {1e3 * self.exchange_seconds:.2f} ms themselves, "
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
    """Make a summary of the clocks and counters of all ranks. Collective, blocks.

    Args:
        clock: This rank's clock.
        counters: `Engine.counters` of this rank.
        group: Process group of the ranks.
    """
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
