# SPDX-License-Identifier: Apache-2.0
"""Repeat a step in smaller microbatches when memory runs out on any rank.

With BatchNorm the other ranks wait for the calls of each rank. So a rank on which memory runs out continues with a
dummy: two samples of the microbatch instead of all. After the backwards all ranks learn that memory ran out, and send
the buckets that they have not sent yet. Then they restore the state at the beginning of the step, and repeat it in
twice as many microbatches. Later steps keep that number.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..backend.gather import gather_bytes, gather_objects
from ..replica.model_state import StepSnapshot

logger = logging.getLogger("distributed_trainer")


class MicrobatchesTooLarge(Exception):
    """Raised if memory ran out on some rank. The same on every rank.

    Attributes:
        num_samples: Number of samples of the longest microbatch of any rank.
    """

    def __init__(self, num_samples: int) -> None:
        super().__init__(num_samples)
        self.num_samples = num_samples


class AutoMicrobatch:
    """Find in how many microbatches a step fits into the memory of every rank, and remember the number.

    Args:
        model: The model.
        group: Process group of the ranks.
        device: Where this rank computes.
        num_microbatches: Number to begin with.

    Attributes:
        num_microbatches: Number of microbatches of a step.
        shortage: Message of the allocator that failed on this rank in the current attempt; None if none failed.
    """

    def __init__(self, model: nn.Module, group: Any, device: torch.device, num_microbatches: int = 1) -> None:
        self._model, self._group, self._device = model, group, device
        self.num_microbatches = num_microbatches
        self._is_trying = False
        self.shortage: str | None = None

    def run(self, attempt: Callable[[int], Any]) -> Any:
        """Call `attempt`, with twice as many microbatches each time that memory runs out. Collective, blocks.

        Args:
            attempt: Function that computes a step in the given number of microbatches. It raises MicrobatchesTooLarge
                if memory runs out on any rank.

        Returns:
            The result of `attempt`.

        Raises:
            OutOfMemoryError: A single sample is too large for some rank. The same on every rank.
        """
        while True:
            state = StepSnapshot(self._model, self._device)
            self._is_trying = True
            try:
                return attempt(self.num_microbatches)
            except MicrobatchesTooLarge as error:
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
            self.num_microbatches *= 2
            if self._group.rank() == 0:
                logger.warning(
                    "%s (%s): the step is repeated in %d microbatches, and later steps use as many.",
                    *(text, shortages[rank], self.num_microbatches),
                )

    def ranks_lack_memory(self) -> bool:
        """Return whether memory has run out on any rank. Collective inside of `run`, else local."""
        if not self._is_trying:
            return False
        return any(row[0] for row in gather_bytes(self._group, bytes([self.shortage is not None])))

    def catches(self, error: Exception) -> bool:
        """Check whether an error says that memory ran out; if so, record it and return True. Local."""
        if not self._is_trying or not isinstance(error, (MemoryError, RuntimeError)):
            return False
        text = str(error).partition("\n")[0] or type(error).__name__
        is_shortage = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if not is_shortage and "DefaultCPUAllocator: can't allocate memory" not in text:
            return False
        self.shortage = text
        return True
