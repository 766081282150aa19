# SPDX-License-Identifier: Apache-2.0
"""Steps that begin again with smaller pieces where memory runs out on any rank.

A rank on which it does goes on with two samples of the piece in the place of all, a *stand-in*, where BatchNorm has
others wait for its calls. After the backwards all ranks learn of it, and send what is left of their buckets. Then they
go back to where the step began and repeat it in twice as many pieces. Later steps keep that number.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .alignment import random_states, set_random_states
from .backend import gather_bytes, gather_objects

logger = logging.getLogger("distributed_trainer")


class PiecesTooLarge(Exception):
    """Memory ran out on some rank. The same on every rank.

    Attributes:
        num_samples: Of the longest piece of any rank.
    """

    def __init__(self, num_samples: int) -> None:
        super().__init__(num_samples)
        self.num_samples = num_samples


class FittingPieces:
    """Finds in how many pieces a step fits into the memory of every rank, and remembers it.

    Attributes:
        num_pieces: Of a step.
        shortage: What the allocator has said on this rank in the current attempt; None while there is enough.
    """

    def __init__(self, model: nn.Module, group: Any, device: torch.device, num_pieces: int = 1) -> None:
        self._model, self._group, self._device = model, group, device
        self.num_pieces = num_pieces
        self._is_trying = False
        self.shortage: str | None = None

    def run(self, attempt: Callable[[int], Any]) -> Any:
        """Returns what `attempt` does with as many pieces as it takes. Collective, blocks.

        Raises:
            OutOfMemoryError: A single sample is too large for some rank. The same on every rank.
        """
        while True:
            state = StepState(self._model, self._device)
            self._is_trying = True
            try:
                return attempt(self.num_pieces)
            except PiecesTooLarge as error:
                num_samples = error.num_samples
            finally:
                self._is_trying = False
                own_shortage, self.shortage = self.shortage, None
            state.restore()
            if self._device.type != "cpu":
                torch.accelerator.empty_cache()
            shortages = gather_objects(self._group, own_shortage)
            rank = next(rank for rank, text in enumerate(shortages) if text is not None)
            text = f"rank {rank} ran out of memory in a piece of {num_samples} sample(s)"
            if num_samples == 1:
                raise torch.OutOfMemoryError(f"{text}, and there is no smaller one: {shortages[rank]}")
            self.num_pieces *= 2
            if self._group.rank() == 0:
                logger.warning(
                    "%s (%s): the step is repeated in %d microbatches, and later ones are cut likewise.",
                    *(text, shortages[rank], self.num_pieces),
                )

    def ranks_lack_memory(self) -> bool:
        """Whether memory has run out on any rank. Collective in `run`."""
        if not self._is_trying:
            return False
        return any(row[0] for row in gather_bytes(self._group, bytes([self.shortage is not None])))

    def catches(self, error: Exception) -> bool:
        """Notes that memory has run out; False for other errors. Local."""
        text = str(error).partition("\n")[0] or type(error).__name__
        is_shortage = isinstance(error, torch.OutOfMemoryError | MemoryError) or (
            isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in text
        )
        if not self._is_trying or not is_shortage:
            return False
        self.shortage = text
        return True


class StepState:
    """What a step changes before the optimizer does, beside gradients: buffers and random states."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._buffers: list[tuple[nn.Module, str, Tensor, Tensor]] = [
            (module, name, buffer, buffer.detach().clone())
            for module in model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        self._device = device
        self._random = random_states(device)

    def restore(self) -> None:
        """Goes back to it. Local."""
        for module, name, buffer, value in self._buffers:
            buffer.detach().copy_(value)
            module._buffers[name] = buffer
        set_random_states(self._random, self._device)
