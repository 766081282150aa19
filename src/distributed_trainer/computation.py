# SPDX-License-Identifier: Apache-2.0
"""Computes a step: this rank's share of the batch, forward and backward of its pieces, the sums over all ranks."""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .agreement import Agreement
from .criterion import local_loss, loss_terms
from .data import call_model, to_device
from .memory import FittingPieces, PiecesTooLarge
from .options import TrainerOptions
from .replica import Replica
from .saving import Saving
from .share import Piece, stand_in
from .timing import AGREEMENT, BACKWARD, EXCHANGE, FORWARD, StepClock

REPLACEMENT_WAITS = 8
"""Beside the flags of `Saving`: a process waits to be admitted."""


class ReplacementWaits(Exception):
    """The step is to begin again with one rank more. The same on every rank."""


class StepComputation:
    """All of `train_step` before the optimizer, with what the trainer has made for it.

    Args:
        agreement: And the next four, the trainer's.
        replica: Likewise.
        fitting: Likewise.
        clock: Likewise.
        saving: Likewise.
        options: The same on every rank.
        device: Where this rank computes.
        num_pieces: In which each microbatch is computed.
    """

    def __init__(
        self,
        agreement: Agreement,
        replica: Replica,
        fitting: FittingPieces,
        clock: StepClock,
        saving: Saving,
        options: TrainerOptions,
        device: torch.device,
        num_pieces: int,
    ) -> None:
        self._agreement, self._replica, self._fitting = agreement, replica, fitting
        self._clock, self._saving = clock, saving
        self._is_balanced = options.balance is not None
        self._device, self._num_pieces = device, num_pieces

    def run(
        self, inputs: Any, targets: Any, criterion: Callable[..., Any], num_samples: int, microbatches: int
    ) -> tuple[list[float], Any]:
        """Sums of the loss's terms over all ranks, and its structure; the gradients are summed. Collective, blocks."""
        num_pieces = microbatches * self._num_pieces
        share = self._agreement.share(inputs, targets, criterion, num_samples, num_pieces)
        self._saving.take_part(self._agreement.flags & ~REPLACEMENT_WAITS)
        if self._agreement.flags & REPLACEMENT_WAITS:
            raise ReplacementWaits
        self._clock.mark(AGREEMENT)
        self._replica.start()
        began = self._clock.computed() - self._replica.waited_seconds
        loss, values = None, []
        with self._replica.around_step():
            for number, piece in enumerate(share.pieces):
                loss, terms = self._run_piece(piece, share.total, is_last=number == len(share.pieces) - 1)
                values.append(terms)
        if self._fitting.ranks_lack_memory():
            self._replica.abandon()
            raise PiecesTooLarge(share.longest)
        values = [[float(value) for value in terms] for terms in values]
        result = self._replica.finish(values, loss, share.source)
        self._clock.mark(EXCHANGE)
        seconds = self._clock.computed() - self._replica.waited_seconds - began
        self._agreement.balance.note(seconds, share.num_samples)
        return result

    def _run_piece(self, piece: Piece, total: float, is_last: bool) -> tuple[Any, list[Any]]:
        """Forward and backward of a piece: its loss and the terms of it.

        Once memory has run out, what matters is that the calls are made for which other ranks wait: with BatchNorm a
        stand-in makes them; what a piece has left of its buckets `abandon` sends.
        """
        if self._fitting.shortage is None:
            try:
                return self._run_in(self._replica.around_piece(piece.is_ghost), piece, total, is_last)
            except Exception as error:
                if not self._fitting.catches(error):
                    raise
            context, is_last = self._replica.around_completion(), False
        else:
            context = self._replica.around_piece()
        if not self._replica.has_global_batchnorm:
            return None, []
        return self._run_in(context, stand_in(piece), total, is_last)

    def _run_in(
        self, context: contextlib.AbstractContextManager[None], piece: Piece, total: float, is_last: bool
    ) -> tuple[Any, list[Any]]:
        """Forward and backward of a piece, or a stand-in."""
        with context:
            loss, terms = self._forward(piece, total)
            self._clock.mark(FORWARD)
            with self._replica.gradients.backward(leave_out=piece.is_ghost, is_last=is_last):
                functools.reduce(operator.add, terms).backward()
            if self._is_balanced and self._device.type != "cpu":
                torch.accelerator.synchronize()  # else the time would be that of the host
            self._clock.mark(BACKWARD)
        return loss, [0.0 if piece.is_ghost else term.detach() for term in terms]

    def _forward(self, piece: Piece, total: float) -> tuple[Any, list[Tensor]]:
        """The loss of a piece as the criterion returns it, scaled to what it adds to the global one, and its terms."""
        outputs = call_model(self._replica.model, to_device(piece.inputs, self._device))
        targets = to_device(piece.targets, self._device)
        if piece.is_ghost:
            loss = piece.criterion(outputs, targets)
        else:
            loss = local_loss(piece.criterion, outputs, targets, piece.weight, total)
        return loss, loss_terms(piece.criterion, loss)
