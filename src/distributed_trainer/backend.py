# SPDX-License-Identifier: Apache-2.0
"""`shmpi`: torch.distributed's process group over the engine, which uses shared memory in a node and MPI between."""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import (
    AllgatherOptions,
    AllreduceOptions,
    BroadcastOptions,
    ReduceScatterOptions,
)

_OPERATIONS = {
    dist.ReduceOp.SUM: "SUM",
    dist.ReduceOp.AVG: "AVERAGE",
    dist.ReduceOp.PRODUCT: "PRODUCT",
    dist.ReduceOp.MIN: "MIN",
    dist.ReduceOp.MAX: "MAX",
}


class Work(dist.Work):
    """A collective in flight."""

    def __init__(self, operation: Any, finish: Callable[[], None] | None) -> None:
        super().__init__()
        self._operation = operation
        self._finish = finish

    def wait(self, timeout: Any = None) -> bool:
        """Blocks until the result is in the caller's tensors. Local.

        Args:
            timeout: A timedelta; None waits as long as it takes.

        Raises:
            MismatchError: Ranks called different collectives. The same on every rank of a node.
            DistributedTrainerError: A rank has left or closed the group, MPI reports an error, or the time is over.
        """
        seconds = timeout.total_seconds() if timeout else None
        if not self._operation.wait(seconds):
            raise dist.DistBackendError(f"the collective did not end within {seconds} s")
        if self._finish is not None:
            finish, self._finish = self._finish, None
            finish()
        return True

    def is_completed(self) -> bool:
        """Whether `wait` would return at once. Local."""
        return self._operation.is_done()


