# SPDX-License-Identifier: Apache-2.0
"""Read this rank's part of a global batch, in the rank's process or in a worker. Nothing here communicates."""

from __future__ import annotations

import functools
import importlib
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from torch.utils.data import Dataset, IterableDataset, TensorDataset, default_collate, get_worker_info

from . import rng
from .samples import SampleRule
from .sampling import BatchKey, PartOf


class PartReader(Dataset[Any]):
    """Dataset of parts, by `BatchKey`. It seeds the random streams before it reads each sample.

    Attributes:
        dataset: The user's dataset.
    """

    def __init__(self, dataset: Dataset[Any], collate: Collate) -> None:
        self.dataset, self._collate = dataset, collate

    def __getitems__(self, key: BatchKey) -> tuple[Any, bool]:
        return self._collate(functools.partial(self._read, key), range(len(key.indices)), key.start, key.stop, key[:3])

    def _read(self, key: BatchKey, places: Sequence[int]) -> list[Any]:
        if type(self.dataset) is TensorDataset:  # it draws no random numbers
            return [self.dataset[key.indices[place]] for place in places]
        with rng.preserved():
            return [self._read_one(key, place) for place in places]

    def _read_one(self, key: BatchKey, place: int) -> Any:
        rng.seed_host(key.streams_of(place))
        return self.dataset[key.indices[place]]


class WorkerStart:
    """Start a worker with the user's `worker_init_fn`, for which `get_worker_info().dataset` is the user's dataset."""

    def __init__(self, function: Callable[[int], object] | None) -> None:
        self._function = function

    def __call__(self, worker: int) -> None:
        """Start the worker of a number. Local."""
        info: Any = get_worker_info()
        object.__setattr__(info, "dataset", info.dataset.dataset)  # torch allows no assignment
        if self._function is not None:
            self._function(worker)


class StreamKey(NamedTuple):
    """Key by which a worker reads the next batch of its own iteration over an iterable dataset."""

    iteration: int
    """Number of the iteration over the loader. With another one the dataset is iterated over from the start."""
    seed: int
    epoch: int
    number: int
    """Number of the key. Workers get the keys in turn."""
    size: int
    """Number of samples to read."""
    is_skipped: bool
    """Read the samples, but make no part of them, since it was returned before."""
    part_of: PartOf | None
    """Function from the number of samples to this rank's; None if all are this rank's."""


class StreamKeys:
    """Batch sampler for torch's DataLoader that yields the keys of an iteration over an iterable dataset, without end.

    Attributes:
        seed: Seed of the random streams.
        epoch: Number of the epoch.
        first: Number of batches of the epoch that were returned before.
        part_of: Function from a number of samples to this rank's.

    Args:
        batch_size: Number of samples of a global batch.
        is_sharded: Whether the dataset holds this rank's samples alone.
    """

    part_of: PartOf

    def __init__(self, batch_size: int, is_sharded: bool) -> None:
        self.seed = self.epoch = self.first = self._iteration = 0
        self._batch_size, self._is_sharded = batch_size, is_sharded

    def __iter__(self) -> Iterator[StreamKey]:
        self._iteration += 1
        start, stop = self.part_of(self._batch_size) if self._is_sharded else (0, self._batch_size)
        place = self._iteration, self.seed, self.epoch
        for number in itertools.count():
            part_of = None if self._is_sharded else self.part_of
            yield StreamKey(*place, number, stop - start, number < self.first, part_of)


class StreamReader(Dataset[Any]):
    """Reader of an iterable dataset, by `StreamKey`. Each worker iterates over the dataset, as with torch's DataLoader.

    Attributes:
        dataset: The user's dataset.
    """

    def __init__(self, dataset: Any, drop_last: bool, collate: Collate) -> None:
        self.dataset, self._drop_last, self._collate = dataset, drop_last, collate
        self._iteration = 0
        self._samples: Iterator[Any] = iter(())
        self._last: list[Any] = []  # samples of the last batch
        self._streams = rng.HostStreams(0)

    def __getitems__(self, key: StreamKey) -> tuple[Any, bool, bool]:
        """Return a part, whether it is empty, and whether this worker's iteration has ended.

        At the end the part is a batch from which an empty part can be made, if this rank's samples are its own.
        """
        if key.iteration != self._iteration:
            self._begin(key)
        with self._streams.active():
            batch = list(itertools.islice(self._samples, key.size))
        self._last = batch or self._last
        place = key.seed, key.epoch, key.number
        if not batch or (self._drop_last and len(batch) < key.size):
            has_dummy = self._last and key.part_of is None
            return self._collate(list, self._last, 0, 0, place)[0] if has_dummy else None, True, True
        if key.is_skipped:
            return None, True, False
        bounds = (0, len(batch)) if key.part_of is None else key.part_of(len(batch))
        return *self._collate(list, batch, *bounds, place), False

    def _begin(self, key: StreamKey) -> None:
        """Iterate over the dataset from its start."""
        info = get_worker_info()
        worker = [info.id] if info is not None and info.id else []  # one worker draws as none does
        self._iteration, self._last = key.iteration, []
        self._streams = rng.HostStreams(rng.mix(key.seed, key.epoch, *worker))
        with self._streams.active():
            if hasattr(self.dataset, "set_epoch"):
                self.dataset.set_epoch(key.epoch)
            self._samples = iter(self.dataset)


class Collate:
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


def own_stream(dataset: Any, stream: Any, rank: int, world_size: int) -> Any:
    """Return the iterable dataset of this rank's samples, as `stream` of `DistributedTrainer.loader` says. Local.

    Raises:
        ValueError, TypeError: The dataset cannot be divided in this way.
    """
    if not isinstance(dataset, IterableDataset):
        raise ValueError(
            "stream= is for iterable datasets; of one with an index each rank reads only its samples anyway"
        )
    hugging_face = sys.modules.get("datasets")
    if callable(stream):
        own = stream(dataset, rank, world_size)
    elif stream != "sharded":
        raise ValueError(f'stream must be None, "sharded" or a function, not {stream!r}')
    elif hugging_face is not None and isinstance(dataset, hugging_face.IterableDataset):
        own = importlib.import_module("datasets.distributed").split_dataset_by_node(dataset, rank, world_size)
    elif hasattr(dataset, "shard"):
        own = dataset.shard(num_shards=world_size, index=rank)
    else:
        raise TypeError(
            f'stream="sharded" calls dataset.shard(num_shards=, index=), which {type(dataset).__name__} does not have: '
            f"write this method, or pass as stream a function of (dataset, rank, world_size) that returns this rank's"
        )
    if not isinstance(own, IterableDataset):
        raise TypeError(f"this rank's part of the stream must be an IterableDataset, not {type(own).__name__}")
    return own
