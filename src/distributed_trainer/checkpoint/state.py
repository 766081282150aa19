# SPDX-License-Identifier: Apache-2.0
"""State of a training: collected for a checkpoint, divided among the ranks that write it, and loaded again.

Replicated tensors are the same on all ranks, so each rank writes some of them. Nothing here communicates: all ranks
divide the tensors in the same way because they have the same names and sizes.
"""

from __future__ import annotations

import weakref
import zlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..data import rng
from ..data.position import DataPosition
from ..errors import CheckpointError
from ..gradients.loss_scale import FIRST
from ..gradients.sharded_optimizer import Part
from ..replica.divergence import sum_of_bits
from ..replica.replica import Progress, Replica
from .format import decode, encode
from .safetensors import DTYPE_NAMES, Piece, copy_to_files, divide, pieces_of

MODEL = "model"


def is_stateful(value: Any) -> bool:
    """Return whether a checkpoint can hold an object: it, or the object that it wraps, has a state."""
    return all(callable(getattr(value, name, None)) for name in ("state_dict", "load_state_dict"))


@dataclass(frozen=True)
class OwnPart:
    """The part of a checkpoint that a rank writes; its fields are arguments of `format.write_part`."""

    files: dict[str, Tensor]
    tensors: dict[str, Any]
    states: Any
    own: Any


class SavedState(Protocol):
    """A saved state of a training: a `Checkpoint`, or what another rank has sent (`transfer.Received`)."""

    content: dict[str, Any]
    """The entries "states", "tensors", "world_size" and "step" of a checkpoint.json."""

    @property
    def folder(self) -> Path | str:
        """Where the state comes from, for messages."""

    def of_rank(self, rank: int, /) -> dict[str, Any]:
        """Return the data that a rank has written for itself."""

    def state(self, name: str) -> Any:
        """Return the state of the model, or of the object with that name."""


