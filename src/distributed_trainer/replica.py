# SPDX-License-Identifier: Apache-2.0
"""This rank's replica of the model, and what it does together with the others' in a step, whoever writes the loop."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .alignment import SharedBuffers, align_models, align_random_states, draw_seed, random_stream
from .backend import gather_objects
from .batchnorm import GlobalBatchNorm
from .data import map_tensors
from .direct import DirectLinear
from .drift import DriftCheck
from .gradients import GradientSum
from .options import TrainerOptions
from .reproducible import ShardBuffers, ShardStreams, ShardSum, check_computers, own_shards
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
        earlier: That of the same model among more ranks, some of which were killed: this one goes on from it. The
            ranks are replicas already, but for buffers (`share_buffers`).

    Attributes:
        model: The user's.
        gradients: Sums them up: `start`, and `backward` around each backward.
        num_steps: Calls of `update` so far.
        num_sums: Calls of `finish` so far that have passed the commit point.
        is_settled: Whether the last of these has returned, so that buffers are those of all ranks.
        outcome: Of the last one that has passed it: what `conclude` needs.
        num_skipped_steps: Those that changed nothing.
        gradient_norm: That of the last clipping.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: tuple[Any, Any],
        device: torch.device,
        options: TrainerOptions,
        earlier: Replica | None = None,
    ) -> None:
        gradient_group, self._group = groups
        self.model = model
        self._device, self._options = device, options
        self.num_steps = self.num_sums = self.num_skipped_steps = 0
        self.is_settled = True
        self.outcome: Any = None
        self._loss: Any = None  # as the criterion has returned it, while `finish` runs
        self.gradient_norm: Tensor | None = None
        self._nonfinite_name: str | None = None
        self._is_one_of_many = self._group.size() > 1
        if earlier is None:
            align_models(model, self._group)
            align_random_states(self._group, alike=options.split_batches)
        else:
            earlier.close()
            self.num_steps, self.num_sums = earlier.progress
            self.num_skipped_steps, self.gradient_norm = earlier.num_skipped_steps, earlier.gradient_norm
            self.outcome = earlier.outcome
        self._set_up(gradient_group)
        self._drift = DriftCheck(model, self._group, device)

    def _set_up(self, gradient_group: Any) -> None:
        self._sharded = None
        make_bucket = None
        if self._options.shard_optimizer and self._is_one_of_many:
            self._sharded = ShardedOptimizer(self.model, gradient_group, self._group)
            make_bucket = self._sharded.make_bucket
        self.gradients = GradientSum(
            self.model.named_parameters(),
            gradient_group,
            self._options.compression,
            make_bucket,
            self._options.nonfinite_gradients,
        )
        self._direct = DirectLinear(self.model, self.gradients) if self._is_one_of_many else None
        sync_batchnorm = self._options.sync_batchnorm
        self._batchnorm = GlobalBatchNorm(self.model, self._group) if sync_batchnorm and self._is_one_of_many else None
        self._buffers = SharedBuffers(self.model, self._group, skip_batchnorm=sync_batchnorm)

    @property
    def has_global_batchnorm(self) -> bool:
        """Whether the model has BatchNorm modules that take the statistics of all ranks."""
        return bool(self._batchnorm)

    @property
    def progress(self) -> tuple[int, int]:
        """Changes wherever weights may: with `update`, and with `finish` in loops that step by themselves."""
        return self.num_steps, self.num_sums

    @property
    def waited_seconds(self) -> float:
        """Spent in forward and backward where ranks meet, so far."""
        return self._batchnorm.waited_seconds if self._batchnorm else 0.0

    def start(self, keep: bool = False) -> None:
        """Begins a step. Local; `keep` as of `GradientSum.start`."""
        self.gradients.start(keep)

    @contextlib.contextmanager
    def around_step(self) -> Iterator[None]:
        """Around all forwards and backwards of a step: dropout draws from a stream of this rank's. Local."""
        with contextlib.ExitStack() as stack:
            # With split_batches=False each rank has streams of its own throughout, and alone it is the process to
            # compare with.
            if self._is_one_of_many and self._options.split_batches:
                stack.enter_context(random_stream(draw_seed() ^ self._group.rank(), self._device))
            if self._direct:
                stack.enter_context(self._direct.active())
            yield

    def around_piece(self, is_ghost: bool = False) -> contextlib.AbstractContextManager[None]:
        """Around a forward and its backward: BatchNorm takes the statistics of all ranks. Local."""
        return self._batchnorm.active(is_ghost) if self._batchnorm else contextlib.nullcontext()

    def around_completion(self) -> contextlib.AbstractContextManager[None]:
        """Around forward and backward of a stand-in for a piece that an exception has ended. Local."""
        return self._batchnorm.active(completes=True) if self._batchnorm else contextlib.nullcontext()

    def around_backward(self, is_ghost: bool) -> contextlib.AbstractContextManager[None]:
        """Around a backward whose forward is over. Local."""
        stack = contextlib.ExitStack()
        if self._direct:
            stack.enter_context(self._direct.active())
        stack.enter_context(self.around_piece(is_ghost))
        return stack

    def finish(self, values: list[list[float]], loss: Any, source: int) -> tuple[list[float], Any]:
        """Ends the step's backwards: gradients and buffers are those of all ranks. Collective, blocks.

        Args:
            values: For each of this rank's pieces, the terms of its loss.
            loss: As the criterion returns it.
            source: Rank whose buffers become everybody's if any have changed.

        Returns:
            The sum of each term over all pieces and ranks, in float64, and the structure of the loss.
        """
        self._loss = loss
        own = [sum(terms) for terms in zip(*values, strict=True)]
        *sums, has_changed_buffers = self.gradients.finish([*own, self._buffers.have_changed()])
        self._pass_commit_point((sums, self.gradients.unused))
        if has_changed_buffers:
            self._buffers.share(source)
        self.is_settled, self._loss = True, None
        self._note_nonfinite()
        return sums, loss

    def _pass_commit_point(self, outcome: Any) -> None:
        self.num_sums += 1
        self.outcome, self.is_settled = outcome, False

    def conclude(self, outcome: Any) -> tuple[list[float], Any]:
        """Ends a `finish` that a rank's death has ended, but that some rank has brought past the commit point.

        Local; for buffers see `share_buffers`.

        Args:
            outcome: That rank's; None if it is this one.

        Returns:
            As `finish`.
        """
        if outcome is not None:
            self.gradients.conclude(outcome[1])
            self._pass_commit_point(outcome)
        self._note_nonfinite()
        return self.outcome[0], self._loss

    def share_buffers(self, source: int) -> None:
        """Gives all ranks those of rank `source`. Collective, blocks."""
        self._buffers.share(source)

    def abandon(self) -> None:
        """In the place of `finish`: makes its calls, but gradients and buffers are not to be used. Collective, blocks.

        If this was the first step, which shows the order of the gradients, the next one does.
        """
        self.gradients.finish([])
        if self.num_steps == 0:
            self.gradients.forget_order()

    def update(
        self,
        optimizer: torch.optim.Optimizer,
        clip_norm: float | None,
        closure: Callable[[], Any] | None = None,
        is_alone: bool = False,
    ) -> bool:
        """Lets the optimizer step, if the gradients are finite. Collective with a sharded optimizer, or to find drift.

        Args:
            optimizer: The user's.
            clip_norm: As of `train_step`.
            closure: As of `step`.
            is_alone: Ranks were killed, so nothing can be called that is collective.

        Returns:
            Whether it has.

        Raises:
            FloatingPointError: They are not, and the user wants to know. The same on every rank.
            MismatchError: The weights of some ranks are others. The same on every rank.
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
        if not is_alone:
            self._drift.check(self.num_steps)
        return True

    def optimizer_parts(self) -> contextlib.AbstractContextManager[None]:
        """Within it `state_dict()` of any optimizer is local, and has a `Part` in the place of what is sharded."""
        return contextlib.nullcontext() if self._sharded is None else self._sharded.parts()

    def check_optimizer(self, optimizer: torch.optim.Optimizer, is_known: bool) -> set[int]:
        """Raises ValueError for one that does not fit. Whose parameters it has is not looked at if `is_known`. Local.

        Returns:
            What identifies its parameters, if it is not known.
        """
        if self._options.shard_optimizer:
            check_optimizer(optimizer)
        if self._sharded is not None:
            self._sharded.check_places()
        if is_known:
            return set()
        own = {id(parameter) for parameter in self.model.parameters()}
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

    def _note_nonfinite(self) -> None:
        if self.gradients.found_nonfinite and self._nonfinite_name is None:
            is_named = self._options.nonfinite_gradients == "raise" or self.num_skipped_steps == 0
            self._nonfinite_name = self.gradients.first_nonfinite() if is_named else ""

    def _report_nonfinite(self) -> None:
        """Counts a skipped step, or raises."""
        name, self._nonfinite_name = self._nonfinite_name, None
        text = f"step {self.num_steps}: the gradient of {name} is infinite or NaN, so no parameter was changed."
        if self._options.nonfinite_gradients == "raise":
            raise FloatingPointError(text)
        self.num_skipped_steps += 1
        if self.num_skipped_steps == 1 and self._group.rank() == 0:
            logger.warning("%s Further steps like it are skipped and counted in num_skipped_steps.", text)


class ReproducibleReplica(Replica):
    """A replica whose steps have the same bits on any number of ranks. A piece is a shard."""

    def _set_up(self, gradient_group: Any) -> None:
        num_shards = self._options.reproducible
        if self._group.size() > num_shards:
            raise ValueError(
                f"reproducible={num_shards} makes {num_shards} shards of each batch, too few for "
                f"{self._group.size()} ranks: start fewer, or make more shards"
            )
        check_computers(self._group, os.environ)
        check_finite = self._options.nonfinite_gradients != "ignore"
        self.gradients = ShardSum(self.model.named_parameters(), gradient_group, num_shards, check_finite)
        shards = own_shards(num_shards, self._group.rank(), self._group.size())
        self._shard_buffers = ShardBuffers(self.model)
        self._streams = ShardStreams(shards, self._device)
        self._sharded = self._direct = self._batchnorm = None

    def start(self, keep: bool = False) -> None:
        """Begins a step. Collective where other parameters are trained than before."""
        self.gradients.start()
        self._shard_buffers.start()
        self._streams.start()

    @contextlib.contextmanager
    def around_step(self) -> Iterator[None]:
        """Around all forwards and backwards of a step: each has a stream of its own."""
        yield

    @contextlib.contextmanager
    def around_piece(self, is_ghost: bool = False) -> Iterator[None]:
        """Around forward and backward of the next shard. Local."""
        with self._streams.shard(), self._shard_buffers.shard():
            yield

    def finish(self, values: list[list[float]], loss: Any, source: int) -> tuple[list[float], Any]:
        """As `Replica.finish`; the terms of the loss are added in the order of the shards. Collective, blocks."""
        self.gradients.finish()
        self._shard_buffers.finish(self._group)
        structure = map_tensors(lambda term: term.detach().reshape(()).cpu(), loss)
        gathered = gather_objects(self._group, (values, structure))
        rows = [terms for of_rank, _ in gathered for terms in of_rank]
        structure = map_tensors(lambda term: term.to(self._device), gathered[0][1])  # the first shard is never empty
        self._pass_commit_point(([sum(terms) for terms in zip(*rows, strict=True)], structure))
        self.is_settled = True
        self._note_nonfinite()
        return self.outcome

    def conclude(self, outcome: Any) -> tuple[list[float], Any]:
        """As `Replica.conclude`; gradients and buffers are there before the commit point."""
        if outcome is not None:
            self._pass_commit_point(outcome)
        self.is_settled = True
        self._note_nonfinite()
        return self.outcome

    def share_buffers(self, source: int) -> None:
        """Nothing: they are the same on all ranks."""
