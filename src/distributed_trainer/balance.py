# SPDX-License-Identifier: Apache-2.0
"""Splits of a batch in proportion to how fast the ranks compute.

Each rank measures its seconds per sample: forward and backward, less what it waited there for others. All ranks know
all measurements, so they come to the same split without asking.

With a_r the seconds per sample of rank r, the median of its last steps, a step with shares s_r takes max_r s_r a_r of
a rank's time. Shares in proportion to 1 / a_r make all ranks take the same, 1 / sum_r (1 / a_r). They are taken only
where that is less by MIN_GAIN, and after a change all measurements are made anew; so a split stays as it is unless
there is something to gain. What a step costs whatever its samples makes a_r depend on the share; then some such changes
follow each other, and end where all ranks take the same time.
"""

from __future__ import annotations

import logging
import struct
from collections import deque
from collections.abc import Sequence
from statistics import median
from typing import Any

from .backend import gather_bytes
from .data import Split

logger = logging.getLogger("distributed_trainer")

NUM_MEASURED = 5  # steps
MIN_GAIN = 0.05  # of a step

_SECONDS = struct.Struct("<d")


class Balance:
    """The split of this job's batches, for which it watches the ranks' speeds.

    Attributes:
        split: Of the next batch; the same shares on every rank.
    """

    def __init__(self, group: Any, is_on: bool) -> None:
        self._group, self._is_on = group, is_on and group.size() > 1
        self.split = Split(group.rank(), group.size())
        self._rows: deque[list[float]] = deque(maxlen=NUM_MEASURED)
        self._num_steps = 0

    def note(self, seconds: float, num_samples: int) -> None:
        """Takes what this rank needed for its samples of a step. Collective, blocks; nothing unless balancing is on."""
        if not self._is_on:
            return
        own = seconds / num_samples if num_samples else float("nan")
        row = [_SECONDS.unpack(data)[0] for data in gather_bytes(self._group, _SECONDS.pack(own))]
        self._num_steps += 1
        if self._num_steps == 1 or any(value != value for value in row):
            return  # the first step sets things up; a rank without samples has measured nothing
        self._rows.append(row)
        if len(self._rows) < NUM_MEASURED:
            return
        shares = better_shares(self.split.shares, [median(column) for column in zip(*self._rows, strict=True)])
        if shares is not None:
            self._rows.clear()
            self.split = Split(self.split.rank, self.split.num_ranks, shares)
            if self.split.rank == 0:
                text = ", ".join(f"{share:.1%}" for share in shares)
                logger.info("balance: of each batch the ranks now get %s", text)


def better_shares(shares: Sequence[float] | None, seconds: Sequence[float]) -> tuple[float, ...] | None:
    """Shares of a batch with which a step is faster by MIN_GAIN; None if there are none.

    Args:
        shares: The present ones; None for equal ones.
        seconds: Of each rank, for a sample.
    """
    shares = shares or [1 / len(seconds)] * len(seconds)
    best = 1 / sum(1 / each for each in seconds)
    if best > (1 - MIN_GAIN) * max(share * each for share, each in zip(shares, seconds, strict=True)):
        return None
    return tuple(best / each for each in seconds)
