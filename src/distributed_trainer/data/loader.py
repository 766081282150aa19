# SPDX-License-Identifier: Apache-2.0
"""Loader of global batches, of which each rank reads only its part.

The samples of batch b in epoch e depend on the loader's seed alone. So they are the same for any number of ranks and of
workers; a rank reads a part of them. The random streams are seeded before each sample is read, from the seed, the epoch
and the sample's number, so the random numbers of augmentation do not depend on the rank or worker that reads a sample.
An iterable dataset draws from streams that are seeded for each epoch, and a collate function from streams seeded for
each batch. The script's streams are left alone. Nothing here communicates.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence, Sized
from dataclasses import dataclass
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, default_collate

from . import rng
from .samples import SampleRule

PartOf = Callable[[int], tuple[int, int]]  # from a number of samples to this rank's first, and one past its last

_END = object()
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

    Args:
        dataset: Dataset with an index, or an iterable one.
        batch_size: Number of samples of a global batch, at least 1.
        split: Function that returns the present `PartOf`; called when an epoch begins.
        seed: Seed of the order and of the samples' random streams, the same on every rank.
        progress: Function that returns the trainer's progress, for bookmarks.
        device: Device whose random states bookmarks hold.
        rule: Rule by which a part without samples is made.
        shuffle: Choose a random order in each epoch; only for a dataset with an index.
        drop_last: Leave out the last batch of an epoch if it is smaller than `batch_size`.
        options: Other arguments of `torch.utils.data.DataLoader`.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_size: int,
        split: Callable[[], PartOf],
        seed: int,
        progress: Callable[[], Any] = lambda: None,
        device: torch.device = torch.device("cpu"),  # noqa: B008
        rule: SampleRule | None = None,
        *,
        shuffle: bool = False,
        drop_last: bool = False,
        **options: Any,
    ) -> None:
        if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
            raise ValueError(
                f"batch_size, the number of samples of a global batch, must be an int of at least 1, not {batch_size!r}"
            )
        for name in ("sampler", "batch_sampler"):
            if options.get(name) is not None:
                raise ValueError(
                    f"{name} cannot be used with trainer.loader, which chooses each rank's samples itself. Pass a "
                    f"torch.utils.data.Subset as the dataset, or pass whole batches of your own loader to train_step."
                )
        self.position = LoaderPosition(seed)
        self.resumes = False
        self.given: Any = None
        self.is_given_outdated = self.is_stand_in = False
        self._is_outdated = False  # the parts that were read ahead are for a set of ranks that has changed
        self._progress, self._device = progress, device
        self._rule = SampleRule() if rule is None else rule
        collate = _Collate(options.pop("collate_fn", None) or default_collate, self._rule.batch_dim)
        self._split = split  # called only when an epoch begins, since batches are read ahead of their steps
        self._dataset, self._batch_size, self._drop_last = dataset, batch_size, drop_last
        self._generator = torch.Generator()  # without it each epoch would draw from torch's random stream
        options.setdefault("generator", self._generator)
        self._plan: _IndexedBatches | _IterableBatches
        if isinstance(dataset, IterableDataset):
            if shuffle:
                raise ValueError("shuffle=True needs a dataset with an index; an iterable one shuffles by itself")
            if options.get("num_workers", 0) > 1 or options.get("persistent_workers"):
                raise ValueError(
                    "an iterable dataset can be read by one worker, started again for each epoch: pass num_workers=1 "
                    "and no persistent_workers"
                )
            self._plan = _IterableBatches(dataset, batch_size, drop_last, split(), collate)
            self._loader = DataLoader(self._plan, batch_size=None, collate_fn=_as_it_is, **options)
        else:
            keys: Any = _IndexedBatches(batch_size, drop_last, split(), shuffle)
            keys.num_samples = len(dataset)  # type: ignore[arg-type]  # a dataset with an index has a length
            self._plan = keys
            self._loader = DataLoader(_Seeded(dataset, collate), batch_sampler=keys, collate_fn=_as_it_is, **options)

    def __len__(self) -> int:
        """Return the number of global batches in an epoch.

        Raises:
            TypeError: The dataset has no length.
        """
        if not isinstance(self._dataset, Sized):
            raise TypeError("the dataset has no length, so the number of batches is not known")
        return _num_batches(len(self._dataset), self._batch_size, self._drop_last)

    def __iter__(self) -> Iterator[Any]:
        """Yield this rank's parts of the next epoch, or of the rest of the epoch that `load_state_dict` has set.

        Raises:
            ValueError: torch's `update_bn` iterates, which would compute the statistics of this rank's parts.
        """
        self.position.is_read = True
        return self.parts()

    def parts(self) -> Iterator[Any]:
        """Yield the same as an iteration by the script, for the trainer's own use (`LoaderPosition.is_read`)."""
        if self._split()(_MANY) != (0, _MANY):
            _refuse_update_bn(sys._getframe())
        position = self.position
        if position.num_read and not self.resumes:  # the last iteration ended early
            position.epoch, position.num_read = position.epoch + 1, 0
        self.resumes = False
        position.bookmark = None
        batches = self._read_ahead()
        while True:
            self._place_bookmark()
            if self._is_outdated:
                batches = self._read_ahead()
            batch: Any = next(batches, _END)
            if batch is _END:
                break
            position.num_read += 1
            self._give(*batch)
            yield self.given
        position.bookmark = self.given = None
        self.is_stand_in = False
        position.epoch, position.num_read = position.epoch + 1, 0

    def read_ahead_again(self) -> None:
        """Make the iteration in progress continue with the parts of the present set of ranks. Local."""
        self._is_outdated = True
        self.is_given_outdated = self.given is not None

    def read_again(self) -> Any:
        """Return this rank's part, in the present set of ranks, of the batch that was returned last. Local.

        Raises:
            TypeError: The dataset is iterable, so it cannot be read again.
        """
        plan, number = self._plan, self.position.num_read - 1
        if isinstance(plan, _IterableBatches):
            raise TypeError("an iterable dataset gives each sample once")
        plan.part_of = self._split()
        dataset: Any = self._loader.dataset  # a _Seeded
        self._give(*dataset.__getitems__(plan.key(number)))
        return self.given

    def _give(self, part: Any, is_empty: bool) -> None:
        """Set `given` to a part, or to a part without samples that is made of it."""
        self.is_given_outdated = self.is_stand_in = False
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
        if isinstance(self._plan, _IndexedBatches) and not position.num_read:
            self._plan.num_samples = len(self._dataset)  # type: ignore[arg-type]  # it may have grown since the last epoch
        self._generator.manual_seed(position.seed + position.epoch)
        return iter(self._loader)

    def state_dict(self) -> dict[str, int]:
        """Return the position: the epoch, the number of its batches read, the seed. Local; the same on every rank."""
        return self.position.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Make the next iteration continue at a position. Local.

        Args:
            state: Result of `state_dict` of a loader with the same dataset and batch size.
        """
        position, self.resumes = self.position, True
        position.epoch, position.num_read, position.seed = state["epoch"], state["num_read"], state["seed"]
        position.bookmark = None

    def _place_bookmark(self) -> None:
        progress, position = self._progress(), self.position
        if position.bookmark is None or position.bookmark.progress != progress:
            states = rng.RngState.capture(self._device)
            place = position.epoch, position.num_read
            position.bookmark = Bookmark(progress, *place, states, time.monotonic_ns())


@dataclass(frozen=True)
class Bookmark:
    """Position of a loader before it returned a batch, so that a run that continues there reads the batch again."""

    progress: Any
    """Progress of the trainer at this position."""
    epoch: int
    """Number of the epoch."""
    num_read: int
    """Number of the epoch's batches that were returned before."""
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
    bookmark: Bookmark | None = None
    """Position before the first returned batch on which the trainer has not trained yet."""
    is_read: bool = False
    """Whether the script itself has iterated over the loader: then `train_step` gets the parts that it returns."""

    def state_dict(self) -> dict[str, int]:
        """Return the position as `ShardedDataLoader.state_dict` does. Local."""
        return {"epoch": self.epoch, "num_read": self.num_read, "seed": self.seed}


