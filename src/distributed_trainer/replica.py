# SPDX-License-Identifier: Apache-2.0
"""This rank's replica of the model, and what it does together with the others' in a step, whoever writes the loop."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .alignment import SharedBuffers, align_models, align_random_states, rank_random_stream
from .batchnorm import GlobalBatchNorm
from .direct import DirectLinear
from .gradients import GradientSum
from .options import TrainerOptions
from .sharding import ShardedOptimizer, check_optimizer

logger = logging.getLogger("distributed_trainer")


class Replica:
    """A model whose gradients, buffers and BatchNorm statistics are those of all ranks. Making it is collective.

    Args:
        model: The user's, on `device`.
        groups: Two of the same ranks, since each has one order of calls: gradients become ready in another order than
            the calls of forward and of the trainer are made.
        device: Where this rank computes.
        options: The same on every rank.

    Attributes:
        gradients: Sums them up: `start`, and `backward` around each backward.
        num_steps: Calls of `update` so far.
        num_skipped_steps: Those that changed nothing.
        gradient_norm: That of the last clipping.
    """

    def __init__(
        self, model: nn.Module, groups: tuple[Any, Any], device: torch.device, options: TrainerOptions
    ) -> None:
        gradient_group, self._group = groups
        self._model, self._device, self._options = model, device, options
        self.num_steps = self.num_skipped_steps = 0
        self.gradient_norm: Tensor | None = None
        self._nonfinite_name: str | None = None
        self._is_one_of_many = self._group.size() > 1
        align_models(model, self._group)
        align_random_states(self._group, alike=options.split_batches)
        self._sharded = None
        make_bucket = None
        if options.shard_optimizer and self._is_one_of_many:
            self._sharded = ShardedOptimizer(model, gradient_group, self._group)
            make_bucket = self._sharded.make_bucket
        self.gradients = GradientSum(
            model.named_parameters(), gradient_group, options.compression, make_bucket, options.nonfinite_gradients
        )
        self._direct = DirectLinear(model, self.gradients) if self._is_one_of_many else None
        sync_batchnorm = options.sync_batchnorm
        self._batchnorm = GlobalBatchNorm(model, self._group) if sync_batchnorm and self._is_one_of_many else None
        self._buffers = SharedBuffers(model, self._group, skip_batchnorm=sync_batchnorm)

    @property
    def has_global_batchnorm(self) -> bool:
        """Whether the model has BatchNorm modules that take the statistics of all ranks."""
        return bool(self._batchnorm)

    def random_stream(self) -> contextlib.AbstractContextManager[None]:
        """Around forward and backward: dropout draws from a stream of this rank's. Local."""
        # With split_batches=False each rank has streams of its own throughout, and alone it is the process to compare
        # with.
        if not self._is_one_of_many or not self._options.split_batches:
            return contextlib.nullcontext()
        return rank_random_stream(self._group.rank(), self._device)

    def global_batchnorm(self, is_ghost: bool) -> contextlib.AbstractContextManager[None]:
        """Around forward and backward, see `GlobalBatchNorm.active`."""
        return self._batchnorm.active(is_ghost) if self._batchnorm else contextlib.nullcontext()

    def direct_gradients(self) -> contextlib.AbstractContextManager[None]:
        """Around forward and backward, see `DirectLinear.active`."""
        return self._direct.active() if self._direct else contextlib.nullcontext()

    def finish(self, numbers: list[float], source: int) -> list[float]:
        """Ends the step's backwards: gradients and buffers are those of all ranks. Collective, blocks.

        Args:
            numbers: To be summed over the ranks as well.
            source: Rank whose buffers become everybody's if any have changed.

        Returns:
            The sums, in float64.
        """
        *sums, has_changed_buffers = self.gradients.finish([*numbers, self._buffers.have_changed()])
        if has_changed_buffers:
            self._buffers.share(source)
        if self.gradients.found_nonfinite and self._nonfinite_name is None:
            is_named = self._options.nonfinite_gradients == "raise" or self.num_skipped_steps == 0
            self._nonfinite_name = self.gradients.first_nonfinite() if is_named else ""
        return sums

    def update(
        self,
        optimizer: torch.optim.Optimizer,
        clip_norm: float | None,
        closure: Callable[[], Any] | None = None,
    ) -> bool:
        """Lets the optimizer step, if the gradients are finite. Collective with a sharded optimizer.

        Returns:
            Whether it has.

        Raises:
            FloatingPointError: They are not, and the user wants to know. The same on every rank.
        """
        self.num_steps += 1
        if self._nonfinite_name is not None:
            self._report_nonfinite()
            return False
        if self._sharded is not None:
            if clip_norm is not None:
                self.gradient_norm = self._sharded.clip(optimizer, clip_norm)
            self._sharded.step(optimizer)
        else:
            if clip_norm is not None:
                parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
                self.gradient_norm = nn.utils.clip_grad_norm_(parameters, clip_norm)
            optimizer.step() if closure is None else optimizer.step(closure)  # not every step() takes one
        return True

    def check_optimizer(self, optimizer: torch.optim.Optimizer, is_known: bool) -> set[int]:
        """Raises ValueError for one that does not fit; the model's parameters only if `is_known`. Local.

        Returns:
            What identifies its parameters, if it is not known.
        """
        if self._options.shard_optimizer:
            check_optimizer(optimizer)
        if self._sharded is not None:
            self._sharded.check_places()
        if is_known:
            return set()
        own = {id(parameter) for parameter in self._model.parameters()}
        ids = self.parameter_ids(optimizer)
        if not ids <= own:
            raise ValueError(
                f"the optimizer has {len(ids - own)} parameter(s) that are not the model's, so nobody would sum their "
                f"gradients. Make it from the parameters of the model that the trainer was made with."
            )
        return ids

    def parameter_ids(self, optimizer: torch.optim.Optimizer) -> set[int]:
        """What identifies the model's parameters that it updates. Local."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if self._sharded is not None:
            parameters = [self._sharded.parameter_of(parameter) for parameter in parameters]
        return {id(parameter) for parameter in parameters}

    def close(self) -> None:
        """Lets go of the model. Local."""
        self.gradients.close()
        if self._sharded is not None:
            self._sharded.close()

    def _report_nonfinite(self) -> None:
        """Counts a skipped step, or raises."""
        name, self._nonfinite_name = self._nonfinite_name, None
        text = f"step {self.num_steps}: the gradient of {name} is infinite or NaN, so no parameter was changed."
        if self._options.nonfinite_gradients == "raise":
            raise FloatingPointError(text)
        self.num_skipped_steps += 1
        if self.num_skipped_steps == 1 and self._group.rank() == 0:
            logger.warning("%s Further steps like it are skipped and counted in num_skipped_steps.", text)
