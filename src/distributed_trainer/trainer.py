# SPDX-License-Identifier: Apache-2.0
"""The trainer: one training step on the global batch, computed by all ranks, each on its part."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from .advice import Advice
from .agreement import Agreement
from .alignment import draw_seed
from .backend import gather_objects
from .computation import StepComputation
from .criterion import Weighted
from .data import batch_size, map_tensors, slice_batch
from .elastic import Elastic, Membership
from .evaluate import Evaluation, evaluate
from .loader import PartLoader, PartOf
from .memory import FittingPieces
from .options import TrainerOptions
from .own_loop import OwnLoop
from .places import noted
from .positions import Positions
from .profile import profile
from .replica import Replica, ReproducibleReplica
from .reporting import Reporter, check_writer
from .reproducible import shard_part
from .save_and_load import SaveAndLoad
from .saving import Saving
from .timing import OPTIMIZER, StepClock, Summary, summarise
from .training_state import TrainingState


class DistributedTrainer(OwnLoop, SaveAndLoad, Elastic):
    """Trains a model with all ranks of a job. Made by `create_distributed_trainer`; a context manager.

    Attributes:
        model: The model that was given; use it for evaluation and saving as usual.
        rank: This process's number, 0 to world_size - 1.
        world_size: Number of ranks.
        local_rank: This process's number on its machine.
        device: Where this rank's model is.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: tuple[Any, Any, Any],
        device: torch.device,
        local_rank: int,
        options: TrainerOptions,
        owns_groups: bool = True,
        membership: Membership | None = None,
    ) -> None:
        self.model = model
        self.device = device
        self._options = options
        self._owns_groups = owns_groups
        self._membership = membership
        self._is_closed = False
        self._positions = Positions()
        self._advice = Advice()
        self._clock = StepClock()
        self._reporter = Reporter(groups[1])
        kind = Replica if options.reproducible is None else ReproducibleReplica
        replica = kind(model, groups[:2], device, options)
        self._state = TrainingState(model, replica, self._positions, device, options.split_batches)
        self._saving = Saving(self._state, groups[1], groups[2], meets_at_exit=owns_groups)
        self._fitting = FittingPieces(model, groups[1], device)
        self._agreement = Agreement(groups[1], options, self._flags)
        self._first_world_size = groups[1].size()
        self._join(groups, local_rank, replica)

    def _join(self, groups: tuple[Any, Any, Any], local_rank: int, replica: Replica) -> None:
        """Takes part in steps with the ranks of these groups. Local."""
        self._group = groups[1]
        self._own_groups = groups[:2] if self._owns_groups else ()  # which end with the trainer
        self.rank: int = self._group.rank()
        self.world_size: int = self._group.size()
        self.local_rank = local_rank
        self._replica = self._state.replica = replica
        of_step = self._agreement, replica, self._fitting, self._clock, self._saving
        self._computation = StepComputation(*of_step, self._options, self.device, self._num_pieces())

    @property
    def num_skipped_steps(self) -> int:
        """Steps that changed no parameter, since a gradient was infinite or NaN; the same on every rank.

        Only with `nonfinite_gradients="skip"`.
        """
        return self._replica.num_skipped_steps

    @property
    def gradient_norm(self) -> Tensor | None:
        """That of the last step with `clip_norm`, before clipping: 0-dimensional, the same on every rank."""
        return self._replica.gradient_norm

    @noted
    def train_step(
        self,
        inputs: Any,
        targets: Any,
        criterion: Callable[..., Any],
        optimizer: torch.optim.Optimizer,
        *,
        microbatches: int | str = 1,
        weight: Callable[[Any], Any] | float | None = None,
        clip_norm: float | None = None,
    ) -> Any:
        """Trains one step on the global batch: forward, backward, mean over all ranks, `optimizer.step()`.

        Collective, blocks. Afterwards the parameters on every rank are what one process gets on the whole batch. The
        learning rate is not to be scaled by the number of ranks. Gradients stay in `.grad` until the next step; with
        `shard_optimizer=True` there are none.

        Args:
            inputs: A tensor, or a tuple, list or dict of tensors, nested as you like; a dict is passed to the model as
                keywords, a tuple or list as positional arguments. All tensors share the first dimension, the samples.
            targets: Likewise; passed to the criterion as they are.
            criterion: Called as criterion(outputs, targets). With reduction "mean" (of samples, elements or weighted
                targets, as the loss defines it) or "sum". Any other callable counts as a mean over samples, unless
                there is a `weight`. It may return several terms, in a tuple, list or dict; the loss is their sum.
            optimizer: Of the model's parameters. Make it once: a new one has lost its state. With
                `shard_optimizer=True` its groups hold this rank's flat part of each parameter from the first step on;
                `state_dict()` is then collective, and gives and takes what an ordinary optimizer does.
            microbatches: Pieces in which the batch is computed, one after the other, for less memory. Exact whatever
                their sizes; BatchNorm uses the statistics of each piece over all ranks, as one process that
                accumulates gradients does. The same on every rank. "auto" begins with one; where memory runs out on
                any rank, the step is repeated with twice as many, which later steps keep (docs/training.md).
            weight: What a part of the batch counts in the mean, for a loss of your own: a function of the part's
                targets that adds up over parts, such as `lambda targets: (targets != PAD).sum()`. With
                `split_batches=False` also the number for this rank's part.
            clip_norm: Scales the gradients so that their norm, over all parameters of the optimizer, is at most this.
                `gradient_norm` holds what it was before.

        Returns:
            The loss of the global batch, 0-dimensional and detached, with the same bits on every rank. Of a criterion
            with several terms, these in the same structure.

        Raises:
            TypeError, ValueError: An argument is not what is described here. Raised before any communication.
            MismatchError: With whole batches, the ranks' batches differ. The same on every rank, before any has
                changed its parameters. Or, in every hundredth step and after it, the ranks' weights differ.
            FloatingPointError: A gradient is infinite or NaN, with `nonfinite_gradients="raise"`. The same on every
                rank; no parameter has changed, and training can go on.
            torch.OutOfMemoryError: With `microbatches="auto"`, a single sample is too large for some rank. The same on
                every rank.
            DistributedTrainerError: A rank has left the job or closed its trainer, or the transport failed.
        """
        self._check_open()
        if not callable(criterion):
            raise TypeError(f"criterion must be callable, such as nn.CrossEntropyLoss(), not {criterion!r}")
        if weight is not None:
            criterion = Weighted(criterion, weight)
        self._check_step(criterion, optimizer, microbatches, weight, clip_norm)
        clock = self._clock
        num_samples = batch_size({"inputs": inputs, "targets": targets})
        own_samples = num_samples / self.world_size if self._agreement.takes_whole_batches else num_samples
        clock.start(own_samples)

        def compute(inputs: Any, targets: Any) -> tuple[list[float], Any]:
            num_samples = batch_size({"inputs": inputs, "targets": targets})
            attempt = functools.partial(self._computation.run, inputs, targets, criterion, num_samples)
            return self._fitting.run(attempt) if microbatches == "auto" else attempt(microbatches)

        def update(is_alone: bool) -> None:
            self._replica.update(optimizer, clip_norm, is_alone=is_alone)

        totals, loss = self._survive(inputs, targets, compute, update)
        clock.mark(OPTIMIZER)
        figures = {
            "learning_rate": optimizer.param_groups[0].get("lr"),
            "gradient_norm": None if clip_norm is None else self.gradient_norm,
        }
        self._reporter.note(self._replica.num_steps, sum(totals), own_samples, *clock.end(), figures)
        self._advice.note_optimizer(optimizer, self._replica.parameter_ids(optimizer))
        remaining = iter(totals)
        return map_tensors(lambda term: torch.tensor(next(remaining), dtype=term.dtype, device=term.device), loss)

    def split(self, batch: Any) -> Any:
        """This rank's part of a batch that every rank has: views of its tensors, of any nesting. Local.

        Parts are contiguous, in rank order, and differ by at most one sample (but with `balance`); with fewer samples
        than ranks some are empty.
        """
        return slice_batch(batch, *self._agreement.balance.split(batch_size({"batch": batch})))

    def batches(self, loader: Iterable[Any]) -> Iterator[Any]:
        """Iterates over this rank's own loader until every rank's is at its end. Each step is collective.

        For `split_batches=False`, with one `train_step` for each batch. A rank whose loader has ended gets its last
        batch again, with which it takes part in the step, but which counts for nothing; so every sample counts once,
        whatever the number of batches on each rank.

        Raises:
            ValueError: The trainer takes whole batches, or some rank's loader is empty while another's is not (the
                same on every rank).
        """
        if self._options.split_batches:
            raise ValueError(
                "batches() is for loaders that differ between ranks. This trainer takes whole batches; make it with "
                "split_batches=False, or iterate over the loader itself."
            )
        batch, has_any = None, False
        for batch in loader:
            has_any = True
            self._agreement.has_batch(has_batch=True, has_any=True)
            yield batch
        while self._agreement.has_batch(has_batch=False, has_any=has_any):
            self._agreement.is_out_of_data = True
            try:
                yield batch
            finally:
                self._agreement.is_out_of_data = False

    @noted
    def loader(
        self, dataset: Dataset[Any], batch_size: int, *, shuffle: bool = False, drop_last: bool = False, **options: Any
    ) -> PartLoader:
        """A loader of global batches of which each rank reads its part only. Collective, blocks.

        From now on `train_step` takes parts, as this gives them. Which samples a batch holds, their order in each epoch
        and what augmentation draws for them (from `random`, NumPy and torch) are the same for any number of ranks and
        workers; there is no sampler and no `set_epoch`.

        Args:
            dataset: With an index, or iterable; then each rank goes through all of it and keeps its part.
            batch_size: Samples of a global batch.
            shuffle: A new order in each epoch, by a seed from torch's random stream: `torch.manual_seed` sets it.
            drop_last: Leave out a last batch that is smaller.
            options: Others of torch.utils.data.DataLoader: `num_workers`, `collate_fn`, `pin_memory` and so on.

        Raises:
            TypeError, ValueError: An argument is not what is described here.
            ValueError: The trainer has trained on whole batches.
        """
        self._check_open()
        if self._agreement.takes_whole_batches and self._replica.num_steps != self._positions.begun_at[0]:
            raise ValueError(
                "this trainer has trained on whole batches, which every rank passes alike. Make the loader before the "
                "first step, or pass whole batches only."
            )
        # A run that goes on has drawn it already.
        draws = not self._positions.is_restored_next
        own_seed = draw_seed() if draws else 0
        seed = self._repeat(lambda: gather_objects(self._group, own_seed)[0]) if draws else 0
        num_shards = self._options.reproducible

        def split() -> PartOf:
            if num_shards is None:
                return self._agreement.balance.split
            return functools.partial(shard_part, num_shards=num_shards, rank=self.rank, world_size=self.world_size)

        place = seed, lambda: self._replica.progress, self.device
        loader = PartLoader(dataset, batch_size, split, *place, shuffle=shuffle, drop_last=drop_last, **options)
        self._agreement.takes_whole_batches = False
        self._positions.add(loader)
        return loader

    def epochs(self, num_epochs: int) -> Iterator[int]:
        """Gives the numbers of epochs, 0 to num_epochs - 1. Local.

        After `load` or `resume` it begins with the epoch in which that run was, of which `trainer.loader` then gives
        the rest; likewise if `trainer.loader` alone was given its state of an earlier run (`load_state_dict`).

            for epoch in trainer.epochs(10):
                for inputs, targets in loader:
                    trainer.train_step(inputs, targets, criterion, optimizer)
        """
        if not isinstance(num_epochs, int) or isinstance(num_epochs, bool) or num_epochs < 0:
            raise ValueError(f"num_epochs must be an int of at least 0, not {num_epochs!r}")
        return self._positions.epochs(num_epochs)

    @noted
    def evaluate(
        self,
        loader: Iterable[Any],
        criterion: Callable[..., Any] | None = None,
        metrics: Mapping[str, Any] | None = None,
        *,
        weight: Callable[[Any], Any] | None = None,
    ) -> dict[str, Any]:
        """The loss and metrics over all samples of a loader, each counted once. Collective, blocks.

        The model is in evaluation mode meanwhile, without gradients.

        Args:
            loader: Gives pairs (inputs, targets). One of `trainer.loader`'s gives parts, any other what
                `split_batches` says: whole batches, the same on every rank, of which each rank computes a part, or
                batches of this rank's own, in any number.
            criterion: As of `train_step`.
            metrics: By name, an object of torchmetrics, which is reset first, or a function of (outputs, targets) that
                returns a mean over samples, or a tensor to take the mean of, such as
                `lambda outputs, targets: outputs.argmax(1) == targets`.
            weight: As of `train_step`, for the criterion.

        Returns:
            "loss" if there is a criterion, as one process has it over all samples, and each metric by its name:
            numbers, or what the torchmetrics object computes. The same on every rank.

        Raises:
            TypeError, ValueError: An argument is not what is described here, or there are no samples.
            MismatchError: With whole batches, the ranks' batches differ. The same on every rank.
        """
        self._check_open()
        if weight is not None:
            criterion = Weighted(criterion, weight)
        is_split = isinstance(loader, PartLoader) or not self._options.split_batches

        def run() -> dict[str, Any]:
            parts = loader if is_split else self._parts_of(loader)
            return evaluate(self.model, parts, Evaluation(criterion, metrics or {}), self._group, self.device)

        result = self._repeat(run)
        self._clock.skip()
        return result

    def progress(self, batches: Iterable[Any], description: str = "") -> Iterator[Any]:
        """Gives the batches, and shows on rank 0 how far they are: loss, samples per second, time left. Local.

        A bar of tqdm's if that is installed and the errors go to a terminal; else a line every ten seconds and one at
        the end.

            for inputs, targets in trainer.progress(loader, f"epoch {epoch}"):
                trainer.train_step(inputs, targets, criterion, optimizer)
        """
        return self._reporter.progress(batches, description)

    def log_to(self, writer: Any, every: int = 1) -> None:
        """Writes figures of every `every`th `train_step` from rank 0. Every rank calls it, the others with any writer.

        They are: loss, learning_rate (of the first group), gradient_norm (with `clip_norm`), samples_per_second,
        share_waited (of the step, for other ranks and the exchange) and slowest_rank (which took longest by itself).

        Args:
            writer: torch.utils.tensorboard.SummaryWriter, or an object with log(dict, step).
            every: The same on every rank.

        Raises:
            TypeError, ValueError: An argument is not what is described here.
        """
        check_writer(writer, every)
        self._reporter.add(writer, every)

    def log(self, figures: Mapping[str, float]) -> None:
        """Writes figures of your own beside those of the last step, on rank 0. Local."""
        self._reporter.log(dict(figures), self._replica.num_steps)

    @noted
    def summary(self) -> Summary:
        """Where the time of `train_step` went, and which rank the others waited for. Collective, blocks.

        `print(trainer.summary())` shows it. Time between two steps counts as "data", but for `evaluate`. "Agreement" is
        the comparison of the batches, "exchange" what of the sums of gradients was waited for. BatchNorm's exchange
        counts as forward and backward. On GPUs these are times of the host, which runs ahead of the device.
        """
        self._check_open()
        counters = dict if self._membership is None else self._membership.counters
        return self._repeat(lambda: summarise(self._clock, counters(), self._group))

    def profile(self, path: str | os.PathLike[str]) -> contextlib.AbstractContextManager[None]:
        """Writes a timeline of the steps in a `with` block, of all ranks, to one file. Collective at both ends, blocks.

            with trainer.profile("trace.json"):
                for inputs, targets in itertools.islice(loader, 10):
                    trainer.train_step(inputs, targets, criterion, optimizer)

        It is for https://ui.perfetto.dev (docs/training.md says what it shows). Works in loops of your own too. If the
        block raises, no file is written.

        Args:
            path: Of the file, which rank 0 writes.

        Raises:
            OSError: Rank 0 cannot write the file. The same on every rank, before the block if that is known by then.
            ValueError: Inside of another `profile`, or there was no step in the block.
        """
        self._check_open()
        return profile(path, self._group, (self._clock, self._replica.gradients))

    @noted
    def close(self) -> None:
        """Lets go of the model: its gradients are no longer summed. Collective, blocks; MPI goes on.

        It waits until every rank has called it, or ends, and then makes the save that any has asked for last. So ranks
        close their trainers in one order. Ranks of this machine that wait for this one in a step get an error.

        Raises:
            CheckpointError: A checkpoint was not made. The same on every rank.
        """
        self._close(meets=True)

    def _close(self, meets: bool) -> None:
        self._is_closed = True
        self._end_elastic()
        for group in self._own_groups:
            group.close()
        try:
            if meets:
                self._saving.meet()
            else:
                self._saving.leave()
        finally:
            self._replica.close()

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

    def _parts_of(self, loader: Iterable[Any]) -> Iterator[Any]:
        """This rank's parts of whole batches. Each step is collective."""
        for batch in loader:
            self._agreement.check_same({"batch": batch})
            yield self.split(batch)

    def _check_open(self) -> None:
        if self._is_closed:
            raise ValueError("this trainer was closed; make another with create_distributed_trainer")

    def _check_step(
        self, criterion: Any, optimizer: Any, microbatches: Any, weight: Any, clip_norm: float | None
    ) -> None:
        is_auto = microbatches == "auto"
        if not is_auto and (not isinstance(microbatches, int) or isinstance(microbatches, bool) or microbatches < 1):
            raise ValueError(f'microbatches must be an int of at least 1, or "auto", not {microbatches!r}')
        if is_auto and self._options.compression is not None:
            raise ValueError(
                'microbatches="auto" does not go with compression, whose memory of earlier steps a repeated one would '
                "lose: pass a number"
            )
        if microbatches != 1 and self._options.reproducible is not None:
            raise ValueError("reproducible= computes each shard by itself: leave microbatches out, or make more shards")
        if weight is not None and not callable(weight) and (self._options.split_batches or microbatches != 1):
            raise ValueError(
                f"weight={weight!r} is of this rank's part, but here parts are cut from it: pass a function of the "
                f"targets, such as lambda targets: (targets != PAD).sum()"
            )
        self._check_optimizer(optimizer)
        if clip_norm is not None and not clip_norm > 0:
            raise ValueError(f"clip_norm must be above 0, not {clip_norm!r}")
        if self.rank == 0 and self.world_size > 1:
            self._advice.about_criterion(criterion)

    def _check_optimizer(self, optimizer: Any) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, not {type(optimizer).__name__}")
        is_known = self._advice.knows(optimizer)
        ids = self._replica.check_optimizer(optimizer, is_known)
        if not is_known:
            self._state.note_optimizer(optimizer)
            self._advice.about_optimizer(optimizer, ids, is_loud=self.rank == 0)