class ProcessGroupShmpi(dist.ProcessGroup):
    """A group of ranks whose collectives the engine runs, in the order in which this rank calls them.

    Collectives return a `Work` at once. They take tensors of any strides; contiguous CPU tensors are used in place,
    others by way of a contiguous host copy (pinned, for an accelerator's), written back in `Work.wait`.
    Reductions take float32, float64, bfloat16, float16, int32, int64, uint8 and bool, the rest any dtype.

    Tensors of the device type `inner_device` go to a process group of torch, NCCL for CUDA, made when the first one
    comes. (A process group that is a Python class replaces torch's whole group, so it must serve all devices itself.)

    Args:
        group: The engine's group.
        operations: The engine's `ReduceOp`.
        inner_device: Type of device, None for no inner group.
        make_inner: Makes the inner group. Collective.
        always_stage: Copy tensors even where they could be used in place. For tests of that path.
        wire_dtype: The engine's `WireDtype` in which all_reduce sends sums of float32 between nodes, None for float32.
            Each node's sum is rounded to it, these are added in float32, and the result is rounded to it.
    """

    def __init__(
        self,
        group: Any,
        operations: Any,
        inner_device: str | None = None,
        make_inner: Callable[[], Any] | None = None,
        always_stage: bool = False,
        wire_dtype: Any = None,
    ) -> None:
        super().__init__(group.rank, group.size)
        self._group = group
        self._operations = operations
        self._inner_device = inner_device
        self._make_inner = make_inner
        self._inner: Any = None
        self._always_stage = always_stage
        self._wire_dtype = wire_dtype
        self._in_flight: deque[tuple[Any, tuple[Tensor, ...]]] = deque()
        self._name = ""

    def getBackendName(self) -> str:  # noqa: D102
        return "shmpi"

    def getGroupName(self) -> str:  # noqa: D102
        return self._name

    def setGroupName(self, name: str) -> None:  # noqa: D102
        self._name = name

    def allocate(self, num_bytes: int) -> Tensor:
        """Allocates memory, zeroed and page-aligned, in which this group's collectives need no copies.

        Collective, blocks. It is the node's shared memory and goes with the last tensor that views it.

        Returns:
            uint8 tensor of shape [num_bytes] on the CPU.
        """
        return torch.from_dlpack(self._group.allocate(num_bytes))

    def release(self, memory: Tensor) -> None:
        """Makes the group forget memory of `allocate`. Local; no collective on it may be in flight."""
        self._group.release(memory)

    def allocate_shared(self, num_bytes: int) -> Tensor:
        """Allocates one block on each node, zeroed and page-aligned, which all ranks of the node read and write.

        Collective, blocks. It goes with the last tensor that views it, on any rank.

        Returns:
            uint8 tensor of shape [num_bytes] on the CPU.
        """
        return torch.from_dlpack(self._group.allocate_shared(num_bytes))

    def reduce_shards(self, buffer: Tensor, blocks: Sequence[tuple[int, int]]) -> Work:
        """Sums blocks of a buffer over all ranks; rank r gets the sum of part r of each (`shard_bounds`). Collective.

        Args:
            buffer: 1-dimensional, in memory of `allocate`. Afterwards the own parts hold the sums and the rest nothing
                of use. It may be written again once a later all_reduce of this group is done: peers read it till then.
            blocks: (offset, length) in bytes, the same lengths on every rank.
        """
        return self._start(self._group.reduce_shards(buffer, blocks), (buffer,), None)

    def gather_shards(self, buffer: Tensor, blocks: Sequence[tuple[int, int]]) -> Work:
        """Completes once the own part (`shard_bounds`) of each block, of every rank, is in the buffer. Collective.

        On one node this is a barrier, since the ranks share the buffer; nothing is copied.

        Args:
            buffer: uint8 tensor of `allocate_shared`.
            blocks: (offset, length) in bytes, the same on every rank.
        """
        return self._start(self._group.gather_shards(buffer, blocks), (buffer,), None)

    def gather_bytes(self, message: bytes) -> bytes:
        """The messages of all ranks, which have one length, in one piece. Collective, blocks; takes a few us."""
        return self._group.gather_bytes(message)

    def close(self) -> None:
        """Takes part in nothing more. Local; ranks of this machine that still wait for this one get an error."""
        self._group.close()

    def allreduce(self, tensors: Sequence[Tensor], opts: Any = None) -> Work:
        """Reduces a tensor over all ranks, in place, to the same bits on each. Collective.

        16-bit types are summed in float32 in the order of the ranks of a node, and of the nodes.
        """
        (tensor,) = tensors
        if inner := self._inner_for(tensor):
            return inner.allreduce([tensor], opts or AllreduceOptions())
        buffer = self._host_buffer(tensor)
        operation = self._group.all_reduce(buffer, self._reduce_op(opts), self._wire_dtype)
        return self._start(operation, (buffer,), self._copy_back(tensor, buffer))

    def broadcast(self, tensors: Sequence[Tensor], opts: Any = None) -> Work:
        """Copies the tensor of rank `opts.rootRank` to every rank. Collective."""
        (tensor,) = tensors
        if inner := self._inner_for(tensor):
            return inner.broadcast([tensor], opts or BroadcastOptions())
        root = 0 if opts is None else opts if isinstance(opts, int) else opts.rootRank
        buffer = self._host_buffer(tensor)
        operation = self._group.broadcast(buffer, root)
        return self._start(operation, (buffer,), self._copy_back(tensor, buffer))

    def _allgather_base(self, output: Tensor, input: Tensor, opts: Any = None) -> Work:
        """Fills `output` with the `input` of all ranks, in their order. Collective; inputs have one shape."""
        if inner := self._inner_for(input):
            return inner._allgather_base(output, input, opts or AllgatherOptions())
        source, target = self._host_buffer(input), self._host_buffer(output)
        operation = self._group.all_gather(source, target)
        return self._start(operation, (source, target), self._copy_back(output, target))

    all_gather_single = _allgather_base  # its name from torch 2.13 on

    def allgather(
        self, output_tensors: Sequence[Sequence[Tensor]], input_tensors: Sequence[Tensor], opts: Any = None
    ) -> Work:
        """Like `_allgather_base`, into a list of one tensor for each rank. Collective."""
        (outputs,), (input,) = output_tensors, input_tensors
        if inner := self._inner_for(input):
            return inner.allgather([outputs], [input], opts or AllgatherOptions())
        gathered = torch.empty((len(outputs), *input.shape), dtype=input.dtype)
        source = self._host_buffer(input)

        def distribute() -> None:
            for output, part in zip(outputs, gathered, strict=True):
                output.copy_(part)

        operation = self._group.all_gather(source, gathered)
        return self._start(operation, (source, gathered), distribute)

    def _reduce_scatter_base(self, output: Tensor, input: Tensor, opts: Any = None) -> Work:
        """Leaves in `output` of rank r the reduction of everybody's part r of `input`. Collective."""
        if inner := self._inner_for(input):
            return inner._reduce_scatter_base(output, input, opts or ReduceScatterOptions())
        source, target = self._host_buffer(input), self._host_buffer(output)
        operation = self._group.reduce_scatter(source, target, self._reduce_op(opts))
        return self._start(operation, (source, target), self._copy_back(output, target))

    reduce_scatter_single = _reduce_scatter_base

    def barrier(self, opts: Any = None) -> Work:
        """Completes once every rank has called it. Collective."""
        return self._start(self._group.barrier(), (), None)

    def _start(self, operation: Any, buffers: tuple[Tensor, ...], finish: Callable[[], None] | None) -> Work:
        # The engine works on bare memory: what it works on lives until it is done, even if the caller lets go.
        while self._in_flight and self._in_flight[0][0].is_done():
            self._in_flight.popleft()
        self._in_flight.append((operation, buffers))
        return Work(operation, finish)

    def _inner_for(self, tensor: Tensor) -> Any:
        if self._inner_device is None or tensor.device.type != self._inner_device:
            return None
        if self._inner is None:
            self._inner = self._make_inner()
        return self._inner

    def _host_buffer(self, tensor: Tensor) -> Tensor:
        on_accelerator = not tensor.is_cpu
        is_lazy = tensor.is_conj() or tensor.is_neg()  # its memory holds other values
        if tensor.is_contiguous() and not (on_accelerator or is_lazy or self._always_stage):
            return tensor
        tensor = tensor.detach()
        buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=on_accelerator)
        buffer.copy_(tensor, non_blocking=True)
        if on_accelerator:
            torch.accelerator.current_stream(tensor.device).synchronize()
        return buffer

    def _copy_back(self, tensor: Tensor, buffer: Tensor) -> Callable[[], None] | None:
        if buffer is tensor:
            return None
        return lambda: tensor.detach().copy_(buffer)

    def _reduce_op(self, opts: Any) -> Any:
        op = dist.ReduceOp.SUM if opts is None else getattr(opts, "reduceOp", opts)
        for known, name in _OPERATIONS.items():
            if op == known:
                return getattr(self._operations, name)
        raise ValueError(f"shmpi reduces by {', '.join(_OPERATIONS.values())}, not by {op}")


