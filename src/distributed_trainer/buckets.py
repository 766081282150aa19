# SPDX-License-Identifier: Apache-2.0
"""A bucket: the gradients of several parameters in one flat buffer, which all ranks reduce together."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor


class Bucket:
    """Sums over the ranks what `views` hold, in place. `start`, `proceed` and `finish` once in each step.

    The buffer lies in the process group's own memory where that has some (`allocate`), and is then reduced without
    copies.

    Attributes:
        indices: Numbers of the parameters in it.
        views: Their places, of their shapes and strides.
        num_missing: How many gradients have not come in this step.

    Args:
        group: A process group. Making a bucket is collective over it, and blocks.
        indices: Numbers of the parameters.
        parameters: Those, or other tensors like what is to be summed, of one dtype and device.
    """

    def __init__(self, group: Any, indices: list[int], parameters: Sequence[Tensor]) -> None:
        self.indices = indices
        self._group = group
        self._memory: Tensor | None = None
        self._work: Any = None
        dtype, device = parameters[0].dtype, parameters[0].device
        num_elements = sum(parameter.numel() for parameter in parameters)
        if device.type == "cpu" and hasattr(group, "allocate"):
            self._memory = group.allocate(max(1, num_elements) * parameters[0].element_size())
            self._buffer = self._memory.view(dtype)[:num_elements]
        else:
            self._buffer = torch.zeros(num_elements, dtype=dtype, device=device)
        pieces = self._buffer.split([parameter.numel() for parameter in parameters])
        # With strides like the parameter's (channels-last), so that the copy and the optimizer run straight.
        self.views = [
            piece.as_strided(parameter.shape, torch.empty_like(parameter, device="meta").stride())
            for piece, parameter in zip(pieces, parameters, strict=True)
        ]
        self.reset()

    @property
    def is_started(self) -> bool:
        """Whether the reduction of this step has begun."""
        return self._work is not None

    def reset(self) -> None:
        """Begins a step. Local."""
        self.num_missing = len(self.indices)
        self._work = None

    def start(self) -> None:
        """Begins the sum of what the views hold now. Collective; returns at once."""
        self._work = self._group.allreduce([self._buffer])

    def proceed(self) -> None:
        """Begins what has to follow the first reduction: nothing here. Collective, may block."""

    def finish(self, unused: Collection[int] = ()) -> None:
        """Waits until the views hold the sums. Blocks.

        Args:
            unused: Numbers of parameters whose gradients will be dropped, since no rank used them.
        """
        self._work.wait()

    def close(self) -> None:
        """Gives the memory back; it goes with the last view. Local."""
        if self._memory is not None:
            self._group.release(self._memory)
            self._memory = None
