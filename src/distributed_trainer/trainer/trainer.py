# SPDX-License-Identifier: Apache-2.0
"""The trainer: its public methods check their arguments and call the objects that do the work."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from torch.utils.hooks import RemovableHandle

from ..backend.gather import gather_objects, raise_alike
from ..checkpoint import reader
from ..checkpoint.checkpointer import Checkpointer, Request
from ..checkpoint.export import export
from ..checkpoint.state import TrainingState
from ..data.batch import map_tensors
from ..data.handshake import StepFlags
from ..data.loader import Agree, ShardedDataLoader
from ..data.loss_weight import Weighted
from ..data.model_loss import computes_loss
from ..data.position import DataPosition
from ..data.reading import own_stream
from ..data.rng import mix
from ..data.samples import SampleRule
from ..data.sampling import PartOf
from ..data.split import shard_part
from ..errors import MismatchError
from ..launch.call_sites import records_block, records_call
from ..metrics.profiler import profile
from ..metrics.progress import ProgressReporter, check_writer
from ..metrics.step_clock import OPTIMIZER, StepClock, Summary, summarise
from ..options import TrainerOptions
from ..replica.replica import Progress
from ..replica.script_calls import ScriptCalls
from .evaluation import Evaluation, check_pair, evaluate, update_bn
from .manual_loop import ManualLoop
from .membership import Groups, Membership
from .recovery import ElasticRecovery, StepAttempt, choose_recovery
from .session import Session
from .step import TrainStep, check_arguments
from .usage_warnings import UsageWarnings

Optimizers = torch.optim.Optimizer | list[torch.optim.Optimizer] | tuple[torch.optim.Optimizer, ...]
"""The optimizers of a step."""
_Result = TypeVar("_Result")


class DistributedTrainer:
    """Train a model on all ranks of a job. Made by `create_distributed_trainer`; do not call the class.

        with create_distributed_trainer(model, num_gpus=2) as trainer:
            for inputs, targets in batches:
                loss = trainer.train_step(inputs, targets, criterion, optimizer)

    `train_step` makes a whole step. In a manual loop the script calls `forward`, `backward` and `step` itself. Each
    method says whether it is collective (every rank calls it, in the same order) or local, and whether it blocks (waits
    for the other ranks).

    Leaving a `with trainer:` block calls `close`. If an exception leaves the block, this rank does not wait for the
    others. A rank that waits for this one then gets a DistributedTrainerError.

    Attributes:
        model: The model that was passed to `create_distributed_trainer`; use it for inference and saving as usual.
        device: Device on which this rank's model is.
    """

    def __init__(
        self,
        model: nn.Module,
        options: TrainerOptions,
        device: torch.device,
        groups: Groups,
        membership: Membership | None,
    ) -> None:
        self.model = model
        self.device = device
        self._options = options
        self._owns_groups = membership is not None  # if False, the script owns the ranks' process group
        self._is_closed = False
        self._is_out_of_data = False  # True inside `batches` once this rank's loader has ended
        self._progress = Progress()
        self._position = DataPosition()
        self._warnings = UsageWarnings()
        self._clock, self._reporter = StepClock(), ProgressReporter()
        local_rank = 0 if membership is None else membership.job.local_rank
        session = Session.start(model, device, options, self._progress, groups, local_rank)
        self._state = TrainingState(model, self._progress, self._position, device, options.split_batches)
        self._checkpointer = Checkpointer(self._state, groups)
        self._counters = dict if membership is None else membership.counters
        self._step = TrainStep(options, device, self._clock, self._checkpointer)
        self._manual_loop = ManualLoop(options, self._checkpointer, self._position)
        self._recovery = choose_recovery(session, membership, self._checkpointer, self._position, self._state)
        self._checkpointer.finalize_at_exit(self._recovery, meets=self._owns_groups)
        self._warnings.watch(self._recovery)

    @property
    def _session(self) -> Session:
        return self._recovery.session

    @property
    def rank(self) -> int:
        """This process's number, 0 to world_size - 1.

        In a process that waits to replace a killed rank (`distributed-trainer run --elastic`) it is -1.
        """
        return -1 if self._recovery.is_waiting else self._session.rank

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which prints and writes files.

        False in a process that waits to replace a killed rank (`distributed-trainer run --elastic`).
        """
        return self.rank == 0

    @property
    def world_size(self) -> int:
        """Number of ranks; 1 in a process that waits to replace a killed rank."""
        return self._session.world_size

    @property
    def local_rank(self) -> int:
        """This process's number among the ranks of its machine, from 0.

        Always 0 if the trainer was made with a `group` of torch.distributed.
        """
        return self._session.local_rank

    @property
    def num_skipped_steps(self) -> int:
        """Number of steps that changed no parameter because a gradient was infinite or NaN; the same on every rank.

        Always 0 without `nonfinite_gradients="skip"` or `precision="float16"`.
        """
        return self._progress.num_skipped_steps

    @property
    def gradient_norm(self) -> Tensor | None:
        """2-norm of the gradients in the last step with `clip_norm`, before clipping; None before the first such step.

        0-dimensional, the same on every rank.
        """
        return self._progress.gradient_norm

    @records_call
    def train_step(
        self,
        inputs: Any,
        targets: Any,
        criterion: Callable[..., Any],
        optimizer: Optimizers,
        *,
        microbatches: int | Literal["auto"] = 1,
        weight: Callable[[Any], Any] | float | None = None,
        clip_norm: float | None = None,
        check_weight: bool = True,
    ) -> Any:
        """Train one step on the global batch: forward, backward, mean over all ranks, `optimizer.step()`.

            loss = trainer.train_step(inputs, targets, nn.CrossEntropyLoss(), optimizer, clip_norm=1.0)

        Collective, blocks. Afterwards the parameters on every rank are what one process gets on the whole batch. Do not
        scale the learning rate by the number of ranks. The step drops earlier gradients first, so
        `optimizer.zero_grad()` is not needed. Its own gradients stay in `.grad` until the next step, which does not
        change those that the script keeps; with `shard="optimizer"` the model's parameters have none.

        The model may have changed since the last step, in the same way on every rank (docs/training.md). New parameters
        and buffers become rank 0's.

        Only parameters of the model get gradients. Other tensors may require one, such as inputs by which the model
        differentiates, but their `.grad` stays as it was.

        Args:
            inputs: A tensor on any device, or a nested structure of tensors: tuples (also NamedTuples), lists, dicts
                (any mappings), dataclasses. A dict is passed to the model as keyword arguments, a tuple or list as
                positional arguments, all else as one argument. The first dimension of every tensor counts the samples
                (see `batch_dim` in `create_distributed_trainer`). A tuple or list inside the structure may also be a
                list of samples, with one entry for each: numbers, strings, dicts, tensors of any shapes. Numbers,
                strings and None outside of such lists are passed to the model unchanged. docs/training.md has the whole
                rule.
                A batch that is not cut (`split_batches=False` or `trainer.loader`, and one microbatch) may be anything;
                its number of samples is that of the targets, if they alone have one.
                TypeError for what cannot be cut: NumPy arrays, sparse and nested tensors, PackedSequence, other objects
                that hold tensors. ValueError if a tensor has no dimension, the tensors and lists differ in the number
                of samples, a list can be read in two ways, there is nothing to count, or every rank's batch is empty.
                With a `split` function the batch is what that function takes. If the batch of one rank is refused,
                every rank raises its error.
            targets: Targets of the same samples, in the same forms as `inputs`; passed to the criterion as they are.
                Errors are those of `inputs`.
            criterion: Loss function, called as criterion(outputs, targets). Its reduction is "mean" (over samples,
                elements or weighted targets, as the loss defines it) or "sum". Any other callable counts as a mean over
                samples, unless there is a `weight`, it returns a `MeanLoss`, which has the denominator of its mean, or
                it returns a mean of torch that a model of transformers has computed in forward (`outputs.loss`). Ranks
                then exchange the denominators before backward. It may return several terms in a tuple, list or dict,
                each with or without a `MeanLoss`; the loss is their sum. TypeError if it is not callable or returns no
                tensors. ValueError for reduction "none", for terms with more than one element, for shapes with which it
                mixes samples, such as outputs [N, 1] and targets [N] for nn.MSELoss, for a `MeanLoss` with
                `reproducible`, and for several with different denominators in several microbatches.
            optimizer: Optimizer of the model's parameters, or of some of them. Make it once, before the loop: a new one
                has lost its state. With `shard="optimizer"`, `optimizer.param_groups` hold this rank's flat part of
                each parameter from the first step on. Every rank must then call `optimizer.state_dict()`, which returns
                the whole state in the form of an ordinary optimizer; `load_state_dict()` takes this form. A list or
                tuple of optimizers, such as `[muon, adamw]`, makes one step of all: each steps in its turn, or none
                does. TypeError if it is neither a torch.optim.Optimizer nor a list or tuple of at least one. ValueError
                if an optimizer has parameters that are not, or no longer, the model's, or that another one of the list
                has, does not work with `shard`, or needs a closure (LBFGS).
            microbatches: Number of pieces in which the batch is computed, one after the other, to need less memory; an
                int of at least 1, the same on every rank. The default, 1, computes this rank's part at once. The loss
                is exact for pieces of any size. BatchNorm uses the statistics of each piece over all ranks, as one
                process that accumulates gradients does. "auto" begins with 1; if memory runs out on any rank, the step
                is repeated with twice as many pieces, and later steps keep that number (docs/training.md). ValueError
                for anything else, for "auto" with `PowerSGD`, and for anything but 1 with `reproducible`.
            weight: Weight of a part of the batch in the mean, for a loss that torch.nn does not have: a function of the
                part's targets whose values add up over parts, such as `lambda targets: (targets != PAD).sum()`. With
                `split_batches=False` and one microbatch it may also be a number for this rank's part. The default,
                None, takes the mean that the criterion defines. ValueError for a number elsewhere, for a weight that is
                negative or not finite, if all weights are 0, for a criterion with reduction "sum", and for None if the
                mean is over samples and their number is not known, for a criterion that returns `MeanLoss`, or if the
                weights of the first step's parts are not in proportion to the number of targets over which a model of
                transformers has taken its mean.
            clip_norm: Upper limit of the gradients' 2-norm over all parameters of the optimizer, or of all optimizers
                of a list together, above 0; larger gradients are scaled down to it. `trainer.gradient_norm` is then the
                norm before clipping. The default, None, does not clip. ValueError if it is 0 or less, TypeError if it
                is not a number.
            check_weight: Check the weight of parts in the first step with a criterion that is not one of torch's, or
                with a `weight` function: each rank compares the loss of two parts of its samples, weighted, with that
                of all. It costs a few calls of the criterion, and if the model computes the loss, forwards in
                evaluation mode; one line on rank 0 says how long it took. docs/training.md says what it finds. The
                default is True. Pass False if the loss is meant to compare the samples of each part with each other.

        Returns:
            The loss of the global batch, 0-dimensional and detached, with the same bits on every rank. If the criterion
            returns several terms, these terms in the same structure. A `MeanLoss` becomes its mean over the batch.

        Raises:
            TypeError, ValueError: An argument is not as described above, or the trainer is closed. Arguments are
                checked before any communication, except for what depends on other ranks' parts or on what the criterion
                returns.
            ValueError: The loss depends on a parameter of another module, such as a criterion's, or on another tensor
                that an optimizer updates; or a hook on a parameter changes the gradient of a part (see `on_gradient`).
                The same on every rank; the optimizer has not stepped.
            ValueError: `check_weight` has found that the loss of parts, weighted, is not that of the whole. The same on
                every rank; no parameter has changed.
            RuntimeError: The loss has no graph, on any rank. The same on every rank.
            MismatchError: Ranks return `MeanLoss` in different terms. The same on every rank.
            MismatchError: The ranks' batches differ, although the trainer takes whole batches (`split_batches=True`
                without `trainer.loader`), or the ranks' models have changed differently; no rank has changed its
                parameters. Or the ranks' weights differ, which the ranks check before the optimizer's step in steps 1
                and 2, in every hundredth step, and where forward has written to a parameter. The same on every rank.
            ValueError: The model has other parameters than at first, with `shard="optimizer"`; or a new parameter has
                no shape yet. The same on every rank; no parameter has changed.
            FloatingPointError: A gradient is infinite or NaN, with `nonfinite_gradients="raise"` (`step` describes the
                other values); with `precision="float16"` only if the loss scale has fallen to 1. The same on every
                rank; no parameter has changed, and training can continue.
            torch.OutOfMemoryError: With `microbatches="auto"`, a single sample is too large for some rank. The same on
                every rank.
            Exception: The model, the criterion or backward has raised it on any rank. Of the same type on every rank;
                no parameter has changed.
            DistributedTrainerError: A rank has left the job or closed its trainer, or the transport failed; or an
                exception of another rank cannot be pickled.
            CheckpointError: An earlier `save` failed. The same on every rank.
        """
        self._check_open(is_use=True)
        check_arguments(self._options, criterion, microbatches, weight, clip_norm)
        if weight is not None:
            criterion = Weighted(criterion, weight)
        self._session.replica.notice_changes()
        optimizers, ids = self._check_optimizers(optimizer, has_closure=False)
        clock, is_whole = self._clock, self._takes_whole_batches(inputs, targets)
        clock.start()

        def compute(session: Session, inputs: Any, targets: Any) -> tuple[list[float], Any]:
            counts, flags = functools.partial(self._counts, inputs, targets), self._recovery.flags
            is_logged = session.rank == 0 and self._reporter.is_due(self._progress.num_steps + 1)
            place = 0 if is_whole else self._position.place_of(inputs, targets)
            batch = inputs, targets, criterion, counts, is_whole, place
            run = functools.partial(self._step.run, session, *batch, is_logged, flags, check_weight)
            return run(microbatches) if isinstance(microbatches, int) else session.auto_microbatch.run(run)

        def update(session: Session, is_alone: bool) -> None:
            session.replica.update(optimizers, clip_norm, is_alone=is_alone)

        (*totals, num_logging, num_unproved), loss = self._recovery.run(StepAttempt(inputs, targets, compute, update))
        clock.mark(OPTIMIZER)
        if self.is_main:
            check = self._step.weight_check
            has_passed = check.has_passed and not num_unproved
            if (line := check.report(has_passed)) is not None:
                print(f"distributed_trainer: {line}", flush=True)
            if self._step.has_plain and self.world_size > 1:
                self._warnings.about_criterion(criterion, bool(self._step.computes_loss), has_passed)
        rates = [one.param_groups[0].get("lr") for one in optimizers]
        figures = {
            "learning_rate": rates[0],
            **{f"learning_rate_{number}": rate for number, rate in enumerate(rates[1:], 1)},
            "gradient_norm": None if clip_norm is None else self.gradient_norm,
            "loss_scale": self._progress.loss_scale.value if self._options.scales_loss else None,
        }
        session, num_steps, num_samples = self._session, self._progress.num_steps, self._step.num_samples
        times = clock.end(num_samples)
        measured = sum(totals), num_samples, *times, figures
        self._reporter.record_step(session.groups.steps, num_steps, *measured, is_logged=num_logging > 0)
        self._warnings.remember_step(optimizers, ids)
        remaining = iter(totals)
        return map_tensors(lambda term: torch.tensor(next(remaining), dtype=term.dtype, device=term.device), loss)

    @records_block
    def forward(self) -> contextlib.AbstractContextManager[None]:
        """Surround the model's calls in a manual loop; `backward` follows the block. Local in most models.

            with trainer.forward():
                loss = criterion(model(inputs), targets)

        Inside the block the trainer's `precision` applies to the model and the loss, and BatchNorm takes the statistics
        of the global batch. Each call of a model with BatchNorm is then collective and blocks, so every rank calls the
        model the same number of times. Dropout draws from this rank's own random stream; outside of the block it would
        draw from the script's. If the model has changed since the last step, its new parameters and buffers become rank
        0's; then the call is collective and blocks.

        Returns:
            The context manager of the block.

        Raises:
            ValueError: The trainer was made with `reproducible`, or is closed.
            ValueError, MismatchError: The model has changed, as in `train_step`. The same on every rank.
        """
        self._check_open(is_use=True)
        return self._manual_loop.forward(self._session)

    @records_call
    def backward(
        self,
        loss: Tensor,
        weight: float | None,
        *,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        inputs: Tensor | Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Run `loss.backward()` in a manual loop, and add the sum over all ranks to each `.grad`. Collective, blocks.

            inputs, targets = trainer.split(batch)  # batches of trainer.loader are parts already
            with trainer.forward():
                loss = criterion(model(inputs), targets)
            optimizer.zero_grad()
            total = trainer.backward(loss, weight=len(targets))
            trainer.step(optimizer)

        With w_r the weight of rank r and W the sum of all weights, the gradients are those of the sum of (w_r / W)
        loss_r. `.grad` has the same bits on every rank, and does not contain the loss scale of `precision="float16"`.
        This method only adds to `.grad`: clear it with `optimizer.zero_grad()`. To clip, use `step(clip_norm=...)` or
        any code of yours. Several backwards of one graph are as in plain torch: all but the last with
        `retain_graph=True`.

        Gradients are summed for parameters of this model only. Parameters of other modules, such as a criterion's, and
        other tensors that an optimizer updates are refused. The model of another trainer may get gradients (a
        discriminator from the generator's loss): clear them before that trainer's own backward. Any other tensor, such
        as inputs of this rank's part, gets the gradient by this rank's samples; one with the same values on every rank
        is refused.

        Args:
            loss: Loss of this rank's part, a tensor with one element. A rank whose part is empty passes the loss of any
                one sample, such as the first of the global batch, with weight 0: it counts for nothing. TypeError for
                anything else.
            weight: Weight of the loss in the mean over all ranks, finite and not negative: for a mean over samples, the
                number of samples. None on every rank adds the losses of all ranks. It has no default. TypeError if it
                is neither a number nor None; ValueError for other numbers, or if the weights of all ranks are 0.
            retain_graph: Keep the graph for another backward, as in torch.Tensor.backward. The default, None, means
                `create_graph`. ValueError for True with `buffers` on several ranks.
            create_graph: Make gradients that can be differentiated, as in torch.Tensor.backward. The default is False.
                ValueError for True on several ranks: a sum over the ranks has no graph on one of them.
            inputs: Tensors that get gradients, such as some of the model's parameters, as in torch.Tensor.backward;
                all others get none. The default, None, means all leaves of the graph.

        Returns:
            The loss of the global batch, 0-dimensional and detached, with the same bits on every rank.

        Raises:
            TypeError, ValueError: An argument is not as described above; the model has BatchNorm, or an embedding with
                `max_norm`, and was not called inside `forward`; `forward` was never used, and the model has dropout or
                the trainer `precision`; `weight` is not 0 although `is_stand_in` of the loader is True; or the trainer
                was made with `reproducible`, or is closed.
            ValueError: A tensor that is not a parameter of the model gets a gradient, as described above; or a hook on
                a parameter changes the gradient of a part (see `on_gradient`). The same on every rank.
            RuntimeError: No rank's loss has a graph. The same on every rank. (A rank's loss may have none, such as
                `torch.zeros(())` where its part has no labels: it counts with no gradient.)
            MismatchError: Ranks have passed different batches to `split` since the last backward; a rank has skipped a
                batch of `trainer.loader` after an exception in forward; some ranks pass None as `weight` and others a
                number; forward has set weights that differ between ranks; the ranks' models have changed differently;
                or new parameters do not have the same values. The same on every rank.
            DistributedTrainerError: As in `train_step`.
        """
        self._check_open(is_use=True)
        if weight != 0 and self._position.awaits_weight_0():
            raise ValueError(
                "this rank's part of the batch is empty, and trainer.loader returned a sample that stands in for it: "
                "pass weight=0 where loader.is_stand_in is True"
            )
        return self._manual_loop.backward(self._session, loss, weight, retain_graph, create_graph, inputs)

    def on_gradient(self, parameter: nn.Parameter, function: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
        """Call a function with a parameter's gradient, summed over all ranks, before clipping and the optimizer. Local.

            handle = trainer.on_gradient(model.head.weight, lambda gradient: gradient.clamp(-0.1, 0.1))

        It takes the place of `parameter.register_hook(function)`, which sees the gradient of this rank's part of the
        batch. The function runs once for each exchange: in each `train_step`, whatever its number of microbatches, and
        in each `backward` outside of `no_sync`. There it sees the gradient of this exchange, without what was in
        `.grad` before. It does not run if no rank used the parameter. `nonfinite_gradients` looks at the gradient
        before the function does.

        Args:
            parameter: Parameter of the model. TypeError if it is not an nn.Parameter, ValueError if it is not the
                model's.
            function: Called as function(gradient), the same on every rank. If it returns a tensor, that becomes the
                gradient; None leaves the gradient as it is. The step raises ValueError if it returns anything else, or
                another shape. TypeError if it is not callable.

        Returns:
            A handle whose `remove()` takes the function away.

        Raises:
            TypeError, ValueError: An argument is not as described above, the trainer was made with `shard`, with which
                no rank has a whole gradient, or it is closed.
        """
        self._check_open()
        if self._options.shards_optimizer:
            raise ValueError('on_gradient does not work with shard="optimizer": no rank has a whole gradient')
        if not isinstance(parameter, nn.Parameter):
            raise TypeError(f"parameter must be an nn.Parameter, not {type(parameter).__name__}")
        if not callable(function):
            raise TypeError(f"function must be callable, not {function!r}")
        if not any(parameter is own for own in self.model.parameters()):
            raise ValueError("the parameter is not one of the model that the trainer was made with")
        return self._progress.functions.add(parameter, function)

    def no_sync(self) -> contextlib.AbstractContextManager[None]:
        """Skip the exchange of gradients: `backward` in the block only adds to `.grad` on this rank. Local.

        To add up the gradients of 8 batches and exchange them once, put the first 7 `backward` into the block, on every
        rank; `loader` is one of `trainer.loader`:

            for number, (inputs, targets) in enumerate(loader, 1):
                with trainer.forward():
                    loss = criterion(model(inputs), targets) / 8
                with trainer.no_sync() if number % 8 else contextlib.nullcontext():
                    trainer.backward(loss, weight=len(targets))
                if number % 8 == 0:
                    trainer.step(optimizer)
                    optimizer.zero_grad()

        The next `backward` outside the block sends the sum of all. Gradients that were in `.grad` before the first of
        these batches are added to that sum, and are not summed over the ranks again. `train_step(microbatches=8)` does
        the same with the parts of one batch. Gradients of batches at the end that do not make up 8 stay on this rank:
        call the last `backward` outside of the block, or clear them.

        Returns:
            The context manager of the block.
        """
        return self._manual_loop.no_sync()

    @records_call
    def step(
        self,
        optimizer: Optimizers,
        closure: Callable[[], Any] | None = None,
        *,
        clip_norm: float | None = None,
    ) -> Tensor | None:
        """Make the optimizer's step in a manual loop, after `backward`; with `clip_norm`, clip the gradients first.

            norm = trainer.step(optimizer, clip_norm=1.0)  # the norm before clipping, the same on every rank

        A gradient that is infinite or NaN spoils the parameters, as in plain torch; with `clip_norm` the norm is NaN or
        infinite too. With `create_distributed_trainer(nonfinite_gradients="skip")` such a step changes no parameter and
        returns None; with "raise" it raises FloatingPointError on every rank and changes no parameter. With
        `create_distributed_trainer(precision="float16")` such a step changes no parameter and halves the loss scale.

        Every rank calls it, in the same order. It blocks in steps 1 and 2 and in every hundredth step, in which the
        ranks compare their weights, and in every step with `shard="optimizer"`; in other steps no rank waits. If the
        optimizer is not sharded, `optimizer.step()` and GradScaler's `scaler.step(optimizer)` (after
        `backward(scaler.scale(loss), ...)`) work as well, since all ranks have the same gradients;
        `nonfinite_gradients` has no effect on them. With `precision="float16"` they raise ValueError.

        Args:
            optimizer: Optimizer of the model's parameters, or of some of them; or a list or tuple of optimizers, as in
                `train_step`. TypeError and ValueError are those of `train_step`, but one that needs a closure may have
                one.
            closure: Function for optimizers that need one (LBFGS): it clears the gradients, calls `backward` and
                returns the result. The default, None, calls `optimizer.step()` without one. ValueError with several
                optimizers, `clip_norm`, `shard` or `precision="float16"`.
            clip_norm: Upper limit of the gradients' 2-norm over all parameters of the optimizer, or of all optimizers
                of a list together, above 0. The default, None, does not clip. ValueError if it is 0 or less, TypeError
                if it is not a number.

        Returns:
            The gradients' 2-norm before clipping, a 0-dimensional tensor, the same on every rank. None without
            `clip_norm`, and in a step that was skipped.

        Raises:
            TypeError, ValueError: An argument is not as described above, the last `backward` was inside `no_sync`, or
                the trainer is closed.
            FloatingPointError: A gradient is infinite or NaN, with `nonfinite_gradients="raise"`. The same on every
                rank; no parameter has changed.
            MismatchError: The ranks' weights differ. The same on every rank.
        """
        self._check_open(is_use=True)
        optimizers, ids = self._check_optimizers(optimizer)
        session = self._session
        has_changed = self._manual_loop.step(session, optimizers, closure, clip_norm)
        self._warnings.remember_step(optimizers, ids)
        return self.gradient_norm if has_changed and clip_norm is not None else None

    def split(self, batch: Any) -> Any:
        """Return this rank's part of a batch that every rank has, for manual loops. Local.

        The next `backward` compares the ranks' batches, and raises MismatchError on every rank if they differ. For that
        the last eight batches are kept in memory until then; for inference see `evaluate`.

        Batches of `trainer.loader` are this rank's part already: do not split them. Parts are contiguous, in rank
        order, and differ by at most one sample (with `balance_speed` by more); with fewer samples than ranks some are
        empty. Tensors stay on their device: for a model on a GPU, move them to `trainer.device`.

        Args:
            batch: Batch in the forms of the `inputs` of `train_step`, or the tuple (inputs, targets). A tuple or list
                that is the whole batch is a structure, unless it holds dicts, or numbers and strings, alone: then it is
                a list of samples. TypeError and ValueError as for `inputs`.

        Returns:
            The same structure with views of the tensors and shorter lists of samples. Other values are as they were.
            With a `split` function, the part that it returns.

        Raises:
            TypeError, ValueError: `batch` is not as described above; or it has fewer samples than there are ranks, and
                is cut by a `split` function, which makes no empty parts.
        """
        handshake, roots = self._session.handshake, {"batch": batch}
        num_samples = handshake.rule.count(roots)
        start, stop = handshake.balance.split(num_samples)
        if num_samples < self.world_size and self._options.split is not None:
            raise ValueError(
                f"the batch has {num_samples} samples for {self.world_size} ranks, and split= makes no empty parts: "
                f"pass it to train_step, or leave it out"
            )
        part, *_ = handshake.rule.part(roots, num_samples, start, stop)
        if self.world_size > 1:
            self._manual_loop.note_batch(roots)
        return part

    def batches(self, loader: Iterable[Any]) -> Iterator[Any]:
        """Iterate over this rank's own loader until the loaders of all ranks have ended.

            for inputs, targets in trainer.batches(own_loader):
                trainer.train_step(inputs, targets, criterion, optimizer)

        Each iteration is collective and blocks. It is for `split_batches=False`, with one `train_step` for each batch.
        A rank whose loader has ended gets its last batch again: it takes part in the step, but the batch counts for
        nothing. So every sample counts once, for any number of batches on each rank.

        Args:
            loader: Any iterable of this rank's batches. TypeError if it is not iterable. ValueError, the same on every
                rank, if it is empty on some rank but not on all.

        Yields:
            The batches of `loader`, then its last batch until the loaders of all ranks have ended. Nothing if all
            loaders are empty.

        Raises:
            TypeError, ValueError: A loader is not as described above, or the trainer takes whole batches. Raised in the
                first iteration.
        """
        if self._options.split_batches:
            raise ValueError(
                "batches() is for loaders that differ between ranks. This trainer takes whole batches: make it with "
                "split_batches=False, or iterate over the loader itself."
            )
        batch, has_any = None, False
        for batch in loader:
            has_any = True
            self._session.handshake.has_batch(has_batch=True, has_any=True)
            yield batch
        while self._session.handshake.has_batch(has_batch=False, has_any=has_any):
            self._is_out_of_data = True
            try:
                yield batch
            finally:
                self._is_out_of_data = False

    @records_call
    def loader(
        self,
        dataset: Dataset[Any],
        batch_size: int | None = None,
        *,
        shuffle: bool = False,
        drop_last: bool = False,
        sampler: Iterable[Any] | None = None,
        batch_sampler: Iterable[Any] | None = None,
        stream: Literal["sharded"] | Callable[[Any, int, int], Any] | None = None,
        **options: Any,
    ) -> ShardedDataLoader:
        """Make a loader of global batches that reads only this rank's part of each. Collective, blocks.

            loader = trainer.loader(dataset, batch_size=64, shuffle=True, num_workers=2)

        A loader over which the script has iterated before the first `train_step` is the training's: then `train_step`
        takes every batch as this rank's part, so pass batches of such loaders only. In a manual loop do not call
        `split` for them. Other loaders (for `evaluate`) make no difference. The samples of a batch, their order in each
        epoch and what augmentation draws for them (from `random`, NumPy and torch) are the same for any number of ranks
        and workers. DistributedSampler and `set_epoch` are not needed.

        Args:
            dataset: A dataset with `__getitem__` and `__len__`, or an iterable one. Every rank reads all samples of an
                iterable one, and keeps its part, unless there is a `stream`. Each worker iterates over it, as with
                torch's DataLoader. `set_epoch` of an iterable one gets the epoch's number. TypeError if a dataset with
                `__getitem__` has neither length nor sampler.
            batch_size: Number of samples of a global batch. ValueError if it is not an int of at least 1. With
                `batch_sampler` it is None, the default, or 1.
            shuffle: Take a new order in each epoch; `torch.manual_seed` before `create_distributed_trainer` decides it.
                Each loader of a trainer has another order. The default, False, keeps the dataset's order. ValueError
                for True with an iterable dataset.
            drop_last: Leave out the last batch of an epoch if it has fewer samples than the others. The default, False,
                keeps it.
            sampler: Iterable of the indices of an epoch's samples, such as a torch.utils.data.WeightedRandomSampler.
                Every rank draws the same indices: the sampler's `set_epoch`, if it has one, gets the epoch's number;
                `random`, NumPy, torch and the generators in the sampler's attributes are seeded for each epoch (their
                own seeds have no effect). The default, None, takes each sample once. TypeError for an iterator, which
                has only one epoch. ValueError for a DistributedSampler, with `shuffle`, and with an iterable dataset.
            batch_sampler: Iterable of the lists of indices of an epoch's global batches, of any sizes, such as length
                buckets or batches of so many tokens. It is drawn as `sampler` is, and has the same errors. The default,
                None, makes batches of `batch_size`. ValueError with `batch_size`, `shuffle`, `sampler` or `drop_last`.
            stream: Divide an iterable dataset, so that each rank reads samples of its own: its part of each batch. With
                "sharded" the rank iterates over `dataset.shard(num_shards=world_size, index=rank)`, and over
                `datasets.distributed.split_dataset_by_node` for one of Hugging Face. It may be a function of (dataset,
                rank, world_size) that returns this rank's dataset. Each iteration is then collective and blocks, until
                all ranks' datasets have ended; a rank whose dataset has ended has empty parts. An exception of a
                dataset is raised on every rank. The order, and which samples are in a batch, then depend on the number
                of ranks. The default, None, is the answer of one process. ValueError for a dataset with an index, fewer
                samples in a batch than ranks, a rank without samples (in the first iteration, the same on every rank),
                and with `reproducible` or `balance_speed`. TypeError for a dataset without `shard`.
            options: Other options of torch.utils.data.DataLoader, such as `num_workers`, `collate_fn` and `pin_memory`.
                `collate_fn` gets this rank's samples of the batch (one sample of the batch, if this rank has none) and
                may drop some. If it drops all of a rank, and not all of the batch, that rank's part is empty. If it
                drops all of the batch, its result for the whole batch is returned on every rank, such as None.
                ValueError for `in_order=False`. TypeError for options that DataLoader does not know.

        Returns:
            The loader. Each iteration over it is one epoch; `len()` is the number of batches. `state_dict()` returns
            its position, a dict, and `load_state_dict(state)` makes the next iteration continue there. An empty part
            has tensors and lists without samples. If the batch is something that cannot be cut, it has a sample of
            another rank, and the loader's `is_stand_in` is True: `train_step` and `evaluate` do not count it, and a
            manual loop passes weight=0 to `backward`. An iteration raises ValueError if it continues in the middle of
            an epoch, and the sampler does not draw this epoch again as before, or an iterable dataset has another
            number of workers, or with `stream` of ranks.

        Raises:
            TypeError, ValueError: An argument is not as described above, or the trainer is closed.
        """
        self._check_open()
        # In a run that continues, the seed is part of the position that the loader will take.
        is_new = not self._position.is_restored_next
        seed = self._gather(mix(self._progress.seed, "loader", self._position.num_loaders))[0] if is_new else 0
        num_shards = self._options.reproducible

        def split() -> PartOf:
            session = self._session
            if num_shards is None:
                return session.handshake.balance.split
            return functools.partial(
                shard_part, num_shards=num_shards, rank=session.rank, world_size=session.world_size
            )

        if stream is not None:
            dataset, options["stream"] = self._own_stream(dataset, stream)
        rule = SampleRule(self._options.batch_dim, self._options.split)
        place = seed, lambda: self._progress.counts, self.device, rule
        options |= {"shuffle": shuffle, "drop_last": drop_last, "sampler": sampler, "batch_sampler": batch_sampler}
        loader = ShardedDataLoader(dataset, batch_size, split, *place, **options)
        self._position.add(loader)
        return loader

    def _own_stream(self, dataset: Any, stream: Any) -> tuple[Any, tuple[int, Agree]]:
        """Return this rank's part of an iterable dataset, and `stream` of `ShardedDataLoader`. Collective, blocks."""
        if self._options.reproducible is not None or self._options.balance_speed:
            raise ValueError("stream= does not go with reproducible or balance_speed: batches depend on the ranks")
        self._recovery.disable("with stream= a killed rank's samples are lost")
        own, error = dataset, None
        try:
            own = own_stream(dataset, stream, self.rank, self.world_size)
        except Exception as raised:
            error = raised
        raise_alike(self._session.groups.steps, error)
        return own, (self.world_size, lambda *flags: self._session.handshake.has_batch(*flags))

    def epochs(self, num_epochs: int) -> Iterator[int]:
        """Iterate over the numbers of epochs, 0 to num_epochs - 1. Local.

            for epoch in trainer.epochs(10):
                for inputs, targets in loader:
                    trainer.train_step(inputs, targets, criterion, optimizer)

        After `load` or `resume` it begins with the epoch in which the earlier run was, and `trainer.loader` yields the
        rest of that epoch: after a checkpoint in epoch 3, `epochs(10)` yields 3 to 9. The same holds if only the loader
        was given the state of an earlier run (`loader.load_state_dict`).

        Args:
            num_epochs: Number of epochs of the whole training, those of an earlier run included. ValueError if it is
                not an int of at least 0.

        Returns:
            An iterator over the numbers of the epochs that are left.

        Raises:
            ValueError: `num_epochs` is not as described above.
        """
        if not isinstance(num_epochs, int) or isinstance(num_epochs, bool) or num_epochs < 0:
            raise ValueError(f"num_epochs must be an int of at least 0, not {num_epochs!r}")
        return self._position.epochs(num_epochs)

    @records_call
    def evaluate(
        self,
        loader: Iterable[Any],
        criterion: Callable[..., Any] | None = None,
        metrics: Mapping[str, Any] | None = None,
        *,
        weight: Callable[[Any], Any] | None = None,
    ) -> dict[str, Any]:
        """Compute the loss and metrics over all samples of a loader, each counted once. Collective, blocks.

            result = trainer.evaluate(loader, criterion, {"accuracy": lambda outputs, y: outputs.argmax(1) == y})
            print(result["loss"], result["accuracy"])

        The model is in evaluation mode during the call, and in its earlier mode afterwards. No gradients are computed.

        Args:
            loader: Iterable of pairs (inputs, targets): a loader made by `trainer.loader`, or any other. With
                `split_batches=True`, any other loader must yield whole batches, the same on every rank, and each rank
                computes a part of each. With `split_batches=False` it yields batches of this rank alone, in any number.
                ValueError for elements other than pairs, or if no rank has a sample. Inputs and targets have the forms
                that `train_step` takes.
            criterion: Loss function, as in `train_step`; with a `MeanLoss` the loss is the sum of all totals over the
                sum of all counts. ValueError if it returns one for some batches only. The default, None, computes no
                loss.
            metrics: Metrics by name: an object of torchmetrics, which is reset first; or a function of (outputs,
                targets) that returns a mean over samples, or a tensor of which the mean over all elements is taken,
                such as `lambda outputs, targets: outputs.argmax(1) == targets`. The default, None, computes no metrics.
                TypeError for other objects, ValueError for the name "loss" with a criterion.
            weight: Weight of a part of the batch in the criterion's mean, a function of its targets, as in
                `train_step`. The default, None, takes the mean that the criterion defines. ValueError without a
                criterion, or with one that has reduction "sum".

        Returns:
            A dict, the same on every rank: under "loss", if there is a criterion, the loss of all samples as if they
                were one batch (not the mean of the batches' losses), a float or the criterion's terms as floats in
                their structure; and each metric by its name, a float or what the torchmetrics object computes.

        Raises:
            TypeError, ValueError: An argument is not as described above, or the trainer is closed.
            MismatchError: Every rank must pass the same whole batches, but they differ. The same on every rank.
        """
        self._check_open(is_use=True)
        if weight is not None:
            if criterion is None:
                raise ValueError("weight= is for the criterion's mean, but there is no criterion: pass a criterion too")
            criterion = Weighted(criterion, weight)
        is_split = isinstance(loader, ShardedDataLoader) or not self._options.split_batches

        def run(session: Session) -> tuple[dict[str, Any], bool]:
            evaluation = Evaluation(criterion, metrics or {})
            evaluation.is_local = is_split and not (isinstance(loader, ShardedDataLoader) and loader.is_collective)
            parts = self._parts(session, loader, evaluation)
            dummy = session.handshake.rule.dummy
            result = evaluate(session.replica, parts, evaluation, session.groups.steps, self.device, dummy)
            return result, evaluation.has_plain

        result, has_plain = self._recovery.retry(run)
        if has_plain and criterion is not None and self.is_main and self.world_size > 1:
            self._warnings.about_criterion(criterion, computes_loss(self.model), False)
        self._clock.skip()
        return result

    @records_call
    def update_bn(self, loader: Iterable[Any], model: nn.Module | None = None) -> None:
        """Compute BatchNorm's running statistics again, over a whole loader, for SWA or EMA of weights. Collective.

            swa_model = torch.optim.swa_utils.AveragedModel(model)
            ...  # training, with swa_model.update_parameters(model)
            trainer.update_bn(loader, swa_model)

        It does what `torch.optim.swa_utils.update_bn` does, with the statistics of the global batches: the running
        statistics become the means over all batches. It blocks. torch's own function would take those of each rank's
        parts; with batches of `trainer.loader` on several ranks it raises ValueError.

        Args:
            loader: Iterable of inputs, or of tuples or lists that begin with the inputs. As for `evaluate`, it is made
                by `trainer.loader` or yields whole batches, or with `split_batches=False` as many batches of each rank.
                Inputs are a tensor. Errors are those of the `inputs` of `train_step`.
            model: Model whose statistics are computed, the same on every rank. The default, None, takes the trainer's
                model. TypeError if it is not a torch.nn.Module.

        Raises:
            TypeError, ValueError: An argument is not as described above, or the trainer is closed.
            MismatchError: The ranks' whole batches differ, or some rank has more batches. The same on every rank.
        """
        self._check_open(is_use=True)
        chosen = self.model if model is None else model
        if not isinstance(chosen, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
        is_split = isinstance(loader, ShardedDataLoader) or not self._options.split_batches

        def run(session: Session) -> None:
            def batches() -> Iterator[tuple[Any, bool]]:
                for batch in _of(loader):
                    inputs = batch[0] if isinstance(batch, (tuple, list)) else batch
                    handshake = session.handshake
                    if is_split:
                        num_samples = handshake.rule.count_uncut(inputs, None)
                    else:
                        inputs, _, num_samples = handshake.part_of(inputs, None)
                    is_dummy = self._is_out_of_data or num_samples == 0
                    yield handshake.rule.dummy(inputs, None)[0] if is_dummy else inputs, is_dummy

            with session.replica.around_step():
                update_bn(chosen, batches(), session.groups.steps, self.device)

        self._recovery.retry(run)
        self._clock.skip()

    @records_call
    def any(self, flag: Any) -> bool:
        """Return whether a flag is on, on any rank. Collective, blocks.

            if trainer.any(time.monotonic() > deadline):
                break  # all ranks end the loop in the same step

        Inside of the model and the criterion, and in elastic training, it is as `reduce`.

        Args:
            flag: True or False on this rank; anything that `bool` takes, such as a tensor with one element.

        Returns:
            The same on every rank.

        Raises:
            ValueError: The trainer is closed.
            Exception: `bool(flag)` raises on any rank. The same on every rank.
            MismatchError: Ranks make different calls. The same on every rank.
        """
        return self._call_ranks(lambda calls: calls.any(flag))

    @records_call
    def reduce(self, value: Any, op: Literal["sum", "mean", "min", "max"] = "sum") -> Any:
        """Reduce a number or a tensor over the ranks, to the same bits on every rank. Collective, blocks.

            num_correct = trainer.reduce(num_correct)  # on every rank, its own number

        The result has no gradient. Every rank receives the values of all ranks, so it is for figures and small tensors.
        In the model and the criterion it may be called by every rank alike; a rank without samples counts for nothing
        there. If ranks are killed in elastic training, it is the reduction over those that are left.

        Args:
            value: An int, float or bool, or a dense tensor of any shape, dtype and device; the same shape and dtype on
                every rank. TypeError for anything else, for the mean of an integer or bool tensor, the sum of a bool
                tensor, and the minimum or maximum of complex numbers.
            op: "sum" (the default), "mean" (over the ranks, each of which counts once), "min" or "max". ValueError for
                anything else.

        Returns:
            A number for a number: an exact int for ints, also for the sum of bools; a float for the mean. For a tensor
            a new tensor of its shape, dtype and device. 16-bit types are added in float32. A NaN on any rank makes the
            result NaN.

        Raises:
            TypeError, ValueError: An argument is not as described above, on any rank (the same on every rank), or the
                trainer is closed; or it is called in a `train_step` with `reproducible`.
            MismatchError: The ranks' values have other dtypes or shapes, or ranks make different calls. The same on
                every rank.
        """
        return self._call_ranks(lambda calls: calls.reduce(value, op))

    @records_call
    def gather(self, tensor: Tensor) -> Tensor:
        """Join the ranks' tensors along the first dimension, in rank order. Collective, blocks.

            def contrastive(own, targets):  # the rows of this rank, against those of all ranks
                everyone, labels = trainer.gather(own), trainer.gather(targets)
                similarity = F.normalize(own) @ F.normalize(everyone).t()
                return F.binary_cross_entropy_with_logits(similarity, (targets[:, None] == labels).float())

        It is differentiable: in backward each rank gets the sum over all ranks of the gradients for its rows. So if
        each rank's loss is the mean over its own rows, `train_step` and `backward` compute the gradient of the mean
        over all rows.

        In the model and the criterion every rank makes the same calls. A rank that has no samples computes with a
        dummy: the other ranks do not get its rows, but it gets them itself, so that own rows are always in the result.
        With `microbatches` each piece is gathered by itself, as in one process that accumulates gradients over these
        pieces. In a loop of your own, a rank without samples passes a tensor without rows.

        If ranks are killed in elastic training, a call in `train_step` is repeated with the step. Elsewhere the result
        has the rows of the ranks that are left; a call that has a gradient raises.

        Args:
            tensor: Dense, with at least one dimension, on any device. The number of rows may differ between ranks, and
                be 0; other dimensions, the dtype and whether there is a gradient may not. TypeError for anything else,
                ValueError for a tensor without dimensions.

        Returns:
            A new tensor with the rows of all ranks, the same on every rank, except for the rows of a dummy.

        Raises:
            TypeError, ValueError: The argument is not as described above, on any rank (the same on every rank), or the
                trainer is closed; or it is called in a `train_step` with `reproducible`.
            MismatchError: The ranks' tensors do not fit together, or ranks make different calls. The same on every
                rank.
            RuntimeError: Its gradient is to be differentiated (`create_graph=True`). The same on every rank.
        """
        has_graph = isinstance(tensor, Tensor) and tensor.requires_grad and torch.is_grad_enabled()
        return self._call_ranks(lambda calls: calls.gather(tensor), is_repeatable=not has_graph)

    def _call_ranks(self, call: Callable[[ScriptCalls], _Result], is_repeatable: bool = True) -> _Result:
        """Make a call of the script, in a step as a part of it. Collective, blocks."""
        self._check_open(is_use=True)
        calls = self._session.replica.script_calls
        if calls.is_active or not is_repeatable:
            return call(calls)
        return self._recovery.retry(lambda session: call(session.replica.script_calls))

    def save(
        self, folder: str | os.PathLike[str], *, keep: int = 2, trainable_only: bool = False, **objects: Any
    ) -> None:
        """Save a checkpoint in the next step. A call on one rank is enough; other ranks may call it, too. Local.

            trainer.save("checkpoints", optimizer=optimizer, scheduler=scheduler)

        The call returns at once. A checkpoint can be loaded with any number of ranks (`load`, `resume`).

        The other ranks learn of the call in the next `train_step` or `backward`. There each rank copies its part of the
        state as it was before that step, and a thread writes the copy while training continues (docs/reliability.md).
        If no step follows, the checkpoint is made when all ranks have called `close` or reached the end of the process.
        If it cannot be written, every rank gets a CheckpointError, in that step, a later one or `close`.

        Args:
            folder: Path of a folder on a file system that all machines share; made if it does not exist. A checkpoint
                is a folder in it, such as `step-00001234`, which appears when it is complete. TypeError if it is not a
                path; ValueError if an earlier save to another folder still waits for its step.
            keep: Number of checkpoints that stay in the folder, the newest ones; older ones are removed. The default is
                2. ValueError if it is not an int of at least 1.
            trainable_only: Leave out the model's parameters that are frozen (`requires_grad=False`), such as the base
                of a model with LoRA adapters; buffers are saved. `load` and `resume` then need a model whose frozen
                parameters have the same values already; a checksum in the checkpoint makes others a ValueError. The
                default, False, saves the whole model. TypeError if it is not a bool.
            objects: Objects to save by name, besides the model, the random states, the number of steps and the
                positions of `trainer.loader`s: optimizers, schedulers, GradScalers, anything with `state_dict` and
                `load_state_dict`, and lists or tuples of such objects, saved by position. If an object is not an
                optimizer that this trainer has used, the state on the calling rank is saved (on the lowest one, if
                several ranks call). TypeError for objects without these methods, ValueError for the name `model`.

        Raises:
            TypeError, ValueError: An argument is not as described above, or the trainer is closed.
        """
        self._check_open(is_use=True)
        self._checkpointer.request(Request.check(folder, keep, objects, trainable_only))

    @records_call
    def load(self, folder: str | os.PathLike[str], **objects: Any) -> int:
        """Continue from a checkpoint, which any number of ranks may have written. Collective, blocks.

            trainer.load("checkpoints/step-00001234", optimizer=optimizer, scheduler=scheduler)

        `resume` is for scripts that are started again: it takes the newest complete checkpoint, accepts that there is
        none yet, and also saves on a signal. When to call `load`: see `resume`.

        Args:
            folder: Path of the checkpoint, or of the folder that was passed to `save`; the latter means its newest
                checkpoint. TypeError if it is not a path.
            objects: Objects to load by name: all names that `save` was given, and no others; lists of the same lengths.
                TypeError for objects without `state_dict` and `load_state_dict`, ValueError for the name `model`.

        Returns:
            The number of steps that were made before the checkpoint.

        Raises:
            TypeError, ValueError: An argument is not as described above, or the trainer is closed.
            ValueError: The checkpoint is of another model, or has other objects. The same on every rank; nothing has
                changed.
            CheckpointError: There is no checkpoint, or it is damaged. The same on every rank.
        """
        self._check_open(is_use=True)
        request = Request.check(folder, 1, objects)
        return reader.load(request.folder, request.objects, self._state, self._session.groups.steps)

    @records_call
    def resume(
        self, folder: str | os.PathLike[str], *, keep: int = 2, trainable_only: bool = False, **objects: Any
    ) -> int | None:
        """Continue from the newest complete checkpoint in `folder`, if there is one. Collective, blocks.

            trainer.resume("checkpoints", optimizer=optimizer)
            for epoch in trainer.epochs(10):
                ...

        Any number of ranks may have written the checkpoint. With `trainer.epochs` and `trainer.loader` the run ends
        with the same bits as an uninterrupted one if the number of ranks is the same, or with `reproducible`. Call it
        after the optimizers are made, and before the first step and the loop over `trainer.epochs`; `trainer.loader`s
        may be made before or after, in the same order as in the earlier run.

        From now on the signal SIGUSR1, sent to any rank, makes all ranks save in `folder` in the next step and then
        ends the job with exit code 0. Slurm sends it with `#SBATCH --signal=USR1@120`, 120 s before the time limit.

        Args:
            folder: Path of the folder that was passed to `save`. TypeError if it is not a path.
            keep: Number of checkpoints that stay in the folder after a save that the signal asks for, the newest ones.
                The default is 2. ValueError if it is not an int of at least 1.
            trainable_only: Whether a save that the signal asks for leaves out frozen parameters, as in `save`. The
                default is False. What is loaded does not depend on it.
            objects: Objects to load by name: all names that `save` was given, and no others; lists of the same lengths.
                The signal saves them, too. TypeError for objects without `state_dict` and `load_state_dict`, ValueError
                for the name `model`.

        Returns:
            The number of steps that were made before the checkpoint; None if there is no checkpoint.

        Raises:
            TypeError, ValueError: An argument is not as described above, or the trainer is closed.
            ValueError: The checkpoint is of another model, or has other objects. The same on every rank; nothing has
                changed.
            CheckpointError: There are checkpoints, but none is complete. The same on every rank.
        """
        self._check_open()
        request = Request.check(folder, keep, objects, trainable_only)
        self._recovery.allow_replacement(request.objects)
        if isinstance(self._recovery, ElasticRecovery) and self._recovery.is_waiting:
            step: int | None = self._recovery.take_place(request.objects)
        else:
            step = reader.resume(request.folder, request.objects, self._state, self._session.groups.steps)
        self._checkpointer.save_on_signal(request)
        return step

    @records_call
    def export(self, path: str | os.PathLike[str]) -> None:
        """Write the model's weights and buffers to one file, for inference. Collective, blocks.

            trainer.export("model.safetensors")

        Any program reads it without this package and without MPI (docs/inference.md). Rank 0 writes what
        `model.state_dict()` returns there; tensors that are the same object, such as tied weights, once. Readers see
        the earlier file or the complete new one. To continue a training, use `save`.

        Args:
            path: Path of the file, in the safetensors format; a file of that name is replaced. TypeError if it is not a
                path.

        Raises:
            TypeError, ValueError: An argument is not as described above, or the trainer is closed.
            ValueError: The model's `state_dict()` has something other than tensors of dense real numbers. The same on
                every rank.
            OSError: Rank 0 cannot write the file. The same on every rank.
        """
        self._check_open(is_use=True)
        target = Path(path)
        self._recovery.retry(lambda session: export(target, self.model, session.groups.steps))

    def progress(self, batches: Iterable[Any], description: str = "") -> Iterator[Any]:
        """Iterate over batches; rank 0 shows how many are done, the loss, samples per second and the time left. Local.

            for inputs, targets in trainer.progress(loader, f"epoch {epoch}"):
                trainer.train_step(inputs, targets, criterion, optimizer)

        It shows a progress bar if tqdm is installed and stderr is a terminal; else it prints a line to stderr every ten
        seconds and one at the end. Loss and samples are those of `train_step`; manual loops are not counted.

        Args:
            batches: Any iterable, such as a loader. The time left is shown if it has a length. TypeError if it is not
                iterable.
            description: Text before the bar or line. The default, "", shows none.

        Returns:
            An iterator over the elements of `batches`, unchanged.
        """
        return self._reporter.progress(batches, description, is_shown=self.is_main)

    def log_to(self, writer: Any, every: int = 1) -> None:
        """Log figures of every `every`-th `train_step` to a TensorBoard writer or another one, on rank 0. Local.

            from torch.utils.tensorboard import SummaryWriter  # pip install tensorboard

            trainer.log_to(SummaryWriter("runs/first"), every=10)  # look at it with: tensorboard --logdir runs

        Only rank 0's writers get figures: it makes no difference whether other ranks call it, too. Each `train_step`
        that is logged ends with a small exchange between the ranks. Several calls add several writers.

        The figures are: loss, learning_rate (of the optimizer's first group; with a list of optimizers that of the
        first, and learning_rate_1, learning_rate_2 and so on of the others), gradient_norm (with `clip_norm`),
        loss_scale (with `precision="float16"`), samples_per_second, share_waited (share of the step's time, 0 to 1,
        that rank 0 waited for other ranks and the exchange) and slowest_rank (the rank whose own work took longest).

        Args:
            writer: A torch.utils.tensorboard.SummaryWriter, or an object with a method log(dict, step). TypeError for
                other objects.
            every: Number of steps from one record to the next. The default, 1, logs every step. ValueError if it is not
                an int of at least 1.

        Raises:
            TypeError, ValueError: An argument is not as described above.
        """
        check_writer(writer, every)
        self._reporter.add(writer, every)

    def log(self, figures: Mapping[str, float]) -> None:
        """Log your own figures to the writers of `log_to`, with the number of the last step, on rank 0. Local.

            trainer.log({"validation_loss": loss})

        On ranks other than 0, and without `log_to`, it does nothing.

        Args:
            figures: Numbers by name. An error that the writer raises for other values is passed on.
        """
        if self.is_main:
            self._reporter.log(dict(figures), self._progress.num_steps)

    @records_call
    def summary(self) -> Summary:
        """Measure where the time of `train_step` went, and which rank the others waited for. Collective, blocks.

            summary = trainer.summary()
            if trainer.is_main:
                print(summary)

        The phases are "data" (the time between two steps, except for `evaluate`), "agreement" (the comparison of the
        batches), "forward", "backward", "exchange" (the wait for the sums of gradients) and "optimizer". BatchNorm's
        exchange counts as forward and backward. On GPUs these are times of the host, which runs ahead of the device.

        Returns:
            Means over the last 1000 steps at most, without the first, in seconds; the same on every rank, and 0 before
            the second step. `str()` of it is a table. Some attributes: `seconds` (a dict by phase),
            `samples_per_second`, `waiting_seconds`, `slowest_rank` and `slowest_phase`.

        Raises:
            ValueError: The trainer is closed.
        """
        self._check_open()
        return self._recovery.retry(lambda session: summarise(self._clock, self._counters(), session.groups.steps))

    def profile(self, path: str | os.PathLike[str]) -> contextlib.AbstractContextManager[None]:
        """Write a timeline of all ranks' steps in a `with` block to one file. Collective at both ends, blocks.

            with trainer.profile("trace.json"):
                for inputs, targets in itertools.islice(loader, 10):
                    trainer.train_step(inputs, targets, criterion, optimizer)

        The file is for https://ui.perfetto.dev (docs/training.md says what it shows). It works in manual loops, too. If
        the block raises, no file is written.

        Args:
            path: Path of the file, which rank 0 writes; an existing file is replaced.

        Returns:
            The context manager of the block.

        Raises:
            TypeError: `path` is not a path.
            OSError: Rank 0 cannot write the file. The same on every rank; raised before the block if the file cannot be
                opened by then.
            ValueError: The block is inside another `profile`, there was no step in it, or the trainer is closed.
        """
        self._check_open()
        session = self._session
        return profile(path, session.groups.steps, (self._clock, session.replica.gradients))

    @records_call
    def close(self) -> None:
        """Release the model: its gradients are no longer summed. Collective, blocks. MPI stays in use.

        It waits until every rank has called it or has reached the end of its process, and then makes the last `save`
        that still waits for a step. So all ranks close their trainers in the same order. Later steps raise ValueError,
        and `loss.backward()` is that of plain torch.

        Call it at the end of the script, or use `with`. Without it the end of the process does the same, except with a
        `group` of torch.distributed. A rank that still waits for this one in a step gets a DistributedTrainerError.

        Raises:
            CheckpointError: A checkpoint was not made. The same on every rank.
            MismatchError: The ranks' weights differ. The same on every rank. (Code that changes the weights on one rank
                for its own use, such as to save an average of them, belongs after this call.)
        """
        self._close(meets=True)

    def _close(self, meets: bool) -> None:
        self._is_closed = True
        self._warnings.close(is_loud=meets)
        self._recovery.end()
        if self._owns_groups:
            self._session.groups.gradients.close()
            self._session.groups.steps.close()
        try:
            if meets:
                flags = self._checkpointer.finalize(self._recovery, StepFlags.ENDS_TRAINING)
                if flags & StepFlags.ENDS_TRAINING:
                    self._recovery.retry(lambda session: session.replica.divergence.check_at_end(session.groups.end))
            else:
                self._checkpointer.abandon()
        finally:
            self._session.replica.close()

    def __enter__(self) -> DistributedTrainer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close(meets=kind is None or issubclass(kind, SystemExit))

    def __repr__(self) -> str:
        return (
            f"DistributedTrainer({type(self.model).__name__}, rank {self.rank} of {self.world_size}, "
            f"device={str(self.device)!r}, split_batches={self._options.split_batches})"
        )

    def _takes_whole_batches(self, inputs: Any, targets: Any) -> bool:
        """Return whether every rank passes the same batch to `train_step`; else each passes its part.

        The first step decides.

        Raises:
            ValueError: Earlier steps took whole batches, but these samples are a part.
        """
        position = self._position
        if position.takes_parts is None:
            position.takes_parts = position.gives_parts
        is_whole = self._options.split_batches and not position.takes_parts
        if is_whole and position.gives_parts and position.is_given(inputs, targets):
            raise ValueError(
                "this trainer has trained on whole batches, the same on every rank, but this batch is of "
                "trainer.loader, which returns each rank's part. Use the loader from the first step on, or pass whole "
                "batches only."
            )
        return is_whole

    def _counts(self, inputs: Any, targets: Any) -> bool:
        """Return whether these samples of a part count. Local.

        Raises:
            ValueError: It is not known; see `DataPosition.is_stand_in`.
        """
        return not (self._is_out_of_data or self._position.is_stand_in(inputs, targets))

    def _parts(
        self, session: Session, loader: Iterable[Any], evaluation: Evaluation
    ) -> Iterator[tuple[Any, Any, int | None]]:
        """Yield inputs, targets and number of samples (None if it is not known) of this rank's parts.

        Iterations are collective and block if the loader yields whole batches, and else local.
        """
        for batch, source in self._position.with_sources(_of(loader)):
            inputs, targets = check_pair(batch)
            source = loader if isinstance(loader, ShardedDataLoader) else source
            if source is not None:
                evaluation.is_local = not source.is_collective
            if source is None and not evaluation.is_local:
                try:
                    part = session.handshake.part_of(inputs, targets, evaluation.error)
                except MismatchError as error:
                    if self._position.gives_parts:
                        error.args = (
                            f"{error} If these batches were read from trainer.loader before, such as into a list, pass "
                            f"the loader, or an iterator that reads it during evaluate.",
                        )
                    raise
                yield part
            elif source is not None and source.is_stand_in:
                yield inputs, targets, 0
            else:
                yield inputs, targets, session.handshake.rule.count_uncut(inputs, targets)

    def _gather(self, value: Any) -> list[Any]:
        """Gather a value from every rank. Collective, blocks."""
        return self._recovery.retry(lambda session: gather_objects(session.groups.steps, value))

    def _check_open(self, is_use: bool = False) -> None:
        if self._is_closed:
            raise ValueError("this trainer was closed; make another with create_distributed_trainer")
        if is_use:
            self._warnings.is_used = True

    def _check_optimizers(
        self, optimizer: Any, has_closure: bool = True
    ) -> tuple[tuple[torch.optim.Optimizer, ...], list[list[int]]]:
        """Return the optimizers of a step, and the ids of the model's parameters that each updates. Local.

        Raises:
            TypeError, ValueError: They are not as `train_step` describes them.
        """
        optimizers = tuple(optimizer) if isinstance(optimizer, list | tuple) else (optimizer,)
        if not optimizers:
            raise TypeError("optimizer must be a torch.optim.Optimizer, or a list of at least one, not an empty list")
        for one in optimizers:
            if not isinstance(one, torch.optim.Optimizer):
                where = "" if one is optimizer else "each optimizer of the list "
                raise TypeError(f"{where or 'optimizer '}must be a torch.optim.Optimizer, not {type(one).__name__}")
        ids = self._session.replica.check_optimizers(optimizers)
        for one, own_ids in zip(optimizers, ids, strict=True):
            if not self._warnings.knows(one):
                if not has_closure:
                    self._warnings.check_closure(one)
                self._state.register_optimizer(one)
                self._warnings.about_optimizer(one, own_ids, is_loud=self.is_main)
        return optimizers, ids


def _of(loader: Iterable[Any]) -> Iterable[Any]:
    """Return the batches of a loader, for the trainer itself."""
    return loader.parts() if isinstance(loader, ShardedDataLoader) else loader
