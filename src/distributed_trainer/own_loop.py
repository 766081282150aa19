# SPDX-License-Identifier: Apache-2.0
"""What a trainer has for loops of the user's own: forward, backward and step by themselves."""

from __future__ import annotations

import contextlib
import functools
import math
import operator
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .advice import Advice
from .backend import gather_bytes
from .errors import MismatchError
from .options import TrainerOptions
from .places import noted, noted_block
from .replica import Replica
from .saving import Saving

_HEADER = struct.Struct("<ddB")  # what ranks tell each other before a backward: weight, loss, flags


class OwnLoop:
    """Those methods of `DistributedTrainer`, which has the rest."""

    rank: int
    gradient_norm: Tensor | None
    _group: Any
    _options: TrainerOptions
    _replica: Replica
    _advice: Advice
    _saving: Saving
    _check_open: Callable[[], None]
    _check_optimizer: Callable[[Any], None]
    _holds_back = False
    """Inside `no_sync`."""
    _is_accumulating = False
    """The last backward was inside it."""
    _has_run_forward = False
    """Since the last backward."""

    @noted_block
    @contextlib.contextmanager
    def forward(self) -> Iterator[None]:
        """Around the model's calls in a loop of your own; `backward` comes after it. Local.

        Inside it BatchNorm takes the statistics of the global batch (then every rank calls the model alike), and
        dropout draws from a stream of this rank's.
        """
        self._check_open()
        self._check_own_loop()
        self._has_run_forward = True
        with self._noted("forward"), self._replica.around_step(), self._replica.around_piece():
            yield

    @noted
    def backward(self, loss: Tensor, weight: float | None) -> Tensor:
        """`loss.backward()` in a loop of your own: each `.grad` gets the sum over all ranks added. Collective, blocks.

        With w_r the weight of rank r and W their sum, the gradients are those of the sum of (w_r / W) loss_r. `.grad`
        has the same bits on every rank, is only added to, and is yours to clear (`optimizer.zero_grad()`), scale and
        clip. What else has a gradient and is no parameter of this model is left alone.

            inputs, targets = trainer.split(batch)
            with trainer.forward():
                loss = criterion(model(inputs), targets)
            optimizer.zero_grad()
            total = trainer.backward(loss, weight=len(targets))
            trainer.step(optimizer)

        Args:
            loss: Of this rank's part: one element. A rank whose part is empty gives the loss of any sample, and weight
                0: it counts for nothing.
            weight: What the loss counts in the mean over all ranks: for a mean over samples, their number. None if the
                losses of all ranks are to be added.

        Returns:
            The loss of the global batch, 0-dimensional and detached, with the same bits on every rank.

        Raises:
            TypeError, ValueError: An argument is not what is described here, all weights are 0, or the model has
                BatchNorm and was not called inside `forward`.
            MismatchError, DistributedTrainerError: As `train_step`.
        """
        self._check_open()
        self._check_own_loop()
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            what = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
            raise TypeError(f"loss must be a tensor with one element, not {what}")
        if weight is not None and not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"weight must be finite and not negative, or None for a sum, not {weight!r}")
        if self._replica.has_global_batchnorm and not self._has_run_forward:
            raise ValueError(
                "the model has BatchNorm, which takes the statistics of the global batch inside `with "
                "trainer.forward():` only. Call the model there, or make the trainer with sync_batchnorm=False."
            )
        is_sum, is_ghost = weight is None, weight == 0
        header = _HEADER.pack(math.nan if is_sum else weight, loss.item(), self._saving.flags)
        with self._noted("agreement"):
            *headers, flags = zip(*(_HEADER.unpack(row) for row in gather_bytes(self._group, header)), strict=True)
            headers = list(zip(*headers, strict=True))
        if len({math.isnan(other) for other, _ in headers}) > 1:
            raise MismatchError("some ranks pass weight=None to backward, others a number. Pass the same kind on all.")
        total = 1.0 if is_sum else sum(other for other, _ in headers)
        if total == 0:
            raise ValueError("weight is 0 on every rank, so the mean is over nothing; skip this backward on all ranks")
        self._saving.take_part(functools.reduce(operator.or_, flags))
        shares = [(1.0 if is_sum else other) / total for other, _ in headers]
        replica = self._replica
        if not self._is_accumulating:
            replica.start(keep=True)
        self._is_accumulating = self._holds_back
        with (
            self._noted("backward"),
            replica.around_backward(is_ghost),
            replica.gradients.backward(leave_out=is_ghost, is_last=not self._holds_back),
        ):
            (loss if is_ghost or shares[self.rank] == 1 else loss * shares[self.rank]).backward()
        self._has_run_forward = False
        if not self._holds_back:
            source = next(rank for rank, share in enumerate(shares) if share)
            with self._noted("exchange"):
                replica.finish([], None, source)
        value = sum(share * other for share, (_, other) in zip(shares, headers, strict=True) if share)
        return torch.tensor(value, dtype=loss.dtype, device=loss.device)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Inside it `backward` keeps its gradients on this rank; the next one outside sends their sum. Local.

        Every rank does the same. Gradients that were in `.grad` before the first of these calls are kept, as ever.
        """
        self._holds_back = True
        try:
            yield
        finally:
            self._holds_back = False

    @noted
    def step(
        self,
        optimizer: torch.optim.Optimizer,
        closure: Callable[[], Any] | None = None,
        *,
        clip_norm: float | None = None,
    ) -> Tensor | None:
        """`optimizer.step(closure)` in a loop of your own, after `backward`. Collective.

        Without sharding, a plain `optimizer.step()` or GradScaler's does as well: all ranks have the same gradients.
        This adds clipping, `nonfinite_gradients`, and in every hundredth step a comparison of the ranks' weights.

        Args:
            optimizer: Of the model's parameters, or of some of them.
            closure: For optimizers that want one (LBFGS): it clears the gradients, calls `backward` and returns its
                result.
            clip_norm: As of `train_step`. Not with a closure.

        Returns:
            With `clip_norm`, the gradients' norm before clipping; else None.

        Raises:
            TypeError, ValueError: An argument is not what is described here, or the last `backward` was inside
                `no_sync`.
            FloatingPointError, MismatchError: As `train_step`.
        """
        self._check_open()
        self._check_optimizer(optimizer)
        if self._is_accumulating:
            raise ValueError("the last backward was inside no_sync(), so no rank has the sums. Call it outside first.")
        if closure is not None and (clip_norm is not None or self._options.shard_optimizer):
            raise ValueError("a closure does not go with clip_norm or shard_optimizer: clip inside of the closure")
        with self._noted("optimizer"):
            has_changed = self._replica.update(optimizer, clip_norm, closure)
        self._advice.note_optimizer(optimizer, self._replica.parameter_ids(optimizer))
        return self.gradient_norm if has_changed and clip_norm is not None else None

    @contextlib.contextmanager
    def _noted(self, phase: str) -> Iterator[None]:
        """Around a phase, for `profile`. Local."""
        began = time.perf_counter()
        yield
        recorder = self._replica.gradients.recorder
        if recorder is not None:
            recorder.note(phase, began, time.perf_counter())

    def _check_own_loop(self) -> None:
        if self._options.reproducible is not None:
            raise ValueError("reproducible= works with train_step, which cuts each batch into shards, not in own loops")
