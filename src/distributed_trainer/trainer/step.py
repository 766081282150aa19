# SPDX-License-Identifier: Apache-2.0
"""One step from batch to summed gradients: this rank's part, forward and backward of its microbatches, the sums."""

from __future__ import annotations

import contextlib
import functools
import operator
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..checkpoint.checkpointer import Checkpointer
from ..data.batch import call_model, to_device
from ..data.handshake import StepFlags
from ..data.loss_weight import MeanLoss, Weighted, is_known, local_loss, loss_terms, map_terms, weighted_loss
from ..data.mean_loss import LossCounts, Summand
from ..data.model_loss import Record, computes_loss, number_of_items, recording, summands_of
from ..data.partition import Given, Microbatch, dummies_of
from ..errors import DistributedTrainerError, MismatchError
from ..launch.call_sites import note_exception
from ..metrics.step_clock import AGREEMENT, BACKWARD, EXCHANGE, FORWARD, StepClock
from ..options import TrainerOptions
from .auto_microbatch import MicrobatchesTooLarge
from .session import Session
from .weight_check import WeightCheck


class ReplacementWaits(Exception):
    """Raised if the step is to begin again with one more rank. The same on every rank."""


class TrainStep:
    """The part of `train_step` before the optimizer.

    Args:
        options: Options of the trainer.
        device: Where this rank computes.
        clock: Measures the phases of the step.
        checkpointer: Makes saves at the start of the step.

    Attributes:
        num_samples: Number of samples of the last step's global batch, divided by the number of ranks.
        has_plain: Whether a term of the last step's loss counted by the weight of its part.
        computes_loss: Whether the model computes its loss as those of transformers do; None before the first step.
        weight_check: Check of the weight with which parts of a batch count.
    """

    def __init__(
        self, options: TrainerOptions, device: torch.device, clock: StepClock, checkpointer: Checkpointer
    ) -> None:
        self._device, self._clock, self._checkpointer = device, clock, checkpointer
        self.num_samples = 0.0
        self.weight_check = WeightCheck(device)
        self._num_values = 3  # length of the sums in a step: terms of the loss, and two numbers
        self._counts: LossCounts | None = None  # if the mean of the present step's criterion is not known
        self.has_plain = True
        self.computes_loss: bool | None = None
        self._waits_for_device = options.balance_speed and device.type != "cpu"

    def run(
        self,
        session: Session,
        inputs: Any,
        targets: Any,
        criterion: Callable[..., Any],
        counts: Callable[[], bool],
        is_whole: bool,
        place: int,
        is_logged: bool,
        other_flags: int,
        checks_weight: bool,
        num_microbatches: int,
    ) -> tuple[list[float], Any]:
        """Compute a step up to the summed gradients. Collective, blocks.

        Args:
            session: The ranks.
            inputs: Inputs of the global batch, or of this rank's part.
            targets: Targets of the same samples.
            criterion: Loss of the same samples.
            counts: Function that returns whether these samples count, if they are a part.
            is_whole: Whether every rank passes the same batch.
            place: `DataPosition.place_of` of a part.
            is_logged: Whether this rank is to log the step.
            other_flags: This rank's `StepFlags`, besides those about saves.
            checks_weight: Whether to make the `WeightCheck` of a criterion that has had none.
            num_microbatches: Number of microbatches; each is computed in `Session.num_pieces` pieces.

        Returns:
            Sums over all ranks, in float64, of the loss's terms, of a number that is not 0 if any rank logs the step,
            and of one that is not 0 if the `WeightCheck` has not passed on a rank with samples; and the loss's
            structure.

        Raises:
            ReplacementWaits: A process is to be admitted first.
            MicrobatchesTooLarge: Memory ran out on some rank, with `microbatches="auto"`.
            Exception: The model, the criterion or backward has raised it on any rank. The same on every rank.
        """
        replica, clock = session.replica, self._clock
        sees_parts = session.world_size > 1 or num_microbatches > 1 or session.options.reproducible is not None
        refusal = replica.refuse_hooks(sees_parts)
        # Read in each attempt: an earlier one may have saved, or was made among other ranks.
        flags = self._checkpointer.flags | other_flags | replica.prepare()
        batch, flags = session.handshake.local_batch(
            inputs,
            targets,
            criterion,
            counts,
            num_microbatches * session.num_pieces,
            is_whole,
            place,
            flags,
            None if refusal is None else ValueError(refusal),
        )
        self.num_samples = batch.global_samples / session.world_size
        if flags:
            self._checkpointer.maybe_save(flags, session)
            if flags & StepFlags.REPLACEMENT_WAITS:
                raise ReplacementWaits
        replica.follow(flags)
        replica.start(flags)
        clock.mark(AGREEMENT)
        self._prepare_counts(session, criterion, len(batch.microbatches))
        self.weight_check.start(criterion, checks_weight and sees_parts)
        began = clock.computed() - replica.waited_seconds
        loss, values, calls = None, [], replica.script_calls
        meets = replica.is_forward_collective or self._counts is not None  # a rank that fails is in the group of steps
        first_group = None if meets else session.groups.gradients
        with replica.around_step(), calls.step(self._refuse_calls(session), first_group):
            for number, microbatch in enumerate(batch.microbatches, 1):
                is_last = number == len(batch.microbatches)
                loss, terms = self._run_microbatch(session, microbatch, batch.total, is_last)
                values.append(terms)
                is_complete = session.auto_microbatch.shortage is None and replica.failure is None and not calls.is_over
                replica.combine_buffers(microbatch.num_samples if is_complete else 0)
        if self._counts is not None:
            self.has_plain = self._counts.has_plain
            values[:-1] = [[term * self._counts.correction for term in terms] for terms in values[:-1]]
        self._finish_calls(session)
        if session.auto_microbatch.ranks_lack_memory():
            replica.abandon()
            raise MicrobatchesTooLarge(batch.longest)
        values = [[*map(float, terms), is_logged, 0.0] for terms in values]
        if replica.failure is not None or calls.is_over:
            self._raise_together(session, replica.failure or calls.told)
        given, is_cut = Given(inputs, targets, criterion, session.handshake.rule), is_whole or num_microbatches > 1
        with replica.autocast():
            replica.object(self.weight_check.compare(session.model, given, is_cut, session.rank))
        if values:
            check = self.weight_check
            values[-1][-1] = check.is_on and not check.has_passed and batch.num_samples > 0
        result = replica.finish(values, loss, batch.source, batch.num_samples > 0)
        self._num_values = len(values[0]) if values else 0  # a rank may have no shard
        clock.mark(EXCHANGE)
        session.handshake.balance.record_step(clock.computed() - replica.waited_seconds - began, batch.num_samples)
        return result

    def _run_microbatch(
        self, session: Session, microbatch: Microbatch, total: float, is_last: bool
    ) -> tuple[Any, list[Any]]:
        """Run forward and backward of a microbatch; return its loss and the loss's terms.

        Once they have raised, this rank only makes the calls for which other ranks wait: with BatchNorm a dummy makes
        them, and `Replica.abandon` or `finish` sends the buckets that the microbatch has not sent.
        """
        replica, memory, calls = session.replica, session.auto_microbatch, session.replica.script_calls
        if calls.is_over:
            return None, []
        if self._counts is not None:
            self._counts.begin()
        if memory.shortage is None and replica.failure is None:
            try:
                context = replica.around_microbatch(microbatch.is_dummy)
                return self._run_in(context, session, microbatch, total, is_last)
            except Exception as error:
                if calls.told is not None:  # the exception of another rank
                    return None, []
                if not memory.catches(error):
                    if session.world_size == 1 or isinstance(error, DistributedTrainerError):
                        raise
                    if isinstance(error, torch.OutOfMemoryError):
                        traceback.clear_frames(error.__traceback__)  # they hold the tensors of forward
                    replica.failure = error
                calls.fail(error)
            is_last = False
        elif replica.is_forward_collective:
            replica.begin_completion()
        if replica.is_forward_collective and not calls.is_over:
            self._complete(session, microbatch, total, is_last)
        if self._counts is not None and not self._counts.is_exchanged:
            calls.report_failure()
        return None, []

    def _prepare_counts(self, session: Session, criterion: Callable[..., Any], num_microbatches: int) -> None:
        """Begin to count what the loss is a mean over, unless the criterion alone tells it. Local."""
        if self.computes_loss is None:
            self.computes_loss = computes_loss(session.model)
        self.has_plain = not is_known(criterion)
        is_checked = isinstance(criterion, Weighted) and self.computes_loss and session.progress.num_steps == 0
        is_counted = session.options.reproducible is None and (self.has_plain or is_checked)
        self._counts = LossCounts(session.replica.script_calls, num_microbatches) if is_counted else None

    def _complete(self, session: Session, microbatch: Microbatch, total: float, is_last: bool) -> None:
        """Make the calls in forward and backward that other ranks wait for, by a dummy. Collective, blocks.

        A dummy may raise what the microbatch has raised: then another one is tried, and the sum of its outputs in place
        of the criterion.
        """
        replica, calls = session.replica, session.replica.script_calls
        error: Exception | None = None
        awaits_more = calls.awaits_more  # other ranks may wait in a call that the criterion makes: `finish` tells them
        for dummy in dummies_of(microbatch):
            for own in (dummy,) if awaits_more else (dummy, dummy.without_criterion()):
                try:
                    self._run_in(replica.around_completion(), session, own, total, is_last)
                    return
                except DistributedTrainerError:
                    raise
                except Exception as caught:
                    error = caught
                if calls.is_over:
                    return
        assert error is not None
        with contextlib.suppress(MismatchError):
            calls.finish()
        if calls.is_over:
            return
        self._raise_in_batchnorm(session, replica.failure or error)

    @staticmethod
    def _refuse_calls(session: Session) -> str | None:
        """Return why the script must not bring the ranks' values together in a step, or None. Local."""
        if session.options.reproducible is not None:
            return (
                "with reproducible= a rank computes its shards one after the other, so gather, reduce and any cannot "
                "bring those of all ranks together in a step: leave reproducible out"
            )
        if session.num_pieces > 1:
            return (
                f"ranks were killed, and each part of a batch is now computed in {session.num_pieces} pieces: gather, "
                f"reduce and any would see one piece at a time. Call them in the first step, too, or let the job be "
                f"started again (--restarts)."
            )
        return None

    @staticmethod
    def _finish_calls(session: Session) -> None:
        """Check that no rank is still in a call of forward or backward. Collective and blocks if there are such calls.

        Raises:
            Exception: This rank's failure, where others are in other calls: a MismatchError on the others.
        """
        replica = session.replica
        try:
            replica.check_batchnorm()
            replica.script_calls.finish()
        except MismatchError as error:
            if replica.failure is None:
                raise
            raise replica.failure from error

    @staticmethod
    def _raise_in_batchnorm(session: Session, failure: Exception) -> NoReturn:
        """Raise an error on every rank, where others may wait in forward and the dummies raise as well. Collective."""
        note_exception(failure)
        try:
            session.replica.check_batchnorm()
        except MismatchError as error:
            raise failure from error
        raise failure

    def _raise_together(self, session: Session, failure: Exception | None) -> NoReturn:
        """Raise this rank's failure, and on the other ranks what `Replica.finish` says. Collective, blocks.

        Args:
            session: The ranks.
            failure: Exception of this rank, or the one that another rank has told it.
        """
        assert failure is not None
        note_exception(failure)
        try:
            session.replica.finish([[0.0] * self._num_values], None, 0, False)
        except MismatchError as error:  # the number of terms is not known before the first step
            raise failure from error
        raise failure

    def _run_in(
        self,
        context: contextlib.AbstractContextManager[object],
        session: Session,
        microbatch: Microbatch,
        total: float,
        is_last: bool,
    ) -> tuple[Any, list[Any]]:
        with context:
            with session.replica.autocast():
                outputs, loss, terms = self._forward(session, microbatch, total)
            self._clock.mark(FORWARD)
            replica, whole = session.replica, functools.reduce(operator.add, terms)
            replica.object(replica.leaves.look(whole, finds_others=True))
            if self._counts is not None and self._counts.correction != 1.0:
                for parameter in session.model.parameters():
                    if parameter.grad is not None:
                        parameter.grad.mul_(self._counts.correction)
            with replica.leaves.no_gradients_of_others():
                replica.backward(whole, outputs, microbatch.is_dummy, is_last)
            if self._waits_for_device:
                torch.accelerator.synchronize()  # measure the device's time, not the host's
            self._clock.mark(BACKWARD)
        return loss, [0.0 if microbatch.is_dummy else term.detach() for term in terms]

    def _forward(self, session: Session, microbatch: Microbatch, total: float) -> tuple[Any, Any, list[Tensor]]:
        """Return outputs, loss in the criterion's structure, scaled to its share of the global loss, and its terms."""
        counts, records = self._counts, list[Record]()
        inputs = to_device(microbatch.inputs, self._device)
        is_reproducible = session.options.reproducible is not None
        finds_means = counts.sees_parts if counts is not None else is_reproducible and self.has_plain
        with recording(records) if self.computes_loss and finds_means else contextlib.nullcontext():
            outputs = call_model(session.model, inputs)
        targets, criterion = to_device(microbatch.targets, self._device), microbatch.criterion
        if counts is not None:
            loss = criterion(outputs, targets)
            self._clock.mark(FORWARD)
            loss = self._scale(session, counts, loss, records, microbatch, total)
            self._clock.mark(AGREEMENT)
            if counts.has_model:
                self.weight_check.leave_out_plain()
        elif microbatch.is_dummy:
            loss = criterion(outputs, targets)
        else:
            loss = local_loss(criterion, outputs, targets, microbatch.weight, total)
            if is_reproducible and not all(record.is_over_all for record in records):
                session.replica.object(
                    "the model computes a loss that ignores some targets, whose number in each shard is not known "
                    "with reproducible=. Pass weight=, such as lambda labels: (labels != -100).sum(), or for a "
                    "language model that shifts its labels by one lambda labels: (labels[:, 1:] != -100).sum()."
                )
        if not microbatch.is_dummy:
            self.weight_check.look(microbatch.given, microbatch.num_samples, outputs)
        return outputs, loss, loss_terms(criterion, loss)

    def _scale(
        self,
        session: Session,
        counts: LossCounts,
        loss: Any,
        records: list[Record],
        microbatch: Microbatch,
        total: float,
    ) -> Any:
        """Return the share of the global loss, in the criterion's structure. Collective, blocks.

        Args:
            session: The ranks.
            counts: Counts of the step.
            loss: Result of the criterion for this part.
            records: Losses that the model has computed.
            microbatch: This part.
            total: Weight of the batch.
        """
        criterion, weight = microbatch.criterion, microbatch.weight
        returned = list[Any]()
        map_terms(returned.append, loss)
        if not isinstance(criterion, Weighted):
            loss = map_terms(lambda term: term.total if isinstance(term, MeanLoss) else term, loss)
        terms = loss_terms(criterion, loss)
        summands = list[Summand]()
        if not microbatch.is_dummy:
            number = number_of_items(microbatch.inputs)
            for index, term in enumerate(returned):
                summands += summands_of(term, index, records, number, weight)
        if isinstance(criterion, Weighted):
            counts.check_weight(summands, weight)
            return loss if microbatch.is_dummy else weighted_loss(loss, weight, total)
        scaled = iter(counts.scale(terms, summands, microbatch.is_dummy, weight, total))
        return map_terms(lambda _: next(scaled), loss)


