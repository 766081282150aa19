# SPDX-License-Identifier: Apache-2.0
"""What a trainer warns of, once: use that works, but is seldom meant. Nothing here communicates."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from typing import Any

import torch

from .criterion import criterion_name, is_known

logger = logging.getLogger("distributed_trainer")


class Advice:
    """Remembers the losses and optimizers of earlier steps."""

    def __init__(self) -> None:
        self._criteria: set[str] = set()
        self._optimizers: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self._last: tuple[weakref.ref[torch.optim.Optimizer], set[int], bool] | None = None
        self._warned_new_optimizer = False

    def about_criterion(self, criterion: Callable[..., Any]) -> None:
        """Warns of a loss whose mean nobody has told us of."""
        name = criterion_name(criterion)
        if name in self._criteria:
            return
        self._criteria.add(name)
        if not is_known(criterion):
            logger.warning(
                "%s is not a loss of torch.nn: it counts as a mean over samples. If it is a mean over something else, "
                "say what a part of the batch counts with weight=, a function of the targets; if it is a sum, give it "
                'an attribute reduction = "sum"; if it compares samples with each other, it cannot be split.',
                name,
            )

    def knows(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether `about_optimizer` was called with it."""
        return optimizer in self._optimizers

    def about_optimizer(self, optimizer: torch.optim.Optimizer, ids: set[int], is_loud: bool) -> None:
        """Warns of a new optimizer of the parameters that the last one had, which has lost its state."""
        if self._last is not None and not self._warned_new_optimizer and is_loud:
            last, last_ids, had_state = self._last
            if last() is not optimizer and had_state and ids == last_ids and not optimizer.state:
                self._warned_new_optimizer = True
                logger.warning(
                    "train_step got a new %s, so the state of the last one (momentum, averages) is lost at each step. "
                    "Make the optimizer once, before the loop.",
                    type(optimizer).__name__,
                )
        self._optimizers.add(optimizer)

    def note_optimizer(self, optimizer: torch.optim.Optimizer, ids: set[int]) -> None:
        """Says that the optimizer has made a step. `ids` are of its parameters."""
        if self._last is None or self._last[0]() is not optimizer:
            self._last = weakref.ref(optimizer), ids, bool(optimizer.state)
