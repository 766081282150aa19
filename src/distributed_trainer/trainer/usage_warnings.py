# SPDX-License-Identifier: Apache-2.0
"""Warnings, each given once, about use that works but is seldom intended. Nothing here communicates."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from typing import Any

import torch

from ..data.loss_weight import criterion_name, is_known

logger = logging.getLogger("distributed_trainer")


class UsageWarnings:
    """Losses and optimizers of earlier steps, and the warnings about them."""

    def __init__(self) -> None:
        self._criteria: set[str] = set()
        self._optimizers: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self._last: tuple[weakref.ref[torch.optim.Optimizer], list[int], bool] | None = None
        self._warned_new_optimizer = False

    def about_criterion(self, criterion: Callable[..., Any]) -> None:
        """Warn of a loss whose mean is not known. Local."""
        name = criterion_name(criterion)
        if name in self._criteria:
            return
        self._criteria.add(name)
        if not is_known(criterion):
            logger.warning(
                "%s is not a loss of torch.nn: it counts as a mean over samples. If it is a mean over something else, "
                "pass weight=, a function of a part's targets that returns the part's weight; if it is a sum, give it "
                'an attribute reduction = "sum"; if it compares samples with each other, it cannot be split.',
                name,
            )

    def knows(self, optimizer: torch.optim.Optimizer) -> bool:
        """Return whether `about_optimizer` was called with an optimizer. Local."""
        return optimizer in self._optimizers

    def about_optimizer(self, optimizer: torch.optim.Optimizer, ids: list[int], is_loud: bool) -> None:
        """Warn of a new optimizer for the parameters of the last one, whose state is lost. Local.

        Args:
            optimizer: The optimizer of this step.
            ids: Ids of its parameters.
            is_loud: Whether this rank warns.
        """
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

    def remember_step(self, optimizer: torch.optim.Optimizer, ids: list[int]) -> None:
        """Remember that an optimizer has made a step; `ids` are the ids of its parameters. Local."""
        if self._last is None or self._last[0]() is not optimizer:
            self._last = weakref.ref(optimizer), ids, bool(optimizer.state)
