# SPDX-License-Identifier: Apache-2.0
"""Position of a trainer in its data. Nothing here communicates."""

from __future__ import annotations

import itertools
import weakref
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from ..errors import RankLostError
from .batch import PLAIN, children, children_of_object, leaves, rebuilt, values_of
from .loader import Bookmark, LoaderPosition, ShardedDataLoader
from .rng import RngState


class DataPosition:
    """Position of a trainer's loaders, in the order in which they were made, and of its loop over epochs.

    Attributes:
        takes_parts: Whether `train_step` takes parts: `gives_parts` at the first step, or at the first after a
            checkpoint was loaded. None before.
    """

    def __init__(self) -> None:
        self.takes_parts: bool | None = None
        self._loaders: list[weakref.ref[ShardedDataLoader]] = []
        self._positions: list[LoaderPosition] = []  # theirs, even if they are gone
        self._epoch: int | None = None  # the epoch in progress in `epochs`
        self._first_epoch: int | None = None  # the first epoch of the next call of `epochs`
        self._restored: list[dict[str, int] | None] = []  # by number of the loader; None in older checkpoints

    def add(self, loader: ShardedDataLoader) -> None:
        """Add a new loader. If `restore` has set a position for a loader of its number, it continues there."""
        number = len(self._loaders)
        self._loaders.append(weakref.ref(loader))
        self._positions.append(loader.position)
        if number < len(self._restored) and (state := self._restored[number]) is not None:
            loader.load_state_dict(state)

    @property
    def num_loaders(self) -> int:
        """Number of loaders that were made."""
        return len(self._loaders)

    @property
    def gives_parts(self) -> bool:
        """Whether the script has iterated over a loader. Then batches are the parts that it returns."""
        return any(position.is_read for position in self._positions)

    def key(self) -> tuple[int, int]:
        """Return two numbers from 0 to 2^32 - 1: one for the positions of all loaders, one for the samples there."""
        places = [(position.epoch, position.num_read) for position in self._positions]
        checksums = [position.checksum for position in self._positions]
        return zlib.crc32(repr(places).encode()), zlib.crc32(repr(checksums).encode())

    def place_of(self, inputs: Any, targets: Any) -> int:
        """Return a number that identifies the batch, if a loader has returned these last; otherwise 0.

        It is less than 2^96, with the batch's checksum, the epoch and the batch's number, from 1, in 32 bits each.
        """
        loaders = [loader for ref in self._loaders if (loader := ref()) is not None and loader.given is not None]
        own = _ids_of_leaves((inputs, targets)) if loaders else set()
        for loader in loaders:
            if own & _nodes(loader.given).keys():
                position = loader.position
                return (position.checksum << 64) + (position.epoch << 32) + position.num_read
        return 0

    def is_given(self, inputs: Any, targets: Any) -> bool:
        """Return whether these samples are those that a loader has returned last."""
        loaders = [loader for ref in self._loaders if (loader := ref()) is not None and loader.given is not None]
        own = _ids_of_leaves((inputs, targets)) if loaders else set()
        return any(own & _nodes(loader.given).keys() for loader in loaders)

    def with_sources(self, batches: Iterable[Any]) -> Iterator[tuple[Any, ShardedDataLoader | None]]:
        """Yield each batch with the loader of this trainer that was read to make it, or None if none was."""

        def given() -> list[tuple[ShardedDataLoader, int | None]]:
            loaders = (loader for ref in self._loaders if (loader := ref()) is not None)
            return [(loader, None if loader.given is None else loader.num_given) for loader in loaders]

        before = given()
        for batch in batches:
            pairs = itertools.zip_longest(given(), before, fillvalue=(None, None))
            yield (
                batch,
                next((loader for (loader, now), (_, last) in pairs if now is not None and now != last), None),
            )
            before = given()

    @property
    def is_restored_next(self) -> bool:
        """Whether the next loader to be made will continue at the position of an earlier run."""
        return len(self._loaders) < len(self._restored)

    @property
    def leads(self) -> bool:
        """Whether a run that continues finds its position by itself: it has a loader, and a loop over `epochs`."""
        return bool(self._loaders) and self._epoch is not None

    def epochs(self, num_epochs: int) -> Iterator[int]:
        """Yield the numbers of the remaining epochs."""
        first, self._first_epoch = self._first_epoch, None
        if first is None:
            loaders = [loader for ref in self._loaders if (loader := ref()) is not None]
            first = max((loader.position.epoch for loader in loaders if loader.resumes), default=0)
        for epoch in range(first, num_epochs):
            self._epoch = epoch
            yield epoch
        self._epoch = max(first, num_epochs)

    def read_ahead_again(self) -> None:
        """Make iterations in progress continue with the parts of the present set of ranks."""
        for ref in self._loaders:
            if (loader := ref()) is not None:
                loader.read_ahead_again()

    def is_outdated(self, inputs: Any, targets: Any) -> bool:
        """Return whether these parts may be for a set of ranks that has changed since a loader returned them."""
        loaders = [loader for ref in self._loaders if (loader := ref()) is not None]
        if not any(loader.is_given_outdated for loader in loaders):
            return False
        own = _ids_of_leaves((inputs, targets))
        for loader in loaders:
            if own <= _nodes(loader.given).keys():
                return loader.is_given_outdated
        return True

    def is_stand_in(self, inputs: Any, targets: Any) -> bool:
        """Return whether these are a sample that a loader has returned in place of a part without samples.

        Raises:
            ValueError: A loader has returned such a sample last, but these are other objects.
        """
        loaders = [loader for ref in self._loaders if (loader := ref()) is not None and loader.given is not None]
        if not any(loader.is_stand_in for loader in loaders):
            return False
        own = _ids_of_leaves((inputs, targets))
        for loader in loaders:
            if own & _nodes(loader.given).keys():
                return loader.is_stand_in
        raise ValueError(
            "trainer.loader returned a sample that stands in for this rank's part, which is empty, but train_step got "
            "other objects. Pass those that the loader returned, and change samples in the dataset or in collate_fn."
        )

    def awaits_weight_0(self) -> bool:
        """Return whether each loader in use has returned a stand-in last, so this rank's loss counts for nothing."""
        loaders = [loader for ref in self._loaders if (loader := ref()) is not None and loader.given is not None]
        return bool(loaders) and all(loader.is_stand_in for loader in loaders)

    def read_again(self, inputs: Any, targets: Any) -> tuple[Any, Any]:
        """Return this rank's parts, in the present set of ranks, of the batch to which these parts belong.

        Raises:
            RankLostError: No loader has returned these objects last, or the loader cannot read its batch again.
        """
        own = _ids_of_leaves((inputs, targets))
        for ref in self._loaders:
            loader = ref()
            paths = {} if loader is None else _nodes(loader.given)
            if loader is None or not own <= paths.keys():
                continue
            try:
                again = dict(_walk(loader.read_again(), ""))
                parts: tuple[Any, Any] = _replaced((inputs, targets), paths, again)
                return parts
            except TypeError as error:
                reason = str(error)
            except KeyError as error:
                reason = f"the new part has no {error}"
            break
        else:
            reason = "the tensors passed to train_step are not the same objects that trainer.loader returned"
        raise RankLostError(
            f"ranks were killed, and their part of the batch cannot be read again: {reason}. Change samples in the "
            f"dataset, in collate_fn or in the model; or let the job be started again (--restarts)."
        )

    def state(self, progress: Any) -> tuple[dict[str, Any], RngState | None]:
        """Return the position of loaders and epochs, before any batch that was returned since the last step.

        Args:
            progress: Present progress of the trainer.

        Returns:
            The position, for `restore`; and the random states before the first of these batches was read, or None if
            there is no such batch.
        """
        states: list[dict[str, int]] = []
        first: Bookmark | None = None
        for position in self._positions:
            state, bookmark = position.state_dict(), position.bookmark
            if bookmark is not None and bookmark.progress == progress:
                state = bookmark.state
                first = bookmark if first is None or bookmark.noted_ns < first.noted_ns else first
            states.append(state)
        return {"loaders": states, "epoch": self._epoch}, None if first is None else first.rng_state

    def restore(self, state: dict[str, Any]) -> None:
        """Make loaders and `epochs` continue at a position of `state`. Loaders may be made before or after the call."""
        self.takes_parts = None
        self._restored = state["loaders"]
        self._epoch = self._first_epoch = state["epoch"]
        for ref, loader_state in zip(self._loaders, self._restored, strict=False):
            loader = ref()
            if loader is not None and loader_state is not None:
                loader.load_state_dict(loader_state)


def _walk(tree: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield (path, value) of a structure, its elements, their elements and so on, and of attributes with tensors."""
    yield path, tree
    found = None if isinstance(tree, (Tensor, PLAIN)) else children(tree, path) or children_of_object(tree, path)
    for child_path, value in found or ():
        yield from _walk(value, child_path)


def _nodes(tree: Any) -> dict[int, str]:
    """Return the path of each value of a structure by its id; without plain values, whose ids are not their own."""
    return {id(value): path for path, value in _walk(tree, "") if not isinstance(value, PLAIN)}


def _ids_of_leaves(tree: Any) -> set[int]:
    return {id(leaf) for _, leaf in leaves(tree, "") if not isinstance(leaf, PLAIN)}


def _replaced(tree: Any, paths: dict[int, str], again: dict[str, Any]) -> Any:
    """Return a structure with each value that `paths` knows replaced by the value at the same path in `again`."""
    if not isinstance(tree, PLAIN) and id(tree) in paths:
        return again[paths[id(tree)]]
    values = None if isinstance(tree, PLAIN) else values_of(tree)
    return tree if values is None else rebuilt(tree, [_replaced(value, paths, again) for value in values])
