# SPDX-License-Identifier: Apache-2.0
"""Send the state of a training to a process that replaces a killed rank: a checkpoint in messages."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..replica.replica import Replica
from .format import decode
from .safetensors import DTYPE_NAMES
from .state import TrainingState

_TAG = 0
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


def send_state(
    state: TrainingState, replica: Replica, objects: Mapping[str, Any], about: dict[str, Any], group: Any, receiver: int
) -> None:
    """Send the state to a rank that has called `receive_state`. Blocks.

    Args:
        state: State of the training.
        replica: This rank's replica of the model among the ranks before.
        objects: Objects that belong to the state, by their names in `resume`.
        about: Other data for the receiver that JSON can hold.
        group: Process group that has both ranks.
        receiver: Number of the other rank in it.
    """
    values, states, own = state.state_dict(replica, dict.fromkeys(objects), objects, 0, 1)
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    assert len(tensors) == len(values)  # no parts: a sharded training has no recovery
    described = {name: (DTYPE_NAMES[value.dtype], list(value.shape)) for name, value in tensors.items()}
    header = {"states": states, "own": own, "tensors": described, "step": state.num_steps, "about": about}
    text = torch.frombuffer(bytearray(json.dumps(header).encode()), dtype=torch.uint8)
    flat = [value.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for value in tensors.values()]
    for message in (text, torch.cat([*flat, text[:1]])):  # one byte more, so that no message is empty
        group.send([torch.tensor([len(message)])], receiver, _TAG).wait()
        group.send([message], receiver, _TAG).wait()


def receive_state(group: Any, sender: int) -> Received:
    """Receive the state that a rank sends with `send_state`. Blocks."""
    messages = []
    for _ in range(2):
        length = torch.zeros(1, dtype=torch.int64)
        group.recv([length], sender, _TAG).wait()
        messages.append(torch.empty(int(length), dtype=torch.uint8))
        group.recv([messages[-1]], sender, _TAG).wait()
    return Received(json.loads(messages[0].numpy().tobytes()), messages[1])


class Received:
    """State that another rank has sent, with the part of `Checkpoint` that `TrainingState` uses.

    Attributes:
        about: The sender's argument `about`.
        content: Entries of a checkpoint.json.
    """

    folder = "what another rank has sent"

    def __init__(self, header: dict[str, Any], data: Tensor) -> None:
        self.about = header["about"]
        self._own: dict[str, Any] = header["own"]
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
        """Return the data that the sender has written for itself."""
        return self._own

    def tensor(self, name: str) -> Tensor:
        """Return a copy of a tensor."""
        about = self.content["tensors"][name]
        return self._places[name].clone().view(_DTYPES[about["dtype"]]).view(about["shape"])

    def state(self, name: str) -> Any:
        """Return the state of the model, or of the object with that name."""
        return decode(self.content["states"][name]["state"], self.tensor)