class TrainingState:
    """A trainer's model, optimizers, progress, random states and position in the data. It outlives ranks.

    Args:
        model: The trainer's model.
        progress: Counts of the training.
        position: Position of the trainer's loaders in the data.
        device: Device of the model.
        has_common_stream: Whether all ranks draw from the same random stream.
    """

    def __init__(
        self,
        model: nn.Module,
        progress: Progress,
        position: DataPosition,
        device: torch.device,
        has_common_stream: bool,
    ) -> None:
        self._model, self._progress, self._position, self._device = model, progress, position, device
        self._has_common_stream = has_common_stream
        self._optimizers: list[weakref.ref[torch.optim.Optimizer]] = []  # in the order of their first step

    @property
    def num_steps(self) -> int:
        """Number of steps so far; of backwards if the optimizer's steps are not made through the trainer."""
        return self._progress.num_steps or self._progress.num_commits

    def register_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Remember an optimizer that is about to make its first step in the trainer.

        Local; called in the same order on every rank.
        """
        self._optimizers.append(weakref.ref(optimizer))

    def numbers_of(self, objects: Mapping[str, Any]) -> dict[str, int | None]:
        """Return the number that identifies each optimizer on every rank; None for objects that only this rank has."""
        known = [ref() for ref in self._optimizers]
        places = {id(optimizer): number for number, optimizer in enumerate(known) if optimizer is not None}
        return {name: places.get(id(value)) for name, value in objects.items()}

    def snapshot(
        self,
        replica: Replica,
        numbers: Mapping[str, int | None],
        objects: Mapping[str, Any] | None,
        rank: int,
        num_ranks: int,
        trainable_only: bool,
    ) -> OwnPart:
        """Copy the part of the state that this rank writes. Local; arguments and errors are those of `state_dict`."""
        own, states, about = self.state_dict(replica, numbers, objects, rank, num_ranks, trainable_only)
        pieces = [piece for name, value in own.items() for piece in pieces_of(name, value)]
        return OwnPart(copy_to_files(pieces, f"rank-{rank:05}"), _describe(pieces), states, about)

    def state_dict(
        self,
        replica: Replica,
        numbers: Mapping[str, int | None],
        objects: Mapping[str, Any] | None,
        rank: int,
        num_ranks: int,
        trainable_only: bool = False,
    ) -> tuple[dict[str, Tensor | Part], Any, dict[str, Any]]:
        """Collect the part of the state that this rank writes. Local.

        Args:
            replica: This rank's replica of the model among the present ranks.
            numbers: Names of the objects to save, with their numbers (`numbers_of`) on the rank that writes the states.
            objects: On that rank, the objects themselves; None on others.
            rank: This rank's number.
            num_ranks: Number of ranks.
            trainable_only: Leave out the model's parameters that have no gradient; a checksum is in their place.

        Returns:
            This rank's tensors, not copied; the form of all states (None if `objects` is None); the data that each rank
            writes for itself.

        Raises:
            CheckpointError: An optimizer was deleted on this rank.
            TypeError: A state holds something that a checkpoint cannot hold.
        """
        common: dict[str, Tensor | Part] = {}
        own: dict[str, Tensor | Part] = {}
        frozen = self._frozen() if trainable_only else {}
        kept = {name: value for name, value in self._model.state_dict().items() if name not in frozen}
        states = {MODEL: {"type": type(self._model).__name__, "state": encode(kept, MODEL, common)}}
        if trainable_only and objects is not None:
            states[MODEL]["frozen"] = _checksum(frozen)
        with replica.optimizer_parts():
            for name, number in numbers.items():
                if number is not None:
                    value = self._optimizers[number]()
                elif objects is not None:
                    value = objects[name]
                else:
                    continue
                if value is None:
                    raise CheckpointError(f"rank {rank} has deleted the optimizer that other ranks save as {name}")
                state = encode(value.state_dict(), name, own if number is None else common)
                states[name] = {"type": type(value).__name__, "state": state}
        owners = divide({name: value.nbytes for name, value in common.items() if isinstance(value, Tensor)}, num_ranks)
        # Buffers that evaluation has changed differ between ranks: the next step gives all ranks rank 0's.
        owners |= {f"{MODEL}.{name}": 0 for name, _ in self._model.named_buffers()}
        own |= {name: value for name, value in common.items() if owners.get(name, rank) == rank}
        position, streams = self._position.state(self._progress.counts)
        about = {
            "random_states": encode((streams or rng.RngState.capture(self._device)).to_plain(), "random", {}),
            "step": self.num_steps,
            "progress": [*self._progress.counts, self._progress.num_skipped_steps],
            "position": position,
            "seed": self._progress.seed,
            "loss_scale": [self._progress.loss_scale.value, self._progress.loss_scale.num_finite],
        }
        return own, states if objects is not None else None, about

    def _frozen(self) -> dict[str, Tensor]:
        """Return the model's parameters that have no gradient, by their names in its state. Local."""
        state = self._model.state_dict(keep_vars=True)
        return {n: value for n, value in state.items() if isinstance(value, nn.Parameter) and not value.requires_grad}

    def check(self, checkpoint: SavedState, objects: Mapping[str, Any]) -> None:
        """Raise ValueError if a checkpoint is of another model, or has other objects. Local."""
        states = checkpoint.content["states"]
        saved, given = sorted(set(states) - {MODEL}), sorted(objects)
        there, here = _lengths(saved), _lengths(given)
        for name in there & here:
            if there[name] != here[name]:
                raise ValueError(
                    f"{name} is a list of {there[name]} in {checkpoint.folder}, but a list of {here[name]} is to be "
                    f"loaded. Pass as many objects as were saved, in the same order."
                )
        if saved != given:
            raise ValueError(
                f"{checkpoint.folder} holds the model and {_list(saved)}, but the model and {_list(given)} are to be "
                f"loaded. Name them as in save."
            )
        for name, value in objects.items():
            if states[name]["type"] != type(value).__name__:
                raise ValueError(
                    f"{name} is a {states[name]['type']} in {checkpoint.folder}, but a {type(value).__name__} is to be "
                    f"loaded. Pass an object of the saved type."
                )
        tensors: dict[str, Any] = {}
        saved_frozen = states[MODEL].get("frozen")
        frozen = {} if saved_frozen is None else self._frozen()
        encode({name: v for name, v in self._model.state_dict().items() if name not in frozen}, MODEL, tensors)
        prefix = f"{MODEL}."
        wanted = {name: (DTYPE_NAMES[value.dtype], list(value.shape)) for name, value in tensors.items()}
        found = {
            name: (about["dtype"], about["shape"])
            for name, about in checkpoint.content["tensors"].items()
            if name.startswith(prefix)
        }
        for name in [*wanted, *found]:
            if wanted.get(name) != found.get(name):
                found_here, found_there = (
                    f"no {name[len(prefix) :]}"
                    if name not in which
                    else "{} {} {}".format(name[len(prefix) :], *which[name])
                    for which in (wanted, found)
                )
                raise ValueError(
                    f"{checkpoint.folder} is of another model: it has {found_there}, this model has {found_here}. "
                    f"Build the model that was saved" + (", with the same parameters frozen." if frozen else ".")
                )
        if saved_frozen is not None and saved_frozen != (own := _checksum(frozen)):
            raise ValueError(
                f"{checkpoint.folder} was saved with trainable_only=True: it has no frozen parameters, and goes with "
                f"{saved_frozen}. This model has {own}. Load the same base model before."
            )

    def has_position_of(self, checkpoint: SavedState) -> bool:
        """Return whether a checkpoint knows the position in the data. Local."""
        return bool(checkpoint.of_rank(0)["position"]["loaders"])

    def load_state_dict(self, checkpoint: SavedState, objects: Mapping[str, Any], rank: int, num_ranks: int) -> None:
        """Make the training continue from a checkpoint that `check` has accepted. Local.

        Args:
            checkpoint: The checkpoint.
            objects: Objects to load, by name.
            rank: This rank's number.
            num_ranks: Number of ranks.
        """
        content, progress = checkpoint.content, self._progress
        same_ranks = content["world_size"] == num_ranks
        first = checkpoint.of_rank(0)
        own = checkpoint.of_rank(rank) if same_ranks else first
        streams = _random_from_json(own["random_states"], checkpoint)
        is_whole = "frozen" not in content["states"][MODEL]  # else `check` has compared the names
        self._model.load_state_dict(checkpoint.state(MODEL), strict=is_whole)
        for name, value in objects.items():
            state = checkpoint.state(name)
            if isinstance(value, torch.optim.Optimizer):
                _take_strides(value, state)
            value.load_state_dict(state)
        progress.num_steps, progress.num_commits, progress.num_skipped_steps = first["progress"]
        progress.seed = first.get("seed", progress.seed)  # earlier versions did not save it
        progress.loss_scale.value, progress.loss_scale.num_finite = first.get("loss_scale", (FIRST, 0))  # nor this
        self._position.restore(first["position"])
        streams.restore(self._device)
        if not same_ranks and not self._has_common_stream:
            rng.spread(rank, self._device)


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    """Return number and checksum of tensors. Local; reads all of them."""
    value = 0
    for name, tensor in tensors.items():
        about = f"{name} {tensor.dtype} {list(tensor.shape)} {int(sum_of_bits(tensor.detach()))}"
        value = zlib.crc32(about.encode(), value)
    return f"{len(tensors)} frozen parameters of checksum {value:08x}"


