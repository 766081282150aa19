# SPDX-License-Identifier: Apache-2.0
"""A bucket: the gradients of several parameters in one flat buffer, which all ranks reduce together."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from ..backend.engine_group import EngineGroup
from ..backend.work import Work

LINE_BYTES = 64


def starts_in_memory(tensors: Sequence[Tensor]) -> tuple[list[int], int]:
    """Return where tensors of one dtype begin in flat memory, each at a cache line, and its number of elements."""
    line = LINE_BYTES // tensors[0].element_size()
    starts: list[int] = []
    num_elements = 0
    for tensor in tensors:
        starts.append(-(-num_elements // line) * line)
        num_elements = starts[-1] + tensor.numel()
    return starts, num_elements


def view_like(parameter: Tensor, memory: Tensor) -> Tensor:
    """Return a view of the start of flat memory, with the shape and strides of the parameter. Local.

    With equal strides, also those of channels-last tensors, copies and the optimizer read both memories in order.
    """
    strides = torch.empty_like(parameter, device="meta").stride()
    return memory.as_strided(parameter.shape, strides)


class Memory:
    """Flat memory with a place for each gradient of a bucket.

    Scripts get tensors on this memory as `.grad`, and may keep them, or views of them, in later steps. Storage counts
    the tensors on it, whoever holds them.

    Args:
        flat: The memory, 1-dimensional.
        views: Places of the gradients in it.
        sums: Places of what becomes `.grad`; None for `views`.
        whole: Memory of the process group to which `flat` belongs; None if it is torch's.
    """

    def __init__(
        self, flat: Tensor, views: list[Tensor], sums: list[Tensor] | None = None, whole: Tensor | None = None
    ) -> None:
        self.flat, self.views, self.sums, self.whole = flat, views, views if sums is None else sums, whole
        self._storage = flat.untyped_storage()
        self._num_own = self._num_tensors()

    @property
    def is_held(self) -> bool:
        """Whether anything beyond this object refers to the memory: a `.grad`, or what a script has kept. Local."""
        return self._num_tensors() > self._num_own

    def _num_tensors(self) -> int:
        return torch._C._storage_Use_Count(self._storage._cdata)


class ReplaceableMemory:
    """Memory of a bucket, which other memory replaces while scripts keep gradients of earlier steps.

    A script that keeps the gradients of the last step in each step makes two memories take turns.

    Attributes:
        current: Memory of this step.

    Args:
        allocate: Function that makes new memory; collective if the memory is shared.
        release: Function that is called with memory that is no longer used here. Local.
    """

    def __init__(self, allocate: Callable[[], Memory], release: Callable[[Memory], None] = lambda memory: None) -> None:
        self._allocate, self._release = allocate, release
        self.current = allocate()
        self._spare: Memory | None = None

    def are_held(self) -> tuple[bool, bool]:
        """Return whether the current memory is held, and whether there is no spare memory that is free. Local."""
        return self.current.is_held, self._spare is None or self._spare.is_held

    def replace(self, reuses_spare: bool) -> None:
        """Leave the current memory to its holders. Collective with shared memory; the same argument on every rank."""
        used = self.current
        if reuses_spare:
            assert self._spare is not None
            self.current = self._spare
        else:
            self.drop_spare()
            self.current = self._allocate()
        self._spare = used

    def drop_spare(self) -> None:
        """Release the spare memory; it is freed with its last tensor. Local."""
        if self._spare is not None:
            self._release(self._spare)
            self._spare = None

    def close(self) -> None:
        """Release all memory; it is freed with its last tensor. Local."""
        self.drop_spare()
        self._release(self.current)


def is_finite(tensor: Tensor) -> bool:
    """Return whether no element is infinite or NaN. Local."""
    values = _real(tensor.detach().coalesce().values() if tensor.is_sparse else tensor.detach())
    # Minimum and maximum are NaN if any element is NaN; torch.isfinite takes 20 times as long on a CPU.
    return not values.numel() or bool(torch.stack(torch.aminmax(values)).isfinite().all())


def _real(tensor: Tensor) -> Tensor:
    """Return a view of a complex tensor's real and imaginary parts; any other tensor as it is. Local."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


