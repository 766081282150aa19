# SPDX-License-Identifier: Apache-2.0
"""What makes the ranks' models replicas and keeps them so, beside the gradients: weights, buffers, random states."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from .backend import gather_objects
from .errors import MismatchError


def align_models(model: nn.Module, group: Any) -> None:
    """Gives parameters and buffers rank 0's values. Collective, blocks.

    Raises:
        MismatchError: The models differ in a name, shape, dtype or requires_grad. The same on every rank.
    """
    tensors = [*model.named_parameters(), *model.named_buffers()]
    own = [(name, list(tensor.shape), str(tensor.dtype), tensor.requires_grad) for name, tensor in tensors]
    gathered = gather_objects(group, own)
    for rank, other in enumerate(gathered):
        if other != gathered[0]:
            raise MismatchError(_model_difference(rank, gathered[0], other))
    for _, tensor in tensors:
        _broadcast(group, tensor.detach(), 0)


def align_random_states(group: Any, alike: bool) -> None:
    """Sets the states of `random`, NumPy and torch from rank 0's. Collective, blocks.

    Args:
        group: The ranks.
        alike: All ranks get the same state, so that shuffling and augmentation agree; else each its own.
    """
    states = (random.getstate(), np.random.get_state(), torch.get_rng_state().numpy())
    python_state, numpy_state, torch_state = gather_objects(group, states)[0]
    if alike:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch.from_numpy(torch_state))
    elif group.size() > 1:
        random.setstate(python_state)
        torch.set_rng_state(torch.from_numpy(torch_state))
        spread_random_states(group.rank())


def spread_random_states(rank: int) -> None:
    """Gives this rank random states of its own, where all ranks have the same. Local."""
    states = random.getstate(), torch.get_rng_state().numpy().tobytes()
    seed = random.Random(repr(states)).getrandbits(32) ^ rank
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def random_states(device: torch.device) -> tuple[Any, ...]:
    """The states of `random`, NumPy, torch and the device. Local."""
    module = None if device.type == "cpu" else torch.get_device_module(device)
    device_state = module.get_rng_state(device) if module else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), device_state


def set_random_states(states: tuple[Any, ...], device: torch.device) -> None:
    """Goes back to what `random_states` has returned. Local."""
    python_state, numpy_state, torch_state, device_state = states
    random.setstate(python_state)
    np.random.set_state(numpy_state)
    torch.set_rng_state(torch_state)
    if device_state is not None and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(device_state, device)


def draw_seed() -> int:
    """Draws a seed from torch's stream, by which loaders shuffle: where that is common to all ranks, it stays so."""
    return int(torch.empty((), dtype=torch.int64).random_())


@contextlib.contextmanager
def random_stream(seed: int, device: torch.device) -> Iterator[None]:
    """Within it torch draws (dropout) from a stream that begins with the seed. Local."""
    modules: list[Any] = [torch.random]
    if device.type != "cpu":
        modules.append(torch.get_device_module(device))
    states = [module.get_rng_state() for module in modules]
    torch.default_generator.manual_seed(seed)
    for module in modules[1:]:
        module.manual_seed(seed)
    try:
        yield
    finally:
        for module, state in zip(modules, states, strict=True):
            module.set_rng_state(state)


class SharedBuffers:
    """The buffers of a model that become one rank's after each step in which any rank's have changed.

    Args:
        model: Its buffers are looked up now, those added later stay local.
        group: The ranks.
        skip_batchnorm: Leave out those of BatchNorm modules, which are the same on all ranks already.
    """

    def __init__(self, model: nn.Module, group: Any, skip_batchnorm: bool) -> None:
        skipped = (nn.modules.batchnorm._BatchNorm,) if skip_batchnorm else ()
        self._group = group
        self._places = [
            (module, name)
            for module in model.modules()
            if not isinstance(module, skipped)
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        self._versions = self._current_versions()

    def have_changed(self) -> bool:
        """Whether this rank's have been written to or replaced since they were shared. Local."""
        return self._current_versions() != self._versions

    def share(self, source: int) -> None:
        """Copies rank `source`'s to all ranks. Collective, blocks."""
        if not self._places:
            return
        buffers = [module._buffers[name].detach() for module, name in self._places]
        flat = torch.cat([buffer.reshape(-1).view(torch.uint8) for buffer in buffers])
        _broadcast(self._group, flat, source)
        pieces = flat.split([buffer.numel() * buffer.element_size() for buffer in buffers])
        for buffer, piece in zip(buffers, pieces, strict=True):
            buffer.copy_(piece.clone().view(buffer.dtype).view(buffer.shape))  # the clone is aligned
        self._versions = self._current_versions()

    def _current_versions(self) -> list[tuple[int, int]]:
        return [(id(module._buffers[name]), module._buffers[name]._version) for module, name in self._places]


def _broadcast(group: Any, tensor: Tensor, source: int) -> None:
    options = dist.BroadcastOptions()
    options.rootRank = source
    group.broadcast([tensor], options).wait()


def _model_difference(rank: int, first: list[Any], other: list[Any]) -> str:
    def describe(name: str, shape: list[int], dtype: str, requires_grad: bool) -> str:
        return f"{name} {shape} {dtype.removeprefix('torch.')}{'' if requires_grad else ' without gradient'}"

    remedy = "Build the model the same way on every rank."
    for ours, theirs in zip(first, other, strict=False):
        if ours != theirs:
            return f"models differ: rank 0 has {describe(*ours)}, rank {rank} has {describe(*theirs)}. {remedy}"
    longer, extra = (0, first[len(other)]) if len(first) > len(other) else (rank, other[len(first)])
    return (
        f"models differ: rank 0 has {len(first)} parameters and buffers, rank {rank} has {len(other)}; only rank "
        f"{longer} has {describe(*extra)}. {remedy}"
    )