class _Key(NamedTuple):
    """Key by which a rank reads its part of a global batch of a dataset with an index."""

    seed: int
    epoch: int
    number: int
    """Number of the batch in its epoch."""
    indices: Sequence[int]
    """Numbers of all samples of the global batch."""
    start: int
    """This rank's first sample, as a place in `indices`."""
    stop: int
    """One past this rank's last sample."""


def _num_batches(num_samples: int, batch_size: int, drop_last: bool) -> int:
    return num_samples // batch_size if drop_last else -(-num_samples // batch_size)


class _IndexedBatches:
    """Batch sampler that yields a `_Key` for each global batch."""

    def __init__(self, batch_size: int, drop_last: bool, part_of: PartOf, shuffle: bool) -> None:
        self.seed = self.epoch = self.first = self.num_samples = 0
        self._batch_size, self._drop_last = batch_size, drop_last
        self.part_of, self._shuffle = part_of, shuffle

    def __len__(self) -> int:
        return _num_batches(self.num_samples, self._batch_size, self._drop_last) - self.first

    def __iter__(self) -> Iterator[_Key]:
        order = self._order()
        for number in range(self.first, self.first + len(self)):
            yield self._key(order, number)

    def key(self, number: int) -> _Key:
        """Return the key of batch `number`."""
        return self._key(self._order(), number)

    def _key(self, order: Sequence[int], number: int) -> _Key:
        indices = order[number * self._batch_size : (number + 1) * self._batch_size]
        return _Key(self.seed, self.epoch, number, indices, *self.part_of(len(indices)))

    def _order(self) -> Sequence[int]:
        if not self._shuffle:
            return range(self.num_samples)
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order: list[int] = torch.randperm(self.num_samples, generator=generator).tolist()
        return order


