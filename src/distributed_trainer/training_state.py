# SPDX-License-Identifier: Apache-2.0
"""What of a training is in a checkpoint: taken from a trainer, cut into what each rank writes, and put back.

Replicated tensors are the same on all ranks, so each rank writes some of them. Nothing here communicates: that the
ranks divide alike follows from their having the same names and sizes.
"""

from __future__ import annotations

import random
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .alignment import random_states, set_random_states, spread_random_states
from .checkpoint import Checkpoint, decode, encode
from .checkpoint_form import require
from .errors import CheckpointError
from .positions import Positions
from .replica import Replica
from .tensor_files import DTYPE_NAMES, Part, Piece, copy_to_files, divide, pieces_of

MODEL = "model"


@dataclass(frozen=True)
class OwnPart:
    """What a rank has to write, as `checkpoint.write_part` takes it."""

    files: dict[str, Tensor]
    tensors: dict[str, Any]
    states: Any
    own: Any


class TrainingState:
    """A trainer's model, optimizers, random states and place in the data.

    Attributes:
        replica: The trainer's.
    """

    def __init__(
        self, model: nn.Module, replica: Replica, positions: Positions, device: torch.device, has_common_stream: bool
    ) -> None:
        self._model, self.replica, self._positions, self._device = model, replica, positions, device
        self._has_common_stream = has_common_stream
        self._optimizers: list[weakref.ref[torch.optim.Optimizer]] = []  # in the order of their first step

    @property
    def num_steps(self) -> int:
        """Steps so far; backwards where the optimizer's steps are not made through the trainer."""
        return self.replica.num_steps or self.replica.num_sums

    def note_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """An optimizer with which the trainer is about to step for the first time. The same order on every rank."""
        self._optimizers.append(weakref.ref(optimizer))

    def numbers_of(self, objects: Mapping[str, Any]) -> dict[str, int | None]:
        """By which all ranks know those objects that are optimizers; None for others, which this rank alone has."""
        known = [ref() for ref in self._optimizers]
        places = {id(optimizer): number for number, optimizer in enumerate(known) if optimizer is not None}
        return {name: places.get(id(value)) for name, value in objects.items()}

    def take(
        self, numbers: Mapping[str, int | None], objects: Mapping[str, Any] | None, rank: int, num_ranks: int
    ) -> OwnPart:
        """Copies what this rank writes. Arguments and errors as of `collect`."""
        own, states, about = self.collect(numbers, objects, rank, num_ranks)
        pieces = [piece for name, value in own.items() for piece in pieces_of(name, value)]
        return OwnPart(copy_to_files(pieces, f"rank-{rank:05}"), _describe(pieces), states, about)

    def collect(
        self, numbers: Mapping[str, int | None], objects: Mapping[str, Any] | None, rank: int, num_ranks: int
    ) -> tuple[dict[str, Tensor | Part], Any, dict[str, Any]]:
        """What this rank writes: its tensors, as they are in memory; the form of all states; what is its own.

        Args:
            numbers: The names of what is saved, and what `numbers_of` has said on the rank that writes the states.
            objects: On that rank, the objects themselves; None on others.
            rank: This one.
            num_ranks: Of all.

        Raises:
            CheckpointError: An optimizer is not there any more.
            TypeError: A state has something in it that a checkpoint cannot hold.
        """
        common: dict[str, Tensor | Part] = {}
        own: dict[str, Tensor | Part] = {}
        states = {MODEL: {"type": type(self._model).__name__, "state": encode(self._model.state_dict(), MODEL, common)}}
        with self.replica.optimizer_parts():
            for name, number in numbers.items():
                if number is None and objects is None:
                    continue
                value = objects[name] if number is None else self._optimizers[number]()
                if value is None:
                    raise CheckpointError(f"rank {rank} has let go of the optimizer that is {name} elsewhere")
                state = encode(value.state_dict(), name, own if number is None else common)
                states[name] = {"type": type(value).__name__, "state": state}
        owners = divide({name: value.nbytes for name, value in common.items() if isinstance(value, Tensor)}, num_ranks)
        # Those that evaluation has changed differ between ranks; the next step gives all ranks those of the first.
        owners |= {f"{MODEL}.{name}": 0 for name, _ in self._model.named_buffers()}
        own |= {name: value for name, value in common.items() if owners.get(name, rank) == rank}
        position, streams = self._positions.state(self.replica.progress)
        replica = self.replica
        about = {
            "random_states": _random_to_json(streams or random_states(self._device)),
            "step": self.num_steps,
            "progress": [replica.num_steps, replica.num_sums, replica.num_skipped_steps],
            "position": position,
        }
        return own, states if objects is not None else None, about

    def check(self, checkpoint: Checkpoint, objects: Mapping[str, Any]) -> None:
        """Raises ValueError if a checkpoint is of another model, or of other objects. Local."""
        states = checkpoint.content["states"]
        saved, given = sorted(set(states) - {MODEL}), sorted(objects)
        if saved != given:
            raise ValueError(
                f"{checkpoint.folder} holds the model and {_list(saved)}, but the model and {_list(given)} are to be "
                f"loaded. Name them as in save."
            )
        for name, value in objects.items():
            if states[name]["type"] != type(value).__name__:
                raise ValueError(
                    f"{name} is a {states[name]['type']} in {checkpoint.folder}, but a {type(value).__name__} is to be "
                    f"loaded. Make what was saved."
                )
        tensors: dict[str, Any] = {}
        encode(self._model.state_dict(), MODEL, tensors)
        prefix = f"{MODEL}."
        wanted = {name: (DTYPE_NAMES[value.dtype], list(value.shape)) for name, value in tensors.items()}
        found = {
            name: (about["dtype"], about["shape"])
            for name, about in checkpoint.content["tensors"].items()
            if name.startswith(prefix)
        }
        for name in [*wanted, *found]:
            if wanted.get(name) != found.get(name):
                here, there = (
                    f"no {name[len(prefix) :]}"
                    if name not in which
                    else "{} {} {}".format(name[len(prefix) :], *which[name])
                    for which in (wanted, found)
                )
                raise ValueError(
                    f"{checkpoint.folder} is of another model: it has {there}, this model has {here}. Build the model "
                    f"that was saved."
                )

    def has_position_of(self, checkpoint: Checkpoint) -> bool:
        """Whether a checkpoint knows where in the data it is. Local."""
        return bool(checkpoint.of_rank(0)["position"]["loaders"])

    def put_back(self, checkpoint: Checkpoint, objects: Mapping[str, Any], rank: int, num_ranks: int) -> None:
        """Has everything go on from a checkpoint that `check` has accepted. Local."""
        content, replica = checkpoint.content, self.replica
        same_ranks = content["world_size"] == num_ranks
        first = checkpoint.of_rank(0)
        own = checkpoint.of_rank(rank) if same_ranks else first
        streams = _random_from_json(own["random_states"], checkpoint)
        self._model.load_state_dict(checkpoint.state(MODEL))
        for name, value in objects.items():
            state = checkpoint.state(name)
            if isinstance(value, torch.optim.Optimizer):
                _take_strides(value, state)
            value.load_state_dict(state)
        replica.num_steps, replica.num_sums, replica.num_skipped_steps = first["progress"]
        self._positions.restore(first["position"], replica.progress)
        set_random_states(streams, self._device)
        if not same_ranks and not self._has_common_stream:
            spread_random_states(rank)