def _describe(pieces: list[Piece]) -> dict[str, Any]:
    """Return for each tensor its dtype, the shape of the whole, and the number of its elements in these pieces."""
    about: dict[str, Any] = {}
    for piece in pieces:
        dtype = DTYPE_NAMES[piece.tensor.dtype]
        _, _, num_before = about.get(piece.name, (None, None, 0))
        about[piece.name] = (dtype, piece.shape, num_before + piece.tensor.numel())
    return about


def _take_strides(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """Lay out a state's tensors like their parameters (such as channels-last).

    The last bits of an update may depend on this layout.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
    for number, parameter in zip(numbers, parameters, strict=False):  # torch compares the lengths
        state = state_dict["state"].get(number, {})
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and not parameter.is_contiguous():
                state[key] = torch.empty_like(parameter, dtype=value.dtype, device=value.device).copy_(value)


def _random_from_json(value: Any, checkpoint: SavedState) -> rng.RngState:
    tensors: dict[str, Tensor] = {}
    try:
        return rng.RngState.from_plain(decode(value, tensors.__getitem__))
    except (ValueError, LookupError, TypeError, ArithmeticError, RuntimeError) as error:
        raise CheckpointError(
            f"{checkpoint.folder} has invalid random states ({error}). Take another checkpoint."
        ) from None


def _lengths(names: list[str]) -> Counter[str]:
    """Return the number of objects of each list among the names of saved objects (`Request.check`)."""
    return Counter(name.rpartition("[")[0] for name in names if name.endswith("]"))


def _list(names: list[str]) -> str:
    return ", ".join(names) or "nothing else"
