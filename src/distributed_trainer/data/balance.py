# SPDX-License-Identifier: Apache-2.0
"""Splits of a batch in proportion to the speed of the ranks.

Each rank measures its seconds per sample: the time of forward and backward, without the time in which it waited for
other ranks. All ranks know all measurements, so each rank computes the same split by itself.

Let a_r be the seconds per sample of rank r, as the median of its last steps. A step with shares s_r takes max_r s_r a_r
per sample of the batch. With shares in proportion to 1 / a_r all ranks take the same time, 1 / sum_r (1 / a_r). The
split changes to these shares only if that is less by MIN_GAIN, and after a change all measurements start again; so a
split is stable unless a change gains time. A step's fixed cost, which does not depend on its samples, makes a_r depend
on the share. Then several changes follow each other, until all ranks take the same time.
"""

from __future__ import annotations

import logging
import struct
from collections import deque
from collections.abc import Sequence
from statistics import median
from typing import Any

from ..backend.gather import gather_bytes
from .split import Split

logger = logging.getLogger("distributed_trainer")

NUM_MEASURED = 5  # number of steps
MIN_GAIN = 0.05  # as a part of a step's time

_SECONDS = struct.Struct("<d")


class Balance:
    """Split of the batches over the ranks, adapted to the ranks' speeds.

    Attributes:
        split: Split of the next batch, with the same shares on every rank.

    Args:
        group: Process group of the ranks.
        is_on: Whether to measure speeds and adapt the split. False: equal shares.
    """

    def __init__(self, group: Any, is_on: bool) -> None:
        self._group, self._is_on = group, is_on and group.size() > 1
        self.split = Split(group.rank(), group.size())
        self._rows: deque[list[float]] = deque(maxlen=NUM_MEASURED)
        self._num_steps = 0

    def record_step(self, seconds: float, num_samples: int) -> None:
        """Record this rank's time for its samples of a step. Collective and blocks if balancing is on, else local.

        Args:
            seconds: Time of forward and backward, without waiting for other ranks.
            num_samples: Number of this rank's samples in the step.
        """
        if not self._is_on:
            return
        own = seconds / num_samples if num_samples else float("nan")
        row = [_SECONDS.unpack(data)[0] for data in gather_bytes(self._group, _SECONDS.pack(own))]
        self._num_steps += 1
        if self._num_steps == 1 or any(value != value for value in row):
            return  # the first step includes set-up; a rank without samples has measured nothing
        self._rows.append(row)
        if len(self._rows) < NUM_MEASURED:
            return
        shares = better_shares(self.split.shares, [median(column) for column in zip(*self._rows, strict=True)])
        if shares is not None:
            self._rows.clear()
            self.split = Split(self.split.rank, self.split.num_ranks, shares)
            if self.split.rank == 0:
                text = ", ".join(f"{share:.1%}" for share in shares)
                logger.info("balance: the ranks' shares of each batch are now %s", text)


def better_shares(shares: Sequence[float] | None, seconds: Sequence[float]) -> tuple[float, ...] | None:
    """Return shares of a batch that make a step faster by at least MIN_GAIN; None if there are none. Local.

    Args:
        shares: Present shares of the ranks; None for equal shares.
        seconds: Seconds per sample of each rank.
    """
    shares = shares or [1 / len(seconds)] * len(seconds)
    best = 1 / sum(1 / each for each in seconds)
    if best > (1 - MIN_GAIN) * max(share * each for share, each in zip(shares, seconds, strict=True)):
        return None
    return tuple(best / each for each in seconds)