def _describe(pieces: list[Piece]) -> dict[str, Any]:
    """Of each tensor: its dtype, its shape, and how many of its elements are in these pieces."""
    about: dict[str, Any] = {}
    for piece in pieces:
        dtype = DTYPE_NAMES[piece.tensor.dtype]
        _, _, num_before = about.get(piece.name, (None, None, 0))
        about[piece.name] = (dtype, piece.shape, num_before + piece.tensor.numel())
    return about


def _take_strides(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """Lays a state out as its parameter is, on which the last bits of an update may depend (channels-last)."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
    for number, parameter in zip(numbers, parameters, strict=False):  # torch compares the lengths
        state = state_dict["state"].get(number, {})
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and not parameter.is_contiguous():
                state[key] = torch.empty_like(parameter, dtype=value.dtype, device=value.device).copy_(value)


def _random_to_json(states: tuple[Any, ...]) -> Any:
    python_state, (name, keys, *rest), *of_torch = states
    data = [None if state is None else state.numpy().tobytes() for state in of_torch]
    return encode([python_state, (name, keys.tolist(), *rest), *data], "random", {})


def _random_from_json(value: Any, checkpoint: Checkpoint) -> tuple[Any, ...]:
    try:
        python_state, (name, keys, position, *rest), *data = decode(value, {}.__getitem__)
        # NumPy does not look: it would take random numbers from anywhere in memory.
        require(len(keys) == 624 and 0 <= position <= 624, "NumPy's random state")
        numpy_state = name, np.array(keys, np.uint32), position, *rest
        on_cpu, on_device = (
            None if one is None else torch.frombuffer(bytearray(one), dtype=torch.uint8) for one in data
        )
        random.Random().setstate(python_state)  # whether they are states at all
        np.random.RandomState().set_state(numpy_state)
        torch.Generator().set_state(on_cpu)
    except (ValueError, LookupError, TypeError, ArithmeticError, RuntimeError) as error:
        raise CheckpointError(
            f"{checkpoint.folder} has random states that are none ({error}). Take another checkpoint."
        ) from None
    return python_state, numpy_state, on_cpu, on_device


def _list(names: list[str]) -> str:
    return ", ".join(names) or "nothing else"
