# SPDX-License-Identifier: Apache-2.0
"""Loader of global batches, of which each rank reads only its part.

The samples of batch b in epoch e depend on the loader's seed alone. So they are the same for any number of ranks and of
workers; a rank reads a part of them. The random streams are seeded before each sample is read, from the seed, the epoch
and the sample's number, so the random numbers of augmentation do not depend on the rank or worker that reads a sample.
An iterable dataset draws from streams that are seeded for each epoch, and a collate function from streams seeded for
each batch. The script's streams are left alone. Nothing here communicates, unless each rank has a stream of its own.
"""

from __future__ import annotations

import inspect
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from . import rng
from .reading import Collate, PartReader, StreamKeys, StreamReader, WorkerStart
from .samples import SampleRule
from .sampling import BatchKey, IndexedBatches, PartOf, num_batches

Agree = Callable[[bool, bool, Exception | None], bool]  # `StepHandshake.has_batch`

_MANY = 1 << 30  # more samples than ranks
_UPDATE_BN = inspect.unwrap(update_bn)


class ShardedDataLoader:
    """Loader of this rank's parts of global batches. Each iteration is an epoch. `DistributedTrainer.loader` makes it.

    A part may be empty: its tensors then have no samples, and `train_step` takes part with a dummy. This also holds if
    `collate_fn` has dropped all samples of a rank, and kept others of the batch. If an empty part cannot be made of the
    batch (see `split` in `create_distributed_trainer`), a sample of another rank stands in for it: then `is_stand_in`
    is True, `train_step` and `evaluate` do not count it, and a manual loop passes weight=0. Iterating again
    gives the next epoch, in a different order with `shuffle`; `len()` is the number of batches in each epoch.
    `state_dict()` and `load_state_dict()` return and set the position, for a run that continues.

    Attributes:
        position: Position in the epochs. It outlives the loader.
        resumes: Whether the next iteration continues at the position that `load_state_dict` has set.
        given: Last part that was returned, while an iteration is in progress; otherwise None.
        is_stand_in: Whether `given` counts for nothing although it has samples, since this rank's part is empty.
        is_given_outdated: Whether `given` was cut for a set of ranks that has changed since then.
        num_given: Number of parts that were returned.
        is_collective: Whether iterations are collective, since each rank has samples of its own.

    Args:
        dataset: Dataset with an index, or an iterable one.
        batch_size: Number of samples of a global batch, at least 1; None with `batch_sampler`.
        split: Function that returns the present `PartOf`; called when an epoch begins.
        seed: Seed of the order and of the samples' random streams, the same on every rank.
        progress: Function that returns the trainer's progress, for bookmarks.
        device: Device whose random states bookmarks hold.
        rule: Rule by which a part without samples is made.
        shuffle: Choose a random order in each epoch; only for a dataset with an index.
        drop_last: Leave out the last batch of an epoch if it is smaller than `batch_size`.
        sampler: Iterable of the indices of an epoch's samples.
        batch_sampler: Iterable of the indices of each global batch of an epoch.
        stream: For an iterable dataset with this rank's samples alone: the number of ranks, and a function with which
            they agree whether any has a batch. Then each iteration is collective and blocks. None otherwise.
        options: Other arguments of `torch.utils.data.DataLoader`.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_size: int | None,
        split: Callable[[], PartOf],
        seed: int,
        progress: Callable[[], Any] = lambda: None,
        device: torch.device = torch.device("cpu"),  # noqa: B008
        rule: SampleRule | None = None,
        *,
        shuffle: bool = False,
        drop_last: bool = False,
        sampler: Iterable[Any] | None = None,
        batch_sampler: Iterable[Any] | None = None,
        stream: tuple[int, Agree] | None = None,
        **options: Any,
    ) -> None:
        if batch_sampler is not None:
            if batch_size not in (None, 1) or shuffle or sampler is not None or drop_last:
                raise ValueError(
                    "batch_sampler decides which samples are in each batch: pass no batch_size, shuffle, sampler or "
                    "drop_last beside it"
                )
            batch_size = None
        elif not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
            raise ValueError(
                f"batch_size, the number of samples of a global batch, must be an int of at least 1, not {batch_size!r}"
            )
        elif sampler is not None and shuffle:
            raise ValueError("the sampler decides the order: pass no shuffle beside it")
        if stream is not None and drop_last:
            raise ValueError("with stream each rank has a last batch of its own: leave drop_last out")
        if not options.get("in_order", True):
            raise ValueError("in_order=False would give each rank its parts of the batches in another order")
        self.position = LoaderPosition(seed)
        self.resumes = False
        self.given: Any = None
        self.is_given_outdated = self.is_stand_in = False
        self.num_given = 0
        self.is_collective = stream is not None
        self._agree = None if stream is None else stream[1]
        self._readers: dict[str, int] = {} if stream is None else {"num_ranks": stream[0]}
        self._dummy: Any = None  # batch from which an empty part is made when this rank's samples have ended
        self._num_to_skip = self._num_ended = 0  # see `_read`
        self._is_outdated = False  # the parts that were read ahead are for a set of ranks that has changed
        self._key: BatchKey | None = None  # key of the batch that was returned last
        self._progress, self._device = progress, device
        self._rule = SampleRule() if rule is None else rule
        collate = Collate(options.pop("collate_fn", None) or default_collate, self._rule.batch_dim)
        self._split = split  # called only when an epoch begins, since batches are read ahead of their steps
        self._dataset, self._batch_size, self._drop_last = dataset, batch_size, drop_last
        self._generator = torch.Generator()  # without it each epoch would draw from torch's random stream
        options.setdefault("generator", self._generator)
        options["worker_init_fn"] = WorkerStart(options.get("worker_init_fn"))
        self._plan: IndexedBatches | StreamKeys
        if isinstance(dataset, IterableDataset):
            if shuffle or sampler is not None or batch_size is None:
                raise ValueError(
                    "shuffle=True, sampler and batch_sampler need a dataset with an index; an iterable one decides the "
                    "order by itself"
                )
            if batch_size < self._readers.get("num_ranks", 0):
                raise ValueError(f"each rank reads a part of each batch, so batch_size={batch_size} is too small")
            if options.get("num_workers", 0) > 1:  # one worker reads in the order in which none does
                self._readers["num_workers"] = options["num_workers"]
            self._plan = StreamKeys(batch_size, self.is_collective)
            reader: Dataset[Any] = StreamReader(dataset, drop_last, collate)
        else:
            self._plan = IndexedBatches(
                batch_size, drop_last, shuffle, sampler if batch_sampler is None else batch_sampler
            )
            self._set_num_samples()
            reader = PartReader(dataset, collate)
        plan: Any = self._plan
        self._loader = DataLoader(reader, batch_sampler=plan, collate_fn=_as_it_is, **options)

    def __len__(self) -> int:
        """Return the number of global batches in an epoch.

        Raises:
            TypeError: The dataset, or the sampler, has no length.
        """
        if isinstance(self._plan, IndexedBatches):
            self._set_num_samples()
            return self._plan.num_batches()
        if not isinstance(self._dataset, Sized) or self.is_collective:
            raise TypeError("the dataset, of all ranks together, has no length, so the number of batches is not known")
        assert self._batch_size is not None
        return num_batches(len(self._dataset), self._batch_size, self._drop_last)

    def __iter__(self) -> Iterator[Any]:
        """Yield this rank's parts of the next epoch, or of the rest of the epoch that `load_state_dict` has set.

        Raises:
            ValueError: torch's `update_bn` iterates, which would compute the statistics of this rank's parts.
        """
        self.position.is_read = True
        return self.parts()

    def parts(self) -> Iterator[Any]:
        """Return the same as an iteration by the script, for the trainer's own use (`LoaderPosition.is_read`)."""
        return _Epoch(self)

    def _begin(self) -> Iterator[Any]:
        """Begin an epoch, or the rest of one; return an iterator over what is read."""
        if self._split()(_MANY) != (0, _MANY):
            _refuse_update_bn(sys._getframe())
        position = self.position
        if position.num_read and not self.resumes:  # the last iteration ended early
            position.end_epoch()
        if position.num_read and position.readers != self._readers:
            before, now = (
                ", ".join(f"{name}={number}" for name, number in readers.items()) or "one reader"
                for readers in (position.readers, self._readers)
            )
            raise ValueError(
                f"the loader stopped in the middle of epoch {position.epoch} with {before}, but now has {now}. The "
                f"order of an iterable dataset depends on it: continue with the same, or from the start of an epoch."
            )
        self.resumes = False
        position.bookmark, position.readers = None, self._readers
        return self._read_ahead()

    def _next(self, batches: Iterator[Any]) -> Any:
        """Return this rank's part of the next batch.

        Raises:
            StopIteration: The epoch has ended.
            Exception: The part cannot be read. As with torch's DataLoader, the next call continues with the next batch.
        """
        position, batch, error = self.position, None, None
        self._place_bookmark()
        try:
            batch = self._read(batches)
        except StopIteration:
            pass
        except Exception as raised:
            error = raised
        has_batch = batch is not None
        if self._agree is not None:
            try:
                has_batch = self._agree(has_batch, has_batch or self._dummy is not None, error)
            except Exception:  # the same on every rank
                self._count()
                raise
            batch = batch or (self._dummy, True)
        elif error is not None:
            self._count()
            raise error
        if batch is None or not has_batch:
            position.bookmark = self.given = self._dummy = None
            self.is_stand_in = False
            position.end_epoch()
            raise StopIteration
        self._count()
        self._give(*batch)
        return self.given

    def _read(self, batches: Iterator[Any]) -> tuple[Any, bool]:
        """Return the next part that is read, and whether it is empty. Local.

        Workers read an iterable dataset in turn, and a worker whose dataset has ended says so at each of its turns.

        Raises:
            StopIteration: There is no further one.
        """
        if isinstance(self._plan, IndexedBatches):
            part: tuple[Any, bool] = next(batches)
            return part
        while self._num_ended < max(self._loader.num_workers, 1):
            batch, is_empty, is_end = next(batches)
            if is_end:
                self._num_ended += 1
                self._dummy = self._dummy if batch is None else batch
                continue
            self._num_ended = 0
            if not self._num_to_skip:
                return batch, is_empty
            self._num_to_skip -= 1
        raise StopIteration

    def _count(self) -> None:
        """Count a batch as read."""
        if isinstance(self._plan, IndexedBatches):
            if not self._plan.sent:  # the sampler has raised an exception, so there is no batch
                return
            self._key = self._plan.sent.popleft()
            self.position.checksum = self._key.checksum
        self.position.num_read += 1

    def read_ahead_again(self) -> None:
        """Make the iteration in progress continue with the parts of the present set of ranks. Local."""
        self._is_outdated = True
        self.is_given_outdated = self.given is not None

    def read_again(self) -> Any:
        """Return this rank's part, in the present set of ranks, of the batch that was returned last. Local.

        Raises:
            TypeError: The dataset is iterable, so it cannot be read again.
        """
        if self._key is None:
            raise TypeError("an iterable dataset gives each sample once")
        start, stop = self._split()(len(self._key.indices))
        reader: Any = self._loader.dataset  # a PartReader
        self._give(*reader.__getitems__(self._key._replace(start=start, stop=stop)))
        return self.given

    def _give(self, part: Any, is_empty: bool) -> None:
        """Set `given` to a part, or to a part without samples that is made of it."""
        self.is_given_outdated = self.is_stand_in = False
        self.num_given += 1
        if is_empty:
            try:
                part = self._rule.empty(part)
            except (TypeError, ValueError):
                self.is_stand_in = True
        self.given = part

    def _read_ahead(self) -> Iterator[Any]:
        """Return an iterator over the rest of the epoch, with the parts of the present set of ranks."""
        self._is_outdated = False
        position = self.position
        self._plan.seed, self._plan.epoch, self._plan.first = position.seed, position.epoch, position.num_read
        self._plan.part_of = self._split()
        if isinstance(self._plan, IndexedBatches):
            self._plan.checksum = position.checksum
            if not position.num_read:
                self._set_num_samples()
        self._num_to_skip, self._num_ended, self._dummy = position.num_read, 0, None
        self._generator.manual_seed(position.seed + position.epoch)
        return iter(self._loader)

    def state_dict(self) -> dict[str, int]:
        """Return the position: numbers of the epoch and of its batches read, seed, checksum. Local.

        It is the same on every rank.
        """
        return self.position.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Make the next iteration continue at a position. Local.

        Args:
            state: Result of `state_dict` of a loader with the same dataset and batch size.
        """
        position, self.resumes = self.position, True
        position.epoch, position.num_read, position.seed = state["epoch"], state["num_read"], state["seed"]
        position.checksum = state.get("checksum", 0)
        position.readers = {name: state[name] for name in ("num_ranks", "num_workers") if name in state}
        position.bookmark = None

    def _place_bookmark(self) -> None:
        progress, position = self._progress(), self.position
        if position.bookmark is None or position.bookmark.progress != progress:
            states = rng.RngState.capture(self._device)
            position.bookmark = Bookmark(progress, position.state_dict(), states, time.monotonic_ns())

    def _set_num_samples(self) -> None:
        """Take the dataset's present length, which may have changed since the last epoch, if there is no sampler."""
        if isinstance(self._plan, IndexedBatches) and not self._plan.has_sampler:
            self._plan.num_samples = len(self._dataset)  # type: ignore[arg-type]  # it has an index, so a length


