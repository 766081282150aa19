# SPDX-License-Identifier: Apache-2.0
"""Read this rank's part of a global batch, in the rank's process or in a worker. Nothing here communicates."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

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


class IterableBatches(IterableDataset[Any]):
    """Iterable dataset that yields this rank's part of each global batch, and whether the part is empty."""

    def __init__(self, dataset: Any, batch_size: int, drop_last: bool, part_of: PartOf, collate: Collate) -> None:
        self.seed = self.epoch = self.first = 0
        self.dataset, self._batch_size, self._drop_last = dataset, batch_size, drop_last
        self.part_of, self._collate = part_of, collate

    def __iter__(self) -> Iterator[tuple[Any, bool]]:
        streams = rng.HostStreams(rng.mix(self.seed, self.epoch))
        with streams.active():
            samples = iter(self.dataset)
            for _ in itertools.islice(samples, self.first * self._batch_size):
                pass
        for number in itertools.count(self.first):
            with streams.active():
                batch = list(itertools.islice(samples, self._batch_size))
            if not batch or (self._drop_last and len(batch) < self._batch_size):
                return
            yield self._collate(list, batch, *self.part_of(len(batch)), (self.seed, self.epoch, number))


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
