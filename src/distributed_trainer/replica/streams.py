# SPDX-License-Identifier: Apache-2.0
"""Random streams from which a model draws within a step. Nothing here communicates.

1. The trainer has a seed, the same on every rank. The streams of a step follow from it and from the step's number, so a
   step that is repeated, or continued from a checkpoint, draws the same again.
2. In a step torch draws from this rank's *own stream* (dropout). Afterwards the script's streams are as they were, on
   any number of ranks.
3. In a block of `common_random` all streams are *common streams*, the same on every rank and in each microbatch.

Torch's generator for the CPU uses the low 32 bits of its seed, and keeps the whole seed as a part of its state. So the
seed of an own stream has two halves:

    high half: the next common stream, the same on every rank
    low half: this rank's own stream

A block of `common_random` reads the high half, and at its end sets the seed that follows. There is no count and no
memory of blocks: where a forward is computed again, activation checkpointing sets the generator's state at its start,
and with it the common stream that comes next.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from ..data import rng

_OWN_BITS = (1 << 32) - 1
_CPU = torch.device("cpu")

_devices: list[torch.device] = []  # devices of the steps in progress; autograd's threads read it, too


class StepStreams:
    """Random streams of a trainer's steps on one rank.

    Args:
        rank: This rank's number.
        device: Device on which this rank computes.
    """

    def __init__(self, rank: int, device: torch.device) -> None:
        self._rank, self._device = rank, device
        self._step: tuple[Any, ...] | None = None  # key of the last step
        self._num_microbatches = 0  # begun in it

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Surround the part of a step that may draw; restore the script's streams at the end. Local."""
        on_cpu = torch.default_generator.get_state()
        module: Any = None if self._device.type == "cpu" else torch.get_device_module(self._device)
        on_device = None if module is None else module.get_rng_state(self._device)
        _devices.append(self._device)
        try:
            yield
        finally:
            _devices.pop()
            torch.default_generator.set_state(on_cpu)
            if module is not None:
                module.set_rng_state(on_device, self._device)

    def begin(self, step: tuple[Any, ...], *block: Any) -> None:
        """Make torch draw from the stream of a part of a step, inside `active`. Local.

        Args:
            step: Key of the step, from which its common streams follow; the same on every rank.
            block: Key of the part.
        """
        common = rng.mix(*step)
        _seed(common, rng.mix(common, *block), self._device)

    def begin_microbatch(self, step: tuple[Any, ...]) -> None:
        """Make torch draw from this rank's own stream of the next microbatch (or forward, or backward). Local."""
        if step != self._step:
            self._step, self._num_microbatches = step, 0
        self.begin(step, self._rank, self._num_microbatches)
        self._num_microbatches += 1

    def begin_again(self) -> None:
        """Make the next microbatch the first of its step: an earlier attempt has failed. Local."""
        self._step = None


@contextlib.contextmanager
def common_random() -> Iterator[None]:
    """Make all ranks draw the same random numbers in the block, for control flow inside a model. Local.

        def forward(self, x):
            with common_random():
                keep = torch.rand(len(self.layers)) >= self.drop_rate  # stochastic depth
            for layer, is_kept in zip(self.layers, keep.tolist()):
                x = layer(x) if is_kept else x
            return x

    In a step of a trainer (`train_step`, `forward`, `backward`, `evaluate`) each rank draws from a random stream of its
    own, so that dropout differs between samples. A decision about the whole batch must be the same on every rank: put
    its draws into this block. They are the same on every rank and in each microbatch of a step, and new in the next
    step. Recomputation by torch.utils.checkpoint draws the same again (unless `preserve_rng_state=False`).

    The block covers torch on the CPU and on the trainer's device, `random` and NumPy. It takes 0.1 ms, so draw for many
    layers in one block. Streams of `random` and NumPy are afterwards as before.

    Outside of a trainer's steps the block changes nothing: the model then works as if it were not there. Plain torch
    therefore decides by other numbers than a trainer. A trainer decides the same on any number of ranks, 1 included.

    Returns:
        The context manager of the block.
    """
    if not _devices:
        yield
        return
    device, seed = _devices[-1], torch.initial_seed()
    common = rng.mix(seed >> 32)
    states = random.getstate(), np.random.get_state()
    random.seed(common)
    np.random.seed(common & _OWN_BITS)
    _seed(common, common, device)
    try:
        yield
    finally:
        _seed(rng.mix(seed >> 32, "next"), rng.mix(seed, "next"), device)
        random.setstate(states[0])
        np.random.set_state(states[1])


def first_drawing_module(model: nn.Module) -> str | None:
    """Return the name of the first module of torch.nn that draws in its present mode; None if there is none. Local."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            rate = module.p
        elif isinstance(module, nn.MultiheadAttention | nn.RNNBase):
            rate = module.dropout
        else:
            rate = float(isinstance(module, nn.RReLU))
        if module.training and rate:
            return name or type(module).__name__
    return None


def _seed(common: int, own: int, device: torch.device) -> None:
    """Seed torch's generators with the high half of `common` and the low half of `own`."""
    seed = (common & ~_OWN_BITS) | (own & _OWN_BITS)
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        rng.seed_device(seed, device)