class Bucket:
    """Buffer whose `views` are summed over the ranks, in place.

    Call `start`, `start_second_phase` and `finish` once in each step, in this order. On the CPU the buffer lies in
    memory of the process group if the group is an `EngineGroup`, and is then reduced without copies.

    Attributes:
        indices: Numbers of the parameters in the bucket.
        memory: Memory of the buffer.
        num_missing: Number of gradients that have not arrived in this step.
        is_sharded: Whether each rank gets only a part of the sums. Then `found_nonfinite` reports on that part, and may
            be called after `start_second_phase`.

    Args:
        group: Process group of the ranks. Making a bucket is collective over it, and blocks.
        indices: Numbers of the parameters.
        parameters: The parameters, or other tensors with the shapes, strides, dtype and device of the values to be
            summed. All have one dtype and one device.
        check_finite: Whether `found_nonfinite` will be called; the same on every rank.
    """

    is_sharded = False

    def __init__(
        self, group: Any, indices: list[int], parameters: Sequence[Tensor], check_finite: bool = False
    ) -> None:
        self.indices = indices
        self._check_finite = check_finite
        self._group = group
        self._work: Any = None
        self._parameters = parameters
        self._starts, self._num_elements = starts_in_memory(parameters)
        self._is_shared = parameters[0].device.type == "cpu" and isinstance(group, EngineGroup)
        self._is_checked_by_group = check_finite and self._is_shared
        self.memory = ReplaceableMemory(self._allocate, self._release)
        self.reset()

    @property
    def views(self) -> list[Tensor]:
        """Places of the gradients, with the parameters' shapes and strides. Each begins a cache line."""
        return self.memory.current.views

    @property
    def results(self) -> list[tuple[Tensor, Tensor]]:
        """A pair for each parameter: the tensor whose `.grad` becomes the sum, and the sum."""
        return list(zip(self._parameters, self.memory.current.sums, strict=True))

    @property
    def _buffer(self) -> Tensor:
        return self.memory.current.flat

    @property
    def is_started(self) -> bool:
        """Whether the reduction of this step has begun."""
        return self._work is not None

    def reset(self) -> None:
        """Begin a step. Local."""
        self.num_missing = len(self.indices)
        self._work = None

    def start(self) -> None:
        """Start to sum what the views hold now. Collective; returns at once."""
        if self._is_checked_by_group:
            self._work = self._group.sum_and_check(_real(self._buffer))
        else:
            self._work = self._group.allreduce([self._buffer])

    def start_second_phase(self) -> None:
        """Do nothing: this bucket has one phase. In buckets with a second phase, start that. Collective, may block."""

    def finish(self, unused: Collection[int] = ()) -> None:
        """Wait until the views hold the sums. Blocks.

        Args:
            unused: Numbers of parameters that no rank used. Their gradients will be dropped.
        """
        self._work.wait()

    def done_at_ns(self) -> int | None:
        """Return when the sums were complete, in ns of time.perf_counter_ns(); None if unknown. Local.

        Call it after `finish`. It is known for groups whose operations are `Work`.
        """
        return self._work.done_at_ns() if isinstance(self._work, Work) else None

    def found_nonfinite(self) -> bool:
        """Return, after `finish`, whether a sum is infinite or NaN. Local; the same on every rank."""
        return self._work.found_nonfinite() if self._is_checked_by_group else not is_finite(self._buffer)

    def reset_error_feedback(self) -> None:
        """Do nothing: this bucket keeps nothing for later steps. Local."""

    def close(self) -> None:
        """Release the memory to the group; it is freed with its last tensor. Local."""
        self.memory.close()

    def _allocate(self) -> Memory:
        like, whole = self._parameters[0], None
        if self._is_shared:
            whole = self._group.allocate(max(1, self._num_elements) * like.element_size())
            flat = whole.view(like.dtype)[: self._num_elements]
        else:
            flat = torch.zeros(self._num_elements, dtype=like.dtype, device=like.device)
        views = [view_like(p, flat[start:]) for start, p in zip(self._starts, self._parameters, strict=True)]
        return Memory(flat, views, self._places_of_sums(flat), whole)

    def _places_of_sums(self, flat: Tensor) -> list[Tensor] | None:
        """Return where in the memory the sums will be that become `.grad`; None for the places of the gradients."""
        return None

    def _release(self, memory: Memory) -> None:
        if memory.whole is not None:
            self._group.release(memory.whole)


def sum_sparse(group: Any, gradient: Tensor | None, parameter: Tensor) -> Tensor:
    """Return the sum of a parameter's gradients over the ranks, as a sparse tensor. Collective, blocks.

    Args:
        group: Process group of the shmpi backend, which sums sparse tensors in the order of the ranks.
        gradient: This rank's gradient, sparse or dense; None if its samples did not use the parameter.
        parameter: The parameter.
    """
    if gradient is None:
        shape = parameter.shape
        no_rows = torch.empty(0, *shape[1:], dtype=parameter.dtype)
        gradient = torch.sparse_coo_tensor(torch.empty(1, 0, dtype=torch.int64), no_rows, shape)
    total = gradient.detach() if gradient.is_sparse else gradient.detach().to_sparse(1)
    group.allreduce([total]).wait()
    return total


class SparseBucket:
    """Bucket for the sparse gradients of one parameter. It has the interface of `Bucket`, but no buffer.

    Args:
        group: Process group of the shmpi backend, which sums sparse tensors in the order of the ranks.
        index: Number of the parameter.
        parameter: Parameter whose `.grad` is summed.
    """

    is_sharded = False

    def __init__(self, group: Any, index: int, parameter: Tensor) -> None:
        self.indices = [index]
        self.views = [None]
        self.memory = None
        self._group, self._parameter = group, parameter
        self.reset()

    @property
    def results(self) -> list[tuple[Tensor, Tensor | None]]:
        """Parameter whose `.grad` becomes the sum, and the sum; None until the step has summed."""
        return [(self._parameter, self._sum)]

    def reset(self) -> None:
        """Begin a step. Local."""
        self.num_missing = 1
        self.is_started = False
        self._sum: Tensor | None = None

    def start(self) -> None:
        """Mark the sum as started; `start_second_phase` does the work. Local.

        Ranks must first agree on how much they send, and backward does not wait for that.
        """
        self.is_started = True

    def start_second_phase(self) -> None:
        """Sum the gradients. Collective, blocks."""
        self._sum = sum_sparse(self._group, self._parameter.grad, self._parameter)

    def finish(self, unused: Collection[int] = ()) -> None:
        """Do nothing: `start_second_phase` has waited. Local."""

    def dense_sum(self) -> Tensor:
        """Return the sum as a dense tensor, after `start_second_phase`. Local."""
        assert self._sum is not None
        return self._sum.to_dense()

    def done_at_ns(self) -> int | None:
        """Return None: the time is not known. Local."""

    def found_nonfinite(self) -> bool:
        """Return, after `start_second_phase`, whether a sum is infinite or NaN. Local; the same on every rank."""
        assert self._sum is not None
        return not is_finite(self._sum)

    def reset_error_feedback(self) -> None:
        """Do nothing: this bucket keeps nothing for later steps. Local."""

    def close(self) -> None:
        """Do nothing: this bucket has no buffer. Local."""