class _Seeded(Dataset[Any]):
    """Dataset of parts, by `_Key`. It seeds the random streams before it reads each sample."""

    def __init__(self, dataset: Dataset[Any], collate: _Collate) -> None:
        self._dataset, self._collate = dataset, collate

    def __getitems__(self, key: _Key) -> tuple[Any, bool]:
        read = functools.partial(self._read, key.seed, key.epoch)
        return self._collate(read, key.indices, key.start, key.stop, key[:3])

    def _read(self, seed: int, epoch: int, indices: Sequence[int]) -> list[Any]:
        if type(self._dataset) is TensorDataset:  # it draws no random numbers
            return [self._dataset[index] for index in indices]
        with rng.preserved():
            return [self._read_one((seed, epoch, index)) for index in indices]

    def _read_one(self, key: tuple[int, int, int]) -> Any:
        rng.seed_host(hash(key))
        return self._dataset[key[-1]]


class _IterableBatches(IterableDataset[Any]):
    """Iterable dataset that yields this rank's part of each global batch, and whether the part is empty."""

    def __init__(self, dataset: Any, batch_size: int, drop_last: bool, part_of: PartOf, collate: _Collate) -> None:
        self.seed = self.epoch = self.first = 0
        self._dataset, self._batch_size, self._drop_last = dataset, batch_size, drop_last
        self.part_of, self._collate = part_of, collate

    def __iter__(self) -> Iterator[tuple[Any, bool]]:
        streams = rng.HostStreams(rng.mix(self.seed, self.epoch))
        with streams.active():
            samples = iter(self._dataset)
            for _ in itertools.islice(samples, self.first * self._batch_size):
                pass
        for number in itertools.count(self.first):
            with streams.active():
                batch = list(itertools.islice(samples, self._batch_size))
            if not batch or (self._drop_last and len(batch) < self._batch_size):
                return
            yield self._collate(list, batch, *self.part_of(len(batch)), (self.seed, self.epoch, number))


class _Collate:
    """Collate a rank's part of a global batch with the user's function, which may drop samples.

    Args:
        collate: Function of a list of samples.
        batch_dim: Dimension of tensors that counts the samples.
    """

    def __init__(self, collate: Callable[[list[Any]], Any], batch_dim: int) -> None:
        self._collate, self._rule = collate, SampleRule(batch_dim)

    def __call__(
        self,
        read: Callable[[Sequence[Any]], list[Any]],
        places: Sequence[Any],
        start: int,
        stop: int,
        key: tuple[int, ...],
    ) -> tuple[Any, bool]:
        """Return a part, and False; or a batch of one sample from which an empty part can be made, and True.

        If the function leaves no sample of the whole batch, the result is what it returns for that, as in one process.

        Args:
            read: Function that reads the samples at some places.
            places: Places of all samples of the global batch.
            start: First sample of the part.
            stop: One past the last sample of the part.
            key: Key of the global batch, from which the streams follow that the user's function draws from (mixup).

        Raises:
            Exception: The error of the user's function, if it raises it for the whole batch, too, or for samples of
                which it takes each alone.
        """
        attempt = functools.partial(self._try, key)
        error = None
        if start < stop:
            own = read(places[start:stop])
            part, error = attempt(own)
            if error is None and self._has_samples(part):
                return part, False
            if any(self._has_samples(attempt([sample])[0]) for sample in own) and len(own) > 1:
                raise error or ValueError(
                    f"collate_fn returns no samples for {len(own)} samples, but some for one of them"
                )
            # The function has dropped all samples of this rank, or it always fails: then it fails for the whole batch.
            whole, error = attempt(read(places))
            if error is not None:
                raise error
            if not self._has_samples(whole):
                return whole, False
        for place in places:
            single, error = attempt(read([place]))
            if error is None and self._has_samples(single):
                return single, True
        if start < stop:
            raise ValueError("collate_fn returns samples for a whole batch, but none for each of its samples alone")
        whole, error = attempt(read(places))
        if error is not None:
            raise error
        return whole, False

    def _try(self, key: tuple[int, ...], samples: list[Any]) -> tuple[Any, Exception | None]:
        try:
            if self._collate is default_collate:  # it draws no random numbers
                return self._collate(samples), None
            with rng.preserved():
                rng.seed_host(rng.mix(key))
                return self._collate(samples), None
        except Exception as error:
            return None, error

    def _has_samples(self, part: Any) -> bool:
        if part is None:
            return False
        try:
            return self._rule.count({"batch": part}) > 0
        except (TypeError, ValueError):  # no batch that can be cut, so it is not empty
            return True


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
