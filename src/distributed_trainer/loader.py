# SPDX-License-Identifier: Apache-2.0
"""Loads global batches of which each rank reads its part only.

Which samples make up batch b of epoch e follows from the loader's seed alone, so it is the same for any number of ranks
and of workers; a rank reads a part of it. The random streams are set anew before each sample is read, from the seed,
the epoch and the sample's number: what augmentation draws does not depend on who reads it either. Nothing here
communicates.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, default_collate

from .alignment import random_states, set_random_states
from .data import slice_batch

PartOf = Callable[[int], tuple[int, int]]  # of a number of samples: the first of this rank's, and the one after them

_END = object()


class PartLoader:
    """This rank's parts of global batches, an epoch for each iteration. Made by `DistributedTrainer.loader`.

    A part may be empty: then its tensors have no samples, and `train_step` takes part without any. Iterating again
    gives the next epoch, in another order if it shuffles; `len()` is the number of batches in each.

    Attributes:
        epoch: Number of the next epoch, from 0, or of that in progress.
        num_read: Batches of it that were given out.
        resumes: The next iteration goes on where `load_state_dict` says.
        origin: Where it was before it gave out what the trainer has not trained on yet.
        given: The last part that it gave out, while the loop over it runs.
        is_given_outdated: That is the part of other ranks than there are now.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_size: int,
        split: Callable[[], PartOf],
        seed: int,
        progress: Callable[[], Any] = lambda: None,
        device: torch.device = torch.device("cpu"),  # noqa: B008
        *,
        shuffle: bool = False,
        drop_last: bool = False,
        **options: Any,
    ) -> None:
        if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
            raise ValueError(f"batch_size must be an int of at least 1, the samples of a global batch: {batch_size!r}")
        for name in ("sampler", "batch_sampler"):
            if options.get(name) is not None:
                raise ValueError(
                    f"{name} does not go with trainer.loader, which chooses each rank's samples itself. Give it a "
                    f"torch.utils.data.Subset, or pass whole batches of a loader of your own to train_step."
                )
        self.epoch = 0
        self.num_read = 0
        self.resumes = False
        self.origin: Origin | None = None
        self.given: Any = None
        self.is_given_outdated = False
        self._is_outdated = False  # parts that were read ahead are those of other ranks than there are now
        self._progress, self._device = progress, device
        self._seed = seed
        self._split = split  # asked as each epoch begins, since batches are read ahead of their steps
        self._batch_size, self._drop_last = batch_size, drop_last
        self._generator = torch.Generator()  # else each epoch would draw from torch's stream
        options.setdefault("generator", self._generator)
        self._plan: _IndexedBatches | _IterableBatches
        if isinstance(dataset, IterableDataset):
            if shuffle:
                raise ValueError("shuffle=True needs a dataset with an index; an iterable one shuffles by itself")
            if options.get("num_workers", 0) > 1 or options.get("persistent_workers"):
                raise ValueError("of an iterable dataset one worker can read, anew for each epoch: num_workers=1")
            self._length = len(dataset) if hasattr(dataset, "__len__") else None
            collate = options.pop("collate_fn", None) or default_collate
            self._plan = _IterableBatches(dataset, batch_size, drop_last, split(), collate)
            self._loader = DataLoader(self._plan, batch_size=None, collate_fn=_as_it_is, **options)
        else:
            self._length = len(dataset)  # type: ignore[arg-type]
            self._plan = _IndexedBatches(self._length, batch_size, len(self), split(), shuffle)
            self._loader = DataLoader(_Seeded(dataset), batch_sampler=self._plan, **options)

    def __len__(self) -> int:
        """Number of global batches in an epoch.

        Raises:
            TypeError: The dataset does not know its length.
        """
        if self._length is None:
            raise TypeError("the dataset has no length, so nobody knows the number of batches")
        return self._length // self._batch_size if self._drop_last else -(-self._length // self._batch_size)

    def __iter__(self) -> Iterator[Any]:
        """Gives this rank's parts of an epoch: the next, or the rest of the one that `load_state_dict` names."""
        if self.num_read and not self.resumes:  # the last loop was left early
            self.epoch, self.num_read = self.epoch + 1, 0
        self.resumes = False
        self.origin = None
        batches = self._read_ahead()
        while True:
            self._note_origin()
            if self._is_outdated:
                batches = self._read_ahead()
            batch = next(batches, _END)
            if batch is _END:
                break
            if isinstance(self._plan, _IterableBatches):
                part, is_empty = batch
            else:
                part, is_empty = batch, self._plan.is_empty(self.num_read)
            self.num_read += 1
            self.given, self.is_given_outdated = slice_batch(part, 0, 0) if is_empty else part, False
            yield self.given
        self.origin = self.given = None
        self.epoch, self.num_read = self.epoch + 1, 0

    def read_ahead_anew(self) -> None:
        """Has the loop in progress go on with the parts of the ranks that there are now. Local."""
        self._is_outdated = True
        self.is_given_outdated = self.given is not None

    def read_again(self) -> Any:
        """The part that the ranks as they are now have of the batch that was given out last. Local.

        Raises:
            TypeError: Of an iterable dataset.
        """
        plan, number = self._plan, self.num_read - 1
        if isinstance(plan, _IterableBatches):
            raise TypeError("an iterable dataset gives each sample once")
        plan.part_of = self._split()
        self.is_given_outdated = False
        self.given = self._loader.collate_fn(self._loader.dataset.__getitems__(plan.keys(number)))
        if plan.is_empty(number):
            self.given = slice_batch(self.given, 0, 0)
        return self.given

    def _read_ahead(self) -> Iterator[Any]:
        """What is left of the epoch, of the ranks as they are now."""
        self._is_outdated = False
        self._plan.seed, self._plan.epoch, self._plan.first = self._seed, self.epoch, self.num_read
        self._plan.part_of = self._split()
        self._generator.manual_seed(self._seed + self.epoch)
        return iter(self._loader)

    def state_dict(self) -> dict[str, int]:
        """Where it is: the epoch, how many of its batches were given out, the seed. Local; the same on every rank."""
        return {"epoch": self.epoch, "num_read": self.num_read, "seed": self._seed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Has the next iteration go on from there. Local; the dataset and the batch size are to be the same."""
        self.epoch, self.num_read, self._seed = state["epoch"], state["num_read"], state["seed"]
        self.resumes, self.origin = True, None

    def _note_origin(self) -> None:
        progress = self._progress()
        if self.origin is None or self.origin.progress != progress:
            states = random_states(self._device)
            self.origin = Origin(progress, self.epoch, self.num_read, states, time.monotonic_ns())


@dataclass(frozen=True)
class Origin:
    """Where a loader was before it gave out a batch, so that a run that goes on from there gets it again."""

    progress: Any
    """Of the trainer, then."""
    epoch: int
    num_read: int
    random_states: tuple[Any, ...]
    noted_ns: int
    """By time.monotonic_ns()."""


class _IndexedBatches:
    """A batch sampler: for each global batch the numbers of this rank's samples, each with the seed and the epoch."""

    def __init__(self, num_samples: int, batch_size: int, num_batches: int, part_of: PartOf, shuffle: bool) -> None:
        self.seed = self.epoch = self.first = 0
        self._num_samples, self._batch_size, self._num_batches = num_samples, batch_size, num_batches
        self.part_of, self._shuffle = part_of, shuffle

    def __len__(self) -> int:
        return self._num_batches - self.first

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        order = self._order()
        for number in range(self.first, self._num_batches):
            yield self._keys(order, number)

    def keys(self, number: int) -> list[tuple[int, int, int]]:
        """Of batch `number`."""
        return self._keys(self._order(), number)

    def _keys(self, order: Sequence[int], number: int) -> list[tuple[int, int, int]]:
        batch = order[number * self._batch_size : (number + 1) * self._batch_size]
        start, stop = self.part_of(len(batch))
        own = batch[start:stop] or batch[:1]  # of which the shapes are taken
        return [(self.seed, self.epoch, index) for index in own]

    def _order(self) -> Sequence[int]:
        if not self._shuffle:
            return range(self._num_samples)
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return torch.randperm(self._num_samples, generator=generator).tolist()

    def is_empty(self, number: int) -> bool:
        """Whether this rank has no samples of batch `number`."""
        num_samples = min(self._batch_size, self._num_samples - number * self._batch_size)
        start, stop = self.part_of(num_samples)
        return start == stop


class _Seeded(Dataset[Any]):
    """A dataset whose samples are read with random streams of their own."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self._dataset = dataset

    def __getitems__(self, keys: list[tuple[int, int, int]]) -> list[Any]:
        if type(self._dataset) is TensorDataset:  # which draws nothing
            return [self._dataset[index] for *_, index in keys]
        with _kept_streams():
            return [self._read(key) for key in keys]

    def _read(self, key: tuple[int, int, int]) -> Any:
        seed = hash(key)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.default_generator.manual_seed(seed)
        return self._dataset[key[-1]]


class _IterableBatches(IterableDataset[Any]):
    """Of an iterable dataset: this rank's part of each global batch, and whether it is empty."""

    def __init__(
        self, dataset: Any, batch_size: int, drop_last: bool, part_of: PartOf, collate: Callable[..., Any]
    ) -> None:
        self.seed = self.epoch = self.first = 0
        self._dataset, self._batch_size, self._drop_last = dataset, batch_size, drop_last
        self.part_of, self._collate = part_of, collate

    def __iter__(self) -> Iterator[tuple[Any, bool]]:
        samples = iter(self._dataset)
        for _ in itertools.islice(samples, self.first * self._batch_size):
            pass
        while batch := list(itertools.islice(samples, self._batch_size)):
            if self._drop_last and len(batch) < self._batch_size:
                return
            start, stop = self.part_of(len(batch))
            yield self._collate(batch[start:stop] or batch[:1]), start == stop


def _as_it_is(batch: Any) -> Any:
    return batch


@contextlib.contextmanager
def _kept_streams() -> Iterator[None]:
    """After it `random`, NumPy and torch go on drawing where they were before."""
    cpu = torch.device("cpu")
    states = random_states(cpu)
    try:
        yield
    finally:
        set_random_states(states, cpu)
