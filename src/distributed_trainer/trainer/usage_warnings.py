# SPDX-License-Identifier: Apache-2.0
"""Warnings, each given once, about use that works but is seldom intended. Nothing here communicates."""

from __future__ import annotations

import functools
import inspect
import logging
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..data.loss_weight import criterion_name
from ..launch.separate_models import was_made

if TYPE_CHECKING:
    from ..replica.replica import Progress
    from .recovery import ElasticRecovery, NoRecovery

logger = logging.getLogger("distributed_trainer")


class UsageWarnings:
    """Losses and optimizers of earlier steps, and the warnings about them."""

    def __init__(self) -> None:
        self._criteria: set[str] = set()
        self._optimizers: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self._last: list[tuple[weakref.ref[torch.optim.Optimizer], list[int], bool]] = []  # optimizers of the last step
        self._warned_new_optimizer = False
        self._finalizers: list[weakref.finalize[[], Any]] = []
        self.is_used = False  # whether the script has called the trainer for more than loaders and parts of batches

    def about_criterion(self, criterion: Callable[..., Any], is_of_model: bool, is_checked: bool) -> None:
        """Warn of a loss whose mean is not known. Local.

        Args:
            criterion: The loss, of which at least a term counted by the number of samples.
            is_of_model: Whether the model computes losses, such as `outputs.loss`.
            is_checked: Whether a `WeightCheck` has passed: then there is no warning.
        """
        name = criterion_name(criterion)
        if name in self._criteria:
            return
        self._criteria.add(name)
        if is_checked:
            return
        if is_of_model:
            logger.warning(
                "%s returns a loss, or a summand of one, that is not a loss of torch which the model computes in "
                "forward (outputs.loss may contain such summands: a router's balancing loss, a mean by hand). It "
                "counts as a mean over samples. If it is a mean over something else, return it with its count: "
                "lambda outputs, labels: MeanLoss(outputs.loss * count(labels), count(labels)), where a language "
                "model's count is (labels[:, 1:] != -100).sum().",
                name,
            )
        else:
            logger.warning(
                "%s is not a loss of torch.nn: it counts as a mean over samples. If it is a mean over something else, "
                "return MeanLoss(total, count), or pass weight=, a function of a part's targets that returns the "
                'part\'s weight; if it is a sum, give it an attribute reduction = "sum"; if it compares samples with '
                "each other, see trainer.gather.",
                name,
            )

    def watch(self, recovery: NoRecovery | ElasticRecovery) -> None:
        """Watch for steps of optimizers that are not the trainer's, and for the end of a trainer without any. Local.

        Args:
            recovery: The trainer's recovery.
        """
        own = weakref.ref(recovery)

        def look(optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
            recovery = own()
            if recovery is None:
                return
            session = recovery.session
            if session.replica.needs_update and _updates(optimizer, session.model):
                raise ValueError(
                    f"{type(optimizer).__name__}.step() was called by itself. "
                    'With precision="float16" a step is skipped when gradients overflow: call trainer.step(optimizer), '
                    "and no GradScaler."
                )
            if session.progress.has_unsummed_step or not session.replica.gradients.has_unsummed:
                return
            if _updates(optimizer, session.model):
                session.progress.has_unsummed_step = True
                if session.rank == 0:
                    logger.warning(
                        "%s made a step on gradients of loss.backward(), which the ranks do not add: each rank trains "
                        "by itself. Call trainer.train_step(...), or in a loop of your own "
                        "trainer.backward(loss, weight=len(targets)) and trainer.step(optimizer).",
                        type(optimizer).__name__,
                    )

        handle = register_optimizer_step_pre_hook(look)
        self._finalizers = [weakref.finalize(recovery, handle.remove)]
        if recovery.session.world_size > 1 and recovery.session.rank == 0:
            at_end = functools.partial(self._at_end, recovery.session.progress)
            self._finalizers.append(weakref.finalize(recovery, at_end))

    def _at_end(self, progress: Progress) -> None:
        """Warn of a trainer that was not used. Local."""
        if was_made(torch.optim.Optimizer) and not (self.is_used or progress.has_unsummed_step):
            logger.warning(
                "a trainer and an optimizer were made, but no step: neither train_step nor backward was called. The "
                "script has not trained on several ranks."
            )

    def close(self, is_loud: bool) -> None:
        """End the watch, and warn of a trainer that was not used if `is_loud`. Local."""
        remove, *at_end = self._finalizers
        remove()
        for finalizer in at_end:
            finalizer() if is_loud else finalizer.detach()

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
        for last, last_ids, had_state in self._last if is_loud and not self._warned_new_optimizer else ():
            if last() is not optimizer and had_state and ids == last_ids and not optimizer.state:
                self._warned_new_optimizer = True
                logger.warning(
                    "train_step got a new %s, so the state of the last one (momentum, averages) is lost at each step. "
                    "Make the optimizer once, before the loop.",
                    type(optimizer).__name__,
                )
        self._optimizers.add(optimizer)

    @staticmethod
    def check_closure(optimizer: torch.optim.Optimizer) -> None:
        """Raise ValueError for an optimizer whose step calls the loss, such as LBFGS. Local."""
        closure = inspect.signature(optimizer.step).parameters.get("closure")
        if closure is not None and closure.default is closure.empty:
            name = type(optimizer).__name__
            raise ValueError(
                f"{name} computes the loss several times in one step, which train_step cannot do. Make a loop of your "
                f"own: a closure that calls trainer.backward, and trainer.step(optimizer, closure)."
            )

    def remember_step(self, optimizers: Sequence[torch.optim.Optimizer], ids: list[list[int]]) -> None:
        """Remember that optimizers have made a step; `ids` are the ids of the parameters of each. Local."""
        if [last() for last, *_ in self._last] != list(optimizers):
            both = zip(optimizers, ids, strict=True)
            self._last = [(weakref.ref(optimizer), own, bool(optimizer.state)) for optimizer, own in both]


def _updates(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> bool:
    """Return whether an optimizer has a parameter of the model. Local."""
    parameters = set(model.parameters())
    return any(parameter in parameters for group in optimizer.param_groups for parameter in group["params"])
