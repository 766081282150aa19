# SPDX-License-Identifier: Apache-2.0
"""A bucket: the gradients of several parameters in one flat buffer, which all ranks reduce together."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

LINE_BYTES = 64


def view_like(parameter: Tensor, memory: Tensor) -> Tensor:
    """The start of flat memory in the parameter's shape, and with its strides.

    With these (channels-last) a copy and the optimizer run straight through both.
    """
    strides = torch.empty_like(parameter, device="meta").stride()
    return memory.as_strided(parameter.shape, strides)


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is infinite or NaN. Local."""
    values = tensor.detach().coalesce().values() if tensor.is_sparse else tensor.detach()
    # The extremes are NaN if any element is; torch.isfinite takes 20 times as long on a CPU.
    return not values.numel() or bool(torch.stack(torch.aminmax(values)).isfinite().all())


class Bucket:
    """Sums over the ranks what `views` hold, in place. `start`, `proceed` and `finish` once in each step.

    The buffer lies in the process group's own memory where that has some (`allocate`), and is then reduced without
    copies.

    Attributes:
        indices: Numbers of the parameters in it.
        views: Their places, of their shapes and strides. Each begins a cache line.
        results: For each of them, whose `.grad` the sum becomes, and the sum.
        num_missing: How many gradients have not come in this step.
        gives_parts: Whether a rank gets a part of the sums only, and `found_nonfinite` tells of that; then it does so
            after `proceed` already.

    Args:
        group: A process group. Making a bucket is collective over it, and blocks.
        indices: Numbers of the parameters.
        parameters: Those, or other tensors like what is to be summed, of one dtype and device.
        check_finite: For `found_nonfinite`; the same on every rank.
    """

    gives_parts = False

    def __init__(
        self, group: Any, indices: list[int], parameters: Sequence[Tensor], check_finite: bool = False
    ) -> None:
        self.indices = indices
        self._check_finite = check_finite
        self._group = group
        self._memory: Tensor | None = None
        self._work: Any = None
        dtype, device = parameters[0].dtype, parameters[0].device
        line = LINE_BYTES // parameters[0].element_size()
        self._starts: list[int] = []
        num_elements = 0
        for parameter in parameters:
            self._starts.append(-(-num_elements // line) * line)
            num_elements = self._starts[-1] + parameter.numel()
        if device.type == "cpu" and hasattr(group, "allocate"):
            self._memory = group.allocate(max(1, num_elements) * parameters[0].element_size())
            self._buffer = self._memory.view(dtype)[:num_elements]
        else:
            self._buffer = torch.zeros(num_elements, dtype=dtype, device=device)
        self._is_checked_by_group = check_finite and device.type == "cpu" and hasattr(group, "sum_and_check")
        self.views = [
            view_like(parameter, self._buffer[start:])
            for start, parameter in zip(self._starts, parameters, strict=True)
        ]
        self.results: list[tuple[Tensor, Tensor]] = list(zip(parameters, self.views, strict=True))
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
        if self._is_checked_by_group:
            self._work = self._group.sum_and_check(self._buffer)
        else:
            self._work = self._group.allreduce([self._buffer])

    def proceed(self) -> None:
        """Begins what has to follow the first reduction: nothing here. Collective, may block."""

    def finish(self, unused: Collection[int] = ()) -> None:
        """Waits until the views hold the sums. Blocks.

        Args:
            unused: Numbers of parameters whose gradients will be dropped, since no rank used them.
        """
        self._work.wait()

    def done_at_ns(self) -> int | None:
        """When the sums were there, by the clock of time.perf_counter_ns(), after `finish`. Local.

        None where the process group does not tell.
        """
        return self._work.done_at_ns() if hasattr(self._work, "done_at_ns") else None

    def found_nonfinite(self) -> bool:
        """Whether a sum is infinite or NaN, after `finish`; the same on every rank. Local."""
        return self._work.found_nonfinite() if self._is_checked_by_group else not is_finite(self._buffer)

    def forget(self) -> None:
        """Drops what is kept for later steps: nothing here. Local."""

    def close(self) -> None:
        """Gives the memory back; it goes with the last view. Local."""
        if self._memory is not None:
            self._group.release(self._memory)
            self._memory = None


class SparseBucket:
    """Sums the sparse gradients of one parameter over the ranks: `Bucket`'s interface, without memory of its own.

    Args:
        group: Of shmpi, which sums sparse tensors in the order of the ranks.
        index: Number of the parameter.
        parameter: Its `.grad` is what is summed.
    """

    gives_parts = False

    def __init__(self, group: Any, index: int, parameter: Tensor) -> None:
        self.indices = [index]
        self.views = [None]
        self._group, self._parameter = group, parameter
        self.reset()

    @property
    def results(self) -> list[tuple[Tensor, Tensor]]:
        """As of `Bucket`; before the first step's end, no gradient."""
        return [(self._parameter, self._sum)]

    def reset(self) -> None:
        """Begins a step. Local."""
        self.num_missing = 1
        self.is_started = False
        self._sum: Tensor | None = None

    def start(self) -> None:
        """Nothing: how much the ranks send must be agreed on, and backward does not wait for that. Local."""
        self.is_started = True

    def proceed(self) -> None:
        """Sums. Collective, blocks."""
        gradient = self._parameter.grad
        if gradient is None:  # of this rank's part
            shape = self._parameter.shape
            no_rows = torch.empty(0, *shape[1:], dtype=self._parameter.dtype)
            gradient = torch.sparse_coo_tensor(torch.empty(1, 0, dtype=torch.int64), no_rows, shape)
        self._sum = gradient.detach() if gradient.is_sparse else gradient.detach().to_sparse(1)
        self._group.allreduce([self._sum]).wait()

    def finish(self, unused: Collection[int] = ()) -> None:
        """Nothing: `proceed` has waited. Local."""

    def done_at_ns(self) -> int | None:
        """Not known. Local."""

    def found_nonfinite(self) -> bool:
        """Whether a sum is infinite or NaN, after `proceed`; the same on every rank. Local."""
        return not is_finite(self._sum)

    def forget(self) -> None:
        """Nothing. Local."""

    def close(self) -> None:
        """Nothing. Local."""
