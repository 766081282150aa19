# SPDX-License-Identifier: Apache-2.0
"""Samples of each global batch of a dataset with an index: every rank draws the same ones. Nothing here communicates.

An epoch is drawn from the seed and the epoch's number alone, a batch at a time. Samplers draw from random streams with
that seed, and so do the generators that they hold. Each batch has a checksum, which the ranks compare in the step, and
by which a run that continues finds out whether the sampler draws the same epoch again.
"""

from __future__ import annotations

import itertools
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.data import Sampler
from torch.utils.data.distributed import DistributedSampler

from . import rng

PartOf = Callable[[int], tuple[int, int]]  # from a number of samples to this rank's first, and one past its last


class BatchKey(NamedTuple):
    """Key by which a rank reads its part of a global batch of a dataset with an index."""

    seed: int
    epoch: int
    number: int
    """Number of the batch in its epoch."""
    indices: Sequence[Any]
    """Indices of all samples of the global batch."""
    start: int
    """This rank's first sample, as a place in `indices`."""
    stop: int
    """One past this rank's last sample."""
    checksum: int
    """Number that differs, except by chance, if this batch, or with a sampler an earlier one, has other samples."""
    is_sampled: bool
    """Whether a sampler drew the indices, so that an index may be there twice."""

    def streams_of(self, place: int) -> int:
        """Return the seed of the random streams for the sample at a place in `indices`."""
        if self.is_sampled:
            return hash((self.seed, self.epoch, self.number, place))
        return hash((self.seed, self.epoch, self.indices[place]))


class IndexedBatches:
    """Batch sampler for torch's DataLoader that yields a `BatchKey` for each global batch of an epoch.

    Attributes:
        seed: Seed of the order.
        epoch: Number of the epoch.
        first: Number of the first batch to yield.
        checksum: Checksum of the batch before it; 0 if it is not known.
        part_of: Function from a number of samples to this rank's.
        num_samples: Number of samples of the dataset, if there is no sampler.
        sent: Keys that were yielded, whose parts were not returned yet.

    Args:
        batch_size: Number of samples of a batch; None if `sampler` yields batches.
        drop_last: Leave out the last batch of an epoch if it is smaller.
        shuffle: Take a random order, if there is no sampler.
        sampler: Iterable of indices, or of batches of indices; None for all indices of the dataset.

    Raises:
        TypeError: The sampler cannot be iterated over again.
        ValueError: The sampler gives each rank other samples.
    """

    part_of: PartOf

    @property
    def has_sampler(self) -> bool:
        """Whether a sampler draws the indices."""
        return self._sampler is not None

    def __init__(self, batch_size: int | None, drop_last: bool, shuffle: bool, sampler: Iterable[Any] | None) -> None:
        self.seed = self.epoch = self.first = self.checksum = self.num_samples = 0
        self.sent: deque[BatchKey] = deque()
        self._batch_size, self._drop_last, self._shuffle, self._sampler = batch_size, drop_last, shuffle, sampler
        if isinstance(sampler, Iterator) or not isinstance(sampler, Iterable | None):
            raise TypeError(
                f"a sampler is iterated over again in each epoch, which a {type(sampler).__name__} does not allow: "
                f"pass a list or a torch.utils.data.Sampler"
            )
        if any(isinstance(one, DistributedSampler) for one in _with_nested(sampler)):
            raise ValueError(
                "DistributedSampler gives each rank its own samples, but trainer.loader cuts global batches itself: "
                "leave the sampler out, and pass shuffle=True or False"
            )

    def num_batches(self) -> int:
        """Return the number of batches of an epoch.

        Raises:
            TypeError: The sampler has no length.
        """
        num_samples = self.num_samples if self._sampler is None else len(self._sampler)  # type: ignore[arg-type]
        return num_samples if self._batch_size is None else num_batches(num_samples, self._batch_size, self._drop_last)

    def __iter__(self) -> Iterator[BatchKey]:
        self.sent.clear()
        batches, checksum = self._batches(), 0
        for indices in itertools.islice(batches, self.first):
            checksum = self._checksum(checksum, indices)
        if self.first and self.checksum not in (0, checksum):
            raise ValueError(
                f"the first {self.first} batches of epoch {self.epoch} are not those that were read of it before: the "
                f"dataset has another length, or the sampler draws other indices when it is iterated over again. A "
                f"sampler may draw from random, NumPy and torch, from a generator that it holds in an attribute, and "
                f"by the epoch given to its set_epoch."
            )
        for number, indices in enumerate(batches, self.first):
            checksum = self._checksum(checksum, indices)
            bounds = self.part_of(len(indices))
            key = BatchKey(self.seed, self.epoch, number, indices, *bounds, checksum, self.has_sampler)
            self.sent.append(key)
            yield key

    def _checksum(self, checksum: int, indices: Sequence[Any]) -> int:
        if self._sampler is not None:
            return zlib.crc32(repr(indices).encode(), checksum)
        return self.num_samples if self._shuffle else len(indices)

    def _batches(self) -> Iterator[Sequence[Any]]:
        """Yield the indices of each global batch of the epoch."""
        size = self._batch_size
        if self._sampler is not None:
            streams, seed = rng.HostStreams(rng.mix(self.seed, self.epoch)), rng.mix(self.seed, self.epoch, "sampler")
            for one in _with_nested(self._sampler):
                rng.seed_generators(one, seed)
                if hasattr(one, "set_epoch"):
                    one.set_epoch(self.epoch)
            with streams.active():
                drawn = iter(self._sampler)
            while True:
                with streams.active():  # the script draws from its own streams between two batches
                    taken = list(itertools.islice(drawn, size or 1))
                if not taken or (self._drop_last and len(taken) < (size or 1)):
                    return
                yield taken if size else list(taken[0])
        order: Sequence[int] = range(self.num_samples)
        if self._shuffle:
            generator = torch.Generator().manual_seed(self.seed + self.epoch)
            order = torch.randperm(self.num_samples, generator=generator).tolist()
        assert size is not None
        for number in range(num_batches(self.num_samples, size, self._drop_last)):
            yield order[number * size : (number + 1) * size]


def num_batches(num_samples: int, batch_size: int, drop_last: bool) -> int:
    """Return the number of batches that a number of samples gives."""
    return num_samples // batch_size if drop_last else -(-num_samples // batch_size)


def _with_nested(sampler: Any) -> Iterator[Any]:
    """Yield a sampler, and samplers that it holds in attributes, as torch.utils.data.BatchSampler does."""
    yield sampler
    for value in getattr(sampler, "__dict__", {}).values():
        if isinstance(value, Sampler) and value is not sampler:
            yield from _with_nested(value)
