# SPDX-License-Identifier: Apache-2.0
"""Random states of a rank (of `random`, NumPy, torch and the device), and seeds that follow from each other."""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..backend.gather import gather_objects

Device = torch.device  # for the methods of RngState, whose field `torch` hides the module from type checkers
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class RngState:
    """States of all random generators that a training script draws from."""

    python: Any
    """State of `random`."""
    numpy: Any
    """State of NumPy's global generator."""
    torch: Tensor
    """State of torch's generator for the CPU."""
    device: Tensor | None
    """State of torch's generator for the device; None on the CPU."""

    @classmethod
    def capture(cls, device: Device) -> RngState:
        """Return the present states. Local."""
        on_device = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)
        return cls(random.getstate(), np.random.get_state(), torch.get_rng_state(), on_device)

    def restore(self, device: Device) -> None:
        """Make the generators draw from these states again. Local."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch)
        if self.device is not None and device.type != "cpu":
            torch.get_device_module(device).set_rng_state(self.device, device)

    def to_plain(self) -> list[Any]:
        """Return the states as tuples, lists, numbers and bytes, for a checkpoint."""
        name, keys, *rest = self.numpy
        torch_states = [None if state is None else state.numpy().tobytes() for state in (self.torch, self.device)]
        return [self.python, (name, keys.tolist(), *rest), *torch_states]

    @classmethod
    def from_plain(cls, plain: Any) -> RngState:
        """Return the states from the result of `to_plain`.

        Raises:
            ValueError, LookupError, TypeError, ArithmeticError, RuntimeError: `plain` does not hold random states.
        """
        python, (name, keys, position, *rest), *torch_states = plain
        # NumPy does not check the position, and would read random numbers from outside of the keys.
        if len(keys) != 624 or not 0 <= position <= 624:
            raise ValueError("NumPy's random state is damaged: its position or number of keys is out of range")
        numpy = name, np.array(keys, np.uint32), position, *rest
        on_cpu, on_device = (
            None if state is None else torch.frombuffer(bytearray(state), dtype=torch.uint8) for state in torch_states
        )
        if on_cpu is None:
            raise ValueError("torch's random state is missing")
        random.Random().setstate(python)  # this call and the next two raise if the state is not valid
        np.random.RandomState().set_state(numpy)
        torch.Generator().set_state(on_cpu)
        return cls(python, numpy, on_cpu, on_device)


def seed_host(seed: int) -> None:
    """Seed `random`, NumPy and torch's generator for the CPU. Local."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)


def seed_generators(owner: Any, seed: int) -> None:
    """Seed the generators of `random`, NumPy and torch that an object holds in its attributes. Local."""
    for value in getattr(owner, "__dict__", {}).values():
        if isinstance(value, torch.Generator):
            value.manual_seed(seed)
        elif isinstance(value, random.Random):
            value.seed(seed)
        elif isinstance(value, np.random.RandomState):
            value.seed(seed % 2**32)
        elif isinstance(value, np.random.Generator):
            bits = value.bit_generator
            bits.state = type(bits)(seed).state


def seed_device(seed: int, device: Device) -> None:
    """Seed torch's generator for a device other than the CPU. Local."""
    module: Any = torch.get_device_module(device)
    with module.device(device):  # it may differ from the present device
        module.manual_seed(seed)


def mix(*key: Any) -> int:
    """Return a number from 0 to 2^63 - 1 that follows from `key`, the same in every process. Local, 1.3 us.

    Each bit depends on all of `key`, so that related keys (consecutive steps, ranks) give unrelated seeds.

    Args:
        key: Numbers, strings, bytes, and tuples of these.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def spread(rank: int, device: Device) -> None:
    """Set random states that differ between ranks, computed from states that all ranks share. Local.

    Rank 0 keeps them, so that it draws like a single process.
    """
    if rank == 0:
        return
    states = RngState.capture(device)
    seed = mix(states.python, states.torch.numpy().tobytes(), rank)
    seed_host(seed)
    if states.device is not None:
        seed_device(seed, device)


def share(group: Any, device: Device, alike: bool) -> int:
    """Set the random states from rank 0's, and return a seed that follows from them. Collective, blocks.

    Nothing is drawn: rank 0's streams stay as they were.

    Args:
        group: Process group of the ranks.
        device: Device of this rank.
        alike: Set the same states on all ranks, so that shuffling and augmentation agree. False: different states.

    Returns:
        The seed, the same on every rank.
    """
    first = gather_objects(group, RngState.capture(device))[0]
    if group.rank() > 0:
        first.restore(device)
        if not alike:
            spread(group.rank(), device)
    return mix(first.torch.numpy().tobytes())


@contextlib.contextmanager
def preserved() -> Iterator[None]:
    """Restore the random states of `random`, NumPy and torch's CPU generator at the end of the block. Local."""
    states = RngState.capture(_CPU)
    try:
        yield
    finally:
        states.restore(_CPU)


class HostStreams:
    """Random streams of `random`, NumPy and torch's CPU generator that continue from one block to the next.

    Args:
        seed: Seed at the start of the first block.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._states: RngState | None = None

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Make everything draw from these streams until the end of the block. Local."""
        with preserved():
            if self._states is None:
                seed_host(self._seed)
            else:
                self._states.restore(_CPU)
            try:
                yield
            finally:
                self._states = RngState.capture(_CPU)