class _Epoch(Iterator[Any]):
    """Iterator over this rank's parts of an epoch. The epoch begins with the first part."""

    def __init__(self, loader: ShardedDataLoader) -> None:
        self._loader = loader
        self._batches: Iterator[Any] | None = None
        self._is_over = False

    def __next__(self) -> Any:
        loader = self._loader
        if self._is_over:
            raise StopIteration
        try:
            if self._batches is None:
                self._batches = loader._begin()
            elif loader._is_outdated:
                self._batches = loader._read_ahead()
            return loader._next(self._batches)
        except StopIteration:
            self._is_over, self._batches = True, None
            raise


@dataclass(frozen=True)
class Bookmark:
    """Position of a loader before it returned a batch, so that a run that continues there reads the batch again."""

    progress: Any
    """Progress of the trainer at this position."""
    state: dict[str, int]
    """Result of `LoaderPosition.state_dict` at this position."""
    rng_state: rng.RngState
    """Random states at this position."""
    noted_ns: int
    """Time at which this position was noted, in ns of time.monotonic_ns()."""


@dataclass
class LoaderPosition:
    """Position of a loader in its epochs, for checkpoints that are made after the loader is gone, too."""

    seed: int
    """Seed of the order and of the samples' random streams."""
    epoch: int = 0
    """Number of the epoch in progress, or else of the next epoch; counts from 0."""
    num_read: int = 0
    """Number of the epoch's batches that were returned."""
    checksum: int = 0
    """`BatchKey.checksum` of the batch that was returned last; 0 before the first, and for iterable datasets."""
    readers: dict[str, int] = field(default_factory=dict)
    """Numbers of ranks and workers, where the order of an iterable dataset depends on them."""
    bookmark: Bookmark | None = None
    """Position before the first returned batch on which the trainer has not trained yet."""
    is_read: bool = False
    """Whether the script itself has iterated over the loader: then `train_step` gets the parts that it returns."""

    def state_dict(self) -> dict[str, int]:
        """Return the position as `ShardedDataLoader.state_dict` does. Local."""
        state = {"epoch": self.epoch, "num_read": self.num_read, "seed": self.seed, "checksum": self.checksum}
        return state | self.readers

    def end_epoch(self) -> None:
        """Set the start of the next epoch. Local."""
        self.epoch, self.num_read, self.checksum = self.epoch + 1, 0, 0


def _refuse_update_bn(frame: FrameType | None) -> None:
    while frame is not None:
        if frame.f_code is _UPDATE_BN.__code__:
            raise ValueError(
                "torch.optim.swa_utils.update_bn would compute the statistics of each rank's parts of the batches: "
                "call trainer.update_bn(loader, model) in its place"
            )
        frame = frame.f_back


def _as_it_is(batch: Any) -> Any:
    return batch
