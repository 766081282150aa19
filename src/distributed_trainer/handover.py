# SPDX-License-Identifier: Apache-2.0
"""The state of a training, handed by a rank to a process that takes a killed one's place: a checkpoint in messages."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .checkpoint import decode
from .tensor_files import DTYPE_NAMES
from .training_state import TrainingState

_TAG = 0
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


def give(state: TrainingState, objects: Mapping[str, Any], about: dict[str, Any], group: Any, receiver: int) -> None:
    """Sends the state, and what else is to be known, to a rank that is in `take`. Blocks."""
    tensors, states, own = state.collect(dict.fromkeys(objects), objects, 0, 1)
    described = {name: (DTYPE_NAMES[value.dtype], list(value.shape)) for name, value in tensors.items()}
    header = {"states": states, "own": own, "tensors": described, "step": state.num_steps, "about": about}
    text = torch.frombuffer(bytearray(json.dumps(header).encode()), dtype=torch.uint8)
    flat = [value.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for value in tensors.values()]
    for message in (text, torch.cat([*flat, text[:1]])):  # never empty
        group.send([torch.tensor([len(message)])], receiver, _TAG).wait()
        group.send([message], receiver, _TAG).wait()


def take(group: Any, sender: int) -> Received:
    """Receives what a rank gives. Blocks."""
    messages = []
    for _ in range(2):
        length = torch.zeros(1, dtype=torch.int64)
        group.recv([length], sender, _TAG).wait()
        messages.append(torch.empty(int(length), dtype=torch.uint8))
        group.recv([messages[-1]], sender, _TAG).wait()
    return Received(json.loads(messages[0].numpy().tobytes()), messages[1])


class Received:
    """Has what `TrainingState` needs of a `Checkpoint`.

    Attributes:
        about: What else was sent.
    """

    folder = "what another rank has sent"

    def __init__(self, header: dict[str, Any], data: Tensor) -> None:
        self.about = header["about"]
        self._own = header["own"]
        described = header["tensors"].items()
        about = {name: {"dtype": dtype, "shape": shape} for name, (dtype, shape) in described}
        self.content = {"states": header["states"], "tensors": about, "world_size": 1, "step": header["step"]}
        self._places: dict[str, Tensor] = {}
        start = 0
        for name, (dtype, shape) in described:
            size = torch.Size(shape).numel() * _DTYPES[dtype].itemsize
            self._places[name] = data[start : start + size]
            start += size

    def of_rank(self, _rank: int) -> dict[str, Any]:
        """What the sender has written for itself."""
        return self._own

    def tensor(self, name: str) -> Tensor:
        """A tensor, in memory of its own."""
        about = self.content["tensors"][name]
        return self._places[name].clone().view(_DTYPES[about["dtype"]]).view(about["shape"])

    def state(self, name: str) -> Any:
        """The state of the model, or of the object with that name."""
        return decode(self.content["states"][name]["state"], self.tensor)