def message_device(process_group: dist.ProcessGroup) -> torch.device:
    """Where small tensors must lie for the collectives of any process group: on the CPU if it takes them there."""
    kinds = process_group._device_types
    return torch.device("cpu") if not kinds or torch.device("cpu") in kinds else kinds[0]


def gather_bytes(process_group: dist.ProcessGroup, message: bytes) -> list[bytes]:
    """Gathers bytes of one length from every rank of any process group, in rank order. Collective, blocks."""
    if hasattr(process_group, "gather_bytes"):
        data = process_group.gather_bytes(message)
    else:
        device = message_device(process_group)
        own = torch.frombuffer(bytearray(message), dtype=torch.uint8).to(device)
        gathered = torch.empty(process_group.size() * len(message), dtype=torch.uint8, device=device)
        process_group._allgather_base(gathered, own).wait()
        data = gathered.cpu().numpy().tobytes()
    return [data[start : start + len(message)] for start in range(0, len(data), len(message))]


def gather_objects(process_group: dist.ProcessGroup, value: Any) -> list[Any]:
    """Gathers a picklable object from every rank of any process group, in rank order. Collective, blocks."""
    data = pickle.dumps(value)
    lengths = [int.from_bytes(row, "little") for row in gather_bytes(process_group, len(data).to_bytes(8, "little"))]
    rows = gather_bytes(process_group, data.ljust(max(lengths), b"\0"))
    return [pickle.loads(row[:length]) for row, length in zip(rows, lengths, strict=True)]