def check_arguments(
    options: TrainerOptions, criterion: Any, microbatches: Any, weight: Any, clip_norm: float | None
) -> None:
    """Check arguments of `train_step` that need no communication. Local.

    Raises:
        TypeError: The criterion is not callable.
        ValueError: Another argument is not as `DistributedTrainer.train_step` describes it.
    """
    if isinstance(criterion, type):
        name = criterion.__name__
        raise TypeError(f"criterion is the class {name}: pass an object of it, {name}()")
    if not callable(criterion):
        raise TypeError(f"criterion must be callable, such as nn.CrossEntropyLoss(), not {criterion!r}")
    is_auto = microbatches == "auto"
    if not is_auto and (not isinstance(microbatches, int) or isinstance(microbatches, bool) or microbatches < 1):
        raise ValueError(f'microbatches must be an int of at least 1, or "auto", not {microbatches!r}')
    if is_auto and options.power_sgd is not None:
        raise ValueError(
            'microbatches="auto" does not go with PowerSGD: a repeated step would lose what PowerSGD kept of earlier '
            "steps. Pass a number."
        )
    if microbatches != 1 and options.reproducible is not None:
        raise ValueError("reproducible= computes each shard by itself: leave microbatches out, or make more shards")
    if weight is not None and not callable(weight) and (options.split_batches or microbatches != 1):
        raise ValueError(
            f"weight={weight!r} is the weight of this rank's whole part, but the batch is cut into smaller ones: pass "
            f"a function of the targets, such as lambda targets: (targets != PAD).sum()"
        )
    check_clip_norm(clip_norm)


def check_clip_norm(clip_norm: float | None) -> None:
    """Raise TypeError or ValueError for a norm to which gradients cannot be scaled. Local."""
    if clip_norm is None:
        return
    if not isinstance(clip_norm, (int, float)):
        raise TypeError(f"clip_norm must be a number, not {type(clip_norm).__name__}")
    if not clip_norm > 0:
        raise ValueError(f"clip_norm must be above 0, not {clip_norm!r}")
