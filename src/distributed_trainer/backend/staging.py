# SPDX-License-Identifier: Apache-2.0
"""Host buffers for the engine: torch's tensors themselves where possible, contiguous copies elsewhere.

The engine works on bare contiguous host memory. An operation calls `input_buffer` and `output_buffer` for its tensors,
and `copy_back` copies a result to the caller's tensor once the engine is done.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from .._engine import ReduceOp

# The engine's name of each of torch's reductions.
_OPERATIONS = {
    dist.ReduceOp.SUM: "SUM",
    dist.ReduceOp.AVG: "AVERAGE",
    dist.ReduceOp.PRODUCT: "PRODUCT",
    dist.ReduceOp.MIN: "MIN",
    dist.ReduceOp.MAX: "MAX",
    dist.ReduceOp.BAND: "BAND",
    dist.ReduceOp.BOR: "BOR",
    dist.ReduceOp.BXOR: "BXOR",
}
INTEGERS = {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
# Types that are only moved, as bytes, because not every version of DLPack knows them.
_FLOAT8 = {getattr(torch, name) for name in dir(torch) if name.startswith("float8_")}


def needs_copy(tensor: Tensor) -> bool:
    """Return whether the engine cannot work on the tensor's own memory. Local."""
    is_lazy = tensor.is_conj() or tensor.is_neg()  # its memory holds other values
    return is_lazy or not (tensor.is_cpu and tensor.is_contiguous())


def input_buffer(tensor: Tensor) -> Tensor:
    """Return a contiguous tensor on the host with the values of this one. Local."""
    buffer = tensor
    if needs_copy(tensor):
        on_accelerator = not tensor.is_cpu
        tensor = tensor.detach()
        buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=on_accelerator)
        buffer.copy_(tensor, non_blocking=True)
        if on_accelerator:
            torch.accelerator.current_stream(tensor.device).synchronize()
    return buffer if buffer.dtype not in _FLOAT8 else buffer.view(torch.uint8)


def output_buffer(tensor: Tensor) -> Tensor:
    """Return a contiguous tensor on the host for the engine to fill; `copy_back` copies it to this one. Local."""
    if needs_copy(tensor):
        tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=not tensor.is_cpu)
    return tensor if tensor.dtype not in _FLOAT8 else tensor.view(torch.uint8)


def reduction_buffer(tensor: Tensor, opts: Any, operations: type[ReduceOp]) -> tuple[Tensor, ReduceOp]:
    """Return a contiguous tensor on the host of a type that the engine reduces, and the engine's operation. Local.

    Args:
        tensor: The tensor to reduce.
        opts: torch's options, reduction or None, as for `reduce_op`.
        operations: The engine's `ReduceOp`.

    Raises:
        TypeError: The engine cannot reduce the tensor's type.
        ValueError: The engine cannot reduce the tensor's type in this way.
    """
    if tensor.dtype in _FLOAT8:  # the engine would reduce them as bytes
        raise TypeError(f"float8 tensors can be moved but not reduced; convert this one of {tensor.dtype} first")
    op = reduce_op(opts)
    if op == dist.ReduceOp.SUM and not tensor.is_complex():
        return input_buffer(tensor), operations.SUM
    if op == dist.ReduceOp.PREMUL_SUM:
        _, factor = op.__getstate__()  # before torch 2.13 there is no `op.factor`
        tensor, op = tensor * factor, dist.ReduceOp.SUM
    name = name_of(op)
    buffer = input_buffer(tensor)
    if tensor.is_complex():
        if name not in ("SUM", "AVERAGE"):
            raise ValueError(f"complex tensors can be summed and averaged, not reduced by {name}")
        buffer = torch.view_as_real(buffer)
    operation: ReduceOp = getattr(operations, name)
    return buffer, operation


def copy_back(tensor: Tensor, buffer: Tensor) -> Callable[[], None] | None:
    """Return a function that copies a result from `buffer` to `tensor`; None if both are the same memory. Local."""
    if buffer is tensor or buffer.data_ptr() == tensor.data_ptr():
        return None
    if tensor.is_complex() and not buffer.is_complex():
        buffer = torch.view_as_complex(buffer)

    def copy() -> None:
        tensor.detach().copy_(buffer.view(tensor.dtype))

    return copy


def copies_back(tensors: Sequence[Tensor], buffers: Sequence[Tensor]) -> Callable[[], None] | None:
    """Return a function that copies several results as `copy_back` does; None if none needs it. Local."""
    copies = [copy_back(*pair) for pair in zip(tensors, buffers, strict=True)]

    def copy() -> None:
        for one in copies:
            if one is not None:
                one()

    return copy if any(copies) else None


def reduce_op(opts: Any) -> Any:
    """Return the reduction that torch requests: `opts` is torch's options, a reduction, or None for a sum. Local."""
    return dist.ReduceOp.SUM if opts is None else getattr(opts, "reduceOp", opts)


def name_of(op: Any) -> str:
    """Return the engine's name of one of torch's reductions. Local."""
    # A lookup by key fails, because equal reductions have different hashes.
    return next((name for known, name in _OPERATIONS.items() if op == known), str(op))
