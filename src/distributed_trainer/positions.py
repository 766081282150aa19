# SPDX-License-Identifier: Apache-2.0
"""How far a trainer is: its steps, and where its loaders are in the data. Nothing here communicates."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from .data import leaves, map_tensors
from .errors import RankLostError
from .loader import PartLoader


class Positions:
    """The loaders of a trainer, in the order in which they were made, and the loop over its epochs.

    Attributes:
        begun_at: Progress of the trainer when it was made, or has loaded a checkpoint.
    """

    def __init__(self) -> None:
        self.begun_at = (0, 0)
        self._loaders: list[weakref.ref[PartLoader]] = []
        self._epoch: int | None = None  # of `epochs`
        self._first_epoch: int | None = None  # for the next call of it
        self._restored: list[dict[str, int] | None] = []  # of loaders that are not made yet

    def add(self, loader: PartLoader) -> None:
        """A loader that was made. It goes on where one of the same number was, if `restore` has said so."""
        number = len(self._loaders)
        self._loaders.append(weakref.ref(loader))
        if number < len(self._restored) and (state := self._restored[number]) is not None:
            loader.load_state_dict(state)

    @property
    def is_restored_next(self) -> bool:
        """Whether the next loader that is made will go on where an earlier run was."""
        return len(self._loaders) < len(self._restored)

    @property
    def lead(self) -> bool:
        """Whether a run that goes on is led to its place: by a loader, in the loop of `epochs`."""
        return bool(self._loaders) and self._epoch is not None

    def epochs(self, num_epochs: int) -> Iterator[int]:
        """The numbers of the epochs that are left."""
        first, self._first_epoch = self._first_epoch, None
        if first is None:
            loaders = [loader for ref in self._loaders if (loader := ref()) is not None]
            first = max((loader.epoch for loader in loaders if loader.resumes), default=0)
        for epoch in range(first, num_epochs):
            self._epoch = epoch
            yield epoch
        self._epoch = max(first, num_epochs)

    def read_ahead_anew(self) -> None:
        """Has loops in progress go on with the parts of the ranks that there are now."""
        for ref in self._loaders:
            if (loader := ref()) is not None:
                loader.read_ahead_anew()

    def is_outdated(self, inputs: Any, targets: Any) -> bool:
        """Whether these may be parts of other ranks than there are now, given out before some were killed."""
        loaders = [loader for ref in self._loaders if (loader := ref()) is not None]
        if not any(loader.is_given_outdated for loader in loaders):
            return False
        own = {id(tensor) for tensor in _tensors((inputs, targets))}
        for loader in loaders:
            if own <= {id(tensor) for tensor in _tensors(loader.given)}:
                return loader.is_given_outdated
        return True

    def read_again(self, inputs: Any, targets: Any) -> tuple[Any, Any]:
        """The parts that the ranks as they are now have of the batch of which these are parts.

        Raises:
            RankLostError: They are not what a loader has given out, or it cannot read that again.
        """
        own = _tensors((inputs, targets))
        for ref in self._loaders:
            loader = ref()
            given = [] if loader is None else _tensors(loader.given)
            places = {id(tensor): place for place, tensor in enumerate(given)}
            if loader is None or not all(id(tensor) in places for tensor in own):
                continue
            try:
                again = _tensors(loader.read_again())
            except TypeError as error:
                reason = str(error)
                break
            return map_tensors(lambda tensor: again[places[id(tensor)]], (inputs, targets))  # noqa: B023
        else:
            reason = "what train_step was given is not, tensor by tensor, what trainer.loader gave out"
        raise RankLostError(
            f"ranks were killed, and their part of the batch cannot be read again: {reason}. Change samples in the "
            f"dataset, in collate_fn or in the model; or have the job started again (--restarts)."
        )

    def state(self, progress: Any) -> tuple[dict[str, Any], tuple[Any, ...] | None]:
        """Where loaders and epochs are, before batches that were given out since the last step.

        Args:
            progress: Of the trainer now.

        Returns:
            That, for `restore`; and the random states before the first of these batches was read, if there is one.
        """
        states: list[dict[str, int] | None] = []
        first = None
        for ref in self._loaders:
            loader = ref()
            states.append(None if loader is None else loader.state_dict())
            origin = None if loader is None else loader.origin
            if origin is not None and origin.progress == progress:
                states[-1] |= {"epoch": origin.epoch, "num_read": origin.num_read}
                first = origin if first is None or origin.noted_ns < first.noted_ns else first
        return {"loaders": states, "epoch": self._epoch}, first and first.random_states

    def restore(self, state: dict[str, Any], progress: tuple[int, int]) -> None:
        """Has loaders and `epochs` go on from there; loaders may be made before or after."""
        self.begun_at = progress
        self._restored = state["loaders"]
        self._epoch = self._first_epoch = state["epoch"]
        for ref, of_loader in zip(self._loaders, self._restored, strict=False):
            loader = ref()
            if loader is not None and of_loader is not None:
                loader.load_state_dict(of_loader)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for _, leaf in leaves(tree, "") if isinstance(leaf, Tensor)]
