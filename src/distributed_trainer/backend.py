# SPDX-License-Identifier: Apache-2.0
"""`shmpi`: torch.distributed's process group over the engine, which uses shared memory in a node and MPI between."""

from __future__ import annotations

import json
import pickle
from collections import deque
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .work import Work, in_callback

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
# Only moved, and as bytes: not every DLPack knows them.
_FLOAT8 = {getattr(torch, name) for name in dir(torch) if name.startswith("float8_")}


class ProcessGroupShmpi(dist.ProcessGroup):
    """A group of ranks whose collectives the engine runs, in the order in which this rank calls them.

    Operations return a `Work` at once. They take tensors of any strides; contiguous CPU tensors are used in place,
    others by way of a contiguous host copy (pinned, for an accelerator's), written back in `Work.wait`. Reductions take
    float32, float64, bfloat16, float16, int8, int16, int32, int64, uint8 and bool, sums complex types too; the rest
    takes any dtype. Messages (`send`, `recv`) keep their order for each tag, and do not wait for collectives.

    Args:
        group: The engine's group.
        operations: The engine's `ReduceOp`.
        always_stage: Copy tensors even where they could be used in place. For tests of that path.
        wire_dtype: The engine's `WireDtype` in which all_reduce sends sums of float32 between nodes, None for float32.
            Each node's sum is rounded to it, these are added in float32, and the result is rounded to it.
        timeout: How long `Work.wait` waits.
        create_group: Makes a group of the given ranks of the job, with the given timeout. Collective over them.
        callback_group: The engine's group, of the same ranks, for what callbacks of futures call.
    """

    def __init__(
        self,
        group: Any,
        operations: Any,
        always_stage: bool = False,
        wire_dtype: Any = None,
        timeout: timedelta = dist.default_pg_timeout,
        create_group: Callable[[Sequence[int], timedelta], ProcessGroupShmpi] | None = None,
        callback_group: Any = None,
    ) -> None:
        super().__init__(group.rank, group.size)
        self._main_group = group
        self._callback_group = callback_group or group
        self._operations = operations
        self._sum = operations.SUM
        self._always_stage = always_stage
        self._wire_dtype = wire_dtype
        self._timeout = timeout
        self._create_group = create_group
        self._split_groups: list[ProcessGroupShmpi] = []
        self._in_flight: deque[tuple[Any, tuple[Tensor, ...]]] = deque()
        self._coalesced: list[Any] | None = None
        self._name = ""

    @property
    def _group(self) -> Any:
        """The engine's group to call: callbacks of futures have one of their own, with a sequence of its own.

        The order of a callback's calls is the same on all ranks, but where it falls among the main thread's is not.
        """
        return self._callback_group if in_callback() else self._main_group

    # torch asks these of a group's backends in C++, which a group in Python has not got.
    _device_types = (torch.device("cpu"),)

    def _get_backend(self, device: torch.device) -> ProcessGroupShmpi:
        return self

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

    def sum_and_check(self, buffer: Tensor) -> Work:
        """Sums over all ranks, in place, as `allreduce` does; `Work.found_nonfinite` tells of the sums. Collective.

        Args:
            buffer: Contiguous, on the CPU, of a floating type.
        """
        operation = self._group.all_reduce(buffer, self._operations.SUM, self._wire_dtype, check_finite=True)
        return self._start(operation, (buffer,))

    def reduce_shards(self, buffer: Tensor, blocks: Sequence[tuple[int, int]], check_finite: bool = False) -> Work:
        """Sums blocks of a buffer over all ranks; rank r gets the sum of part r of each (`shard_bounds`). Collective.

        Args:
            buffer: 1-dimensional, in memory of `allocate`. Afterwards the own parts hold the sums and the rest nothing
                of use. It may be written again once a later all_reduce of this group is done: peers read it till then.
            blocks: (offset, length) in bytes, the same lengths on every rank.
            check_finite: For `Work.found_nonfinite`; the same on every rank.
        """
        operation = self._group.reduce_shards(buffer, blocks, check_finite=check_finite)
        return self._start(operation, (buffer,))

    def gather_shards(self, buffer: Tensor, blocks: Sequence[tuple[int, int]]) -> Work:
        """Completes once the own part (`shard_bounds`) of each block, of every rank, is in the buffer. Collective.

        On one node this is a barrier, since the ranks share the buffer; nothing is copied.

        Args:
            buffer: uint8 tensor of `allocate_shared`.
            blocks: (offset, length) in bytes, the same on every rank.
        """
        return self._start(self._group.gather_shards(buffer, blocks), (buffer,))

    def gather_bytes(self, message: bytes) -> bytes:
        """The messages of all ranks, which have one length, in one piece. Collective, blocks; takes a few us."""
        return self._group.gather_bytes(message)

    def close(self) -> None:
        """Takes part in nothing more. Local; ranks of this machine that still wait for this one get an error."""
        self._main_group.close()
        self._callback_group.close()

    shutdown = close  # as destroy_process_group calls it

    def abort(self) -> None:
        """Fails what any rank calls in this group, now and later. Local."""
        self._group.give_up(f"rank {self.rank()} has called abort()")

    def split_group(
        self,
        ranks: Sequence[int],
        timeout: timedelta | None = None,
        opts: Any = None,
        group_name: str | None = None,
        *_unused: Any,
        **_also_unused: Any,
    ) -> ProcessGroupShmpi | None:
        """Makes a group of some ranks of this one, None on others. Collective over them, blocks."""
        if self._create_group is None or self.rank() not in ranks:
            return None
        world_ranks = self._group.world_ranks
        group = self._create_group([world_ranks[rank] for rank in ranks], timeout or self._timeout)
        group.setGroupName(group_name or f"{self._name}:split:{','.join(map(str, ranks))}")
        self._split_groups.append(group)  # torch's C++ holds only the part that is not Python
        return group

    splitGroup = split_group  # by which torch's C++ calls it

    def allreduce(self, tensors: Sequence[Tensor], opts: Any = None) -> Work:
        """Reduces a tensor over all ranks, in place, to the same bits on each. Collective.

        16-bit types are summed in float32 in the order of the ranks of a node, and of the nodes. A sparse tensor is
        summed by gathering its elements; that blocks.
        """
        (tensor,) = tensors
        if tensor.layout is not torch.strided:
            return self._reduce_sparse(tensor, opts)
        buffer, op = self._reduction(tensor, opts)
        operation = self._group.all_reduce(buffer, op, self._wire_dtype)
        return self._start(operation, (buffer,), self._copy_back(tensor, buffer), tensors)

    def allreduce_coalesced(self, tensors: Sequence[Tensor], opts: Any = None) -> Work:
        """Like `allreduce`, of several tensors. Collective."""
        return self._together([self.allreduce([tensor], opts) for tensor in tensors], tensors)

    def reduce(self, tensors: Sequence[Tensor], opts: Any = None) -> Work:
        """Like `allreduce`, but only rank `opts.rootRank` gets the result. Collective."""
        (tensor,) = tensors
        root = 0 if opts is None else opts.rootRank
        buffer, op = self._reduction(tensor, opts)
        if self.rank() != root:
            buffer = buffer.clone()  # every rank's buffer gets the result
        back = self._copy_back(tensor, buffer) if self.rank() == root else None
        return self._start(self._group.reduce(buffer, op, root), (buffer,), back, tensors)

    def broadcast(self, tensors: Sequence[Tensor], opts: Any = None) -> Work:
        """Copies the tensor of rank `opts.rootRank` to every rank. Collective."""
        (tensor,) = tensors
        root = 0 if opts is None else opts if isinstance(opts, int) else opts.rootRank
        buffer = self._input(tensor) if self.rank() == root else self._output(tensor)
        operation = self._group.broadcast(buffer, root)
        back = self._copy_back(tensor, buffer) if self.rank() != root else None
        return self._start(operation, (buffer,), back, tensors)

    def all_gather_single(self, output: Tensor, input: Tensor, opts: Any = None) -> Work:
        """Fills `output` with the `input` of all ranks, in their order. Collective; inputs have one shape."""
        source, target = self._input(input), self._output(output)
        operation = self._group.all_gather(source, target)
        return self._start(operation, (source, target), self._copy_back(output, target), (output,))

    _allgather_base = all_gather_single  # its name before torch 2.13

    def allgather(
        self, output_tensors: Sequence[Sequence[Tensor]], input_tensors: Sequence[Tensor], opts: Any = None
    ) -> Work:
        """Fills a list with the inputs of all ranks, whose sizes may differ. Collective."""
        (outputs,), (input,) = output_tensors, input_tensors
        source, targets = self._input(input), [self._output(output) for output in outputs]
        operation = self._group.all_gather(source, targets)
        back = self._copies_back(outputs, targets)
        return self._start(operation, (source, *targets), back, outputs)

    def allgather_coalesced(
        self, output_lists: Sequence[Sequence[Tensor]], input_list: Sequence[Tensor], opts: Any = None
    ) -> Work:
        """Like `allgather`, of several inputs: list r is filled with all inputs of rank r. Collective."""
        works = [
            self.allgather([[outputs[number] for outputs in output_lists]], [input])
            for number, input in enumerate(input_list)
        ]
        return self._together(works, [output for outputs in output_lists for output in outputs])

    def all_gather_single_coalesced(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any = None
    ) -> Work:
        """Like `all_gather_single`, of several inputs. Collective."""
        return self._together([self.all_gather_single(*pair) for pair in zip(outputs, inputs, strict=True)], outputs)

    allgather_into_tensor_coalesced = all_gather_single_coalesced

    def gather(
        self, output_tensors: Sequence[Sequence[Tensor]], input_tensors: Sequence[Tensor], opts: Any = None
    ) -> Work:
        """Fills a list on rank `opts.rootRank` with the inputs of all ranks. Collective."""
        (input,) = input_tensors
        outputs = list(output_tensors[0]) if output_tensors else []
        source, targets = self._input(input), [self._output(output) for output in outputs]
        operation = self._group.gather(source, targets or None, 0 if opts is None else opts.rootRank)
        back = self._copies_back(outputs, targets)
        return self._start(operation, (source, *targets), back, outputs)

    def scatter(
        self, output_tensors: Sequence[Tensor], input_tensors: Sequence[Sequence[Tensor]], opts: Any = None
    ) -> Work:
        """Fills each rank's output with its tensor of a list on rank `opts.rootRank`. Collective."""
        (output,) = output_tensors
        sources = [self._input(input) for input in input_tensors[0]] if input_tensors else []
        target = self._output(output)
        operation = self._group.scatter(sources or None, target, 0 if opts is None else opts.rootRank)
        return self._start(operation, (*sources, target), self._copy_back(output, target), output_tensors)

    def reduce_scatter(
        self, output_tensors: Sequence[Tensor], input_tensors: Sequence[Sequence[Tensor]], opts: Any = None
    ) -> Work:
        """Leaves in the output of rank r the reduction of everybody's input r; their sizes may differ. Collective."""
        (output,), (inputs,) = output_tensors, input_tensors
        reductions = [self._reduction(input, opts) for input in inputs]
        return self._reduce_scatter(output, [buffer for buffer, _ in reductions], reductions[0][1])

    def reduce_scatter_single(self, output: Tensor, input: Tensor, opts: Any = None) -> Work:
        """The same with an input of all parts in a row. Collective."""
        return self._reduce_scatter(output, *self._reduction(input, opts))

    _reduce_scatter_base = reduce_scatter_single

    def reduce_scatter_single_coalesced(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any = None
    ) -> Work:
        """Like `reduce_scatter_single`, of several inputs. Collective."""
        pairs = zip(outputs, inputs, strict=True)
        return self._together([self.reduce_scatter_single(*pair, opts) for pair in pairs], outputs)

    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced

    def alltoall(self, output_tensors: Sequence[Tensor], input_tensors: Sequence[Tensor], opts: Any = None) -> Work:
        """Fills output r with the tensor that rank r has for this one. Collective."""
        sources = [self._input(input) for input in input_tensors]
        targets = [self._output(output) for output in output_tensors]
        operation = self._group.all_to_all(sources, targets)
        back = self._copies_back(output_tensors, targets)
        return self._start(operation, (*sources, *targets), back, output_tensors)

    def all_to_all_single(
        self,
        output: Tensor,
        input: Tensor,
        output_split_sizes: Sequence[int] = (),
        input_split_sizes: Sequence[int] = (),
        opts: Any = None,
    ) -> Work:
        """The same with tensors cut along the first dimension, evenly unless sizes are given. Collective."""
        source, target = self._input(input), self._output(output)
        sources = list(source.split(list(input_split_sizes))) if input_split_sizes else source
        targets = list(target.split(list(output_split_sizes))) if output_split_sizes else target
        operation = self._group.all_to_all(sources, targets)
        return self._start(operation, (source, target), self._copy_back(output, target), (output,))

    alltoall_base = all_to_all_single

    def send(self, tensors: Sequence[Tensor], destination: int, tag: int = 0) -> Work:
        """Sends a tensor to a rank of the group, which receives one of the same size and tag."""
        (tensor,) = tensors
        source = self._input(tensor)
        operation = self._group.send(source, destination, tag)
        return self._start(operation, (source,), None, tensors, is_message=True)

    def recv(self, tensors: Sequence[Tensor], source: int | None, tag: int = 0) -> Work:
        """Receives a tensor that a rank of the group sends with this tag."""
        (tensor,) = tensors
        target = self._output(tensor)
        operation = self._group.receive(target, source, tag)
        return self._start(operation, (target,), self._copy_back(tensor, target), tensors, is_message=True)

    def recv_anysource(self, tensors: Sequence[Tensor], tag: int = 0) -> Work:
        """The same from any rank; `Work.source_rank` tells which."""
        return self.recv(tensors, None, tag)

    def barrier(self, opts: Any = None) -> Work:
        """Completes once every rank has called it. Collective."""
        return self._start(self._group.barrier(), ())

    def monitored_barrier(self, timeout: timedelta | None = None, wait_all_ranks: bool = False) -> None:
        """Blocks until every rank has called it. Collective.

        (`torch.distributed.monitored_barrier` takes gloo only: call this on the group.)

        Args:
            timeout: None for the group's.
            wait_all_ranks: Of no effect: all missing ranks are named in any case.

        Raises:
            DistBackendError: After the timeout; it says which ranks have not come, and where they were last seen. The
                group can't be used any more.
        """
        self._wait_or_give_up(self._group.barrier(), (timeout or self._timeout).total_seconds())

    def set_timeout(self, timeout: timedelta) -> None:
        """Sets how long waits last from now on. Local."""
        self._timeout = timeout

    def _start_coalescing(self, device: torch.device) -> None:
        self._coalesced = []

    def _end_coalescing(self, device: torch.device) -> Work:
        works, self._coalesced = self._coalesced, None
        return self._together(works, [tensor for work in works for tensor in work._results])

    def _start(
        self,
        operation: Any,
        buffers: tuple[Tensor, ...],
        finish: Callable[[], None] | None = None,
        results: Sequence[Tensor] = (),
        is_message: bool = False,
    ) -> Work:
        # The engine works on bare memory: what it works on lives until it is done, even if the caller lets go.
        while self._in_flight and self._in_flight[0][0].is_done():
            self._in_flight.popleft()
        self._in_flight.append((operation, buffers))
        work = Work((operation,), results, finish, self._wait, order=None if is_message else self)
        if self._coalesced is not None:
            self._coalesced.append(work)
        return work

    def _together(self, works: Sequence[Work], results: Sequence[Tensor]) -> Work:
        def finish() -> None:
            for work in works:
                if work._finish is not None:
                    work._finish()

        return Work(_operations_of(works), results, finish, self._wait, order=self)

    def _wait(self, operation: Any, timeout_seconds: float | None) -> None:
        if timeout_seconds is not None:  # the caller's, who may wait again
            if not operation.wait(timeout_seconds):
                text = self._group.describe_wait(operation)
                raise dist.DistBackendError(f"after {timeout_seconds:g} s {text}")
            return
        self._wait_or_give_up(operation, self._timeout.total_seconds())

    def _wait_or_give_up(self, operation: Any, limit: float) -> None:
        if operation.wait(limit):
            return
        text = self._group.describe_wait(operation)
        if operation.is_done():  # or given up by another rank meanwhile
            operation.wait(0)
            return
        text += f". The timeout of {limit:g} s is over: this group can't be used any more"
        self._group.give_up(text)
        raise dist.DistBackendError(text)

    def _reduce_scatter(self, output: Tensor, inputs: Any, op: Any) -> Work:
        target = self._output(torch.view_as_real(output) if output.is_complex() else output)
        operation = self._group.reduce_scatter(inputs, target, op)
        sources = inputs if isinstance(inputs, list) else (inputs,)
        return self._start(operation, (*sources, target), self._copy_back(output, target), (output,))

    def _reduce_sparse(self, tensor: Tensor, opts: Any) -> Work:
        op = _reduce_op(opts)
        if tensor.layout is not torch.sparse_coo or op != dist.ReduceOp.SUM:
            raise ValueError(
                f"of sparse tensors shmpi takes sums of COO ones; this is {tensor.layout}, reduced by {_name_of(op)}"
            )
        own = tensor.coalesce()
        rows = self.gather_bytes(own._nnz().to_bytes(8, "little"))
        counts = [int.from_bytes(rows[start : start + 8], "little") for start in range(0, len(rows), 8)]
        indices = [own.indices().new_empty(count, own.sparse_dim()) for count in counts]
        values = [own.values().new_empty(count, *own.shape[own.sparse_dim() :]) for count in counts]
        works = [self.allgather([indices], [own.indices().t()]), self.allgather([values], [own.values()])]

        def add() -> None:
            total = torch.sparse_coo_tensor(torch.cat(indices).t(), torch.cat(values), tensor.shape)
            tensor.copy_(total.coalesce())

        return Work(_operations_of(works), (tensor,), add, self._wait, order=self)

    def _input(self, tensor: Tensor) -> Tensor:
        """A contiguous tensor on the host that holds what this one does."""
        on_accelerator = not tensor.is_cpu
        is_lazy = tensor.is_conj() or tensor.is_neg()  # its memory holds other values
        if tensor.is_contiguous() and not (on_accelerator or is_lazy or self._always_stage):
            return tensor if tensor.dtype not in _FLOAT8 else tensor.view(torch.uint8)
        tensor = tensor.detach()
        buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=on_accelerator)
        buffer.copy_(tensor, non_blocking=True)
        if on_accelerator:
            torch.accelerator.current_stream(tensor.device).synchronize()
        return buffer if tensor.dtype not in _FLOAT8 else buffer.view(torch.uint8)

    def _output(self, tensor: Tensor) -> Tensor:
        """A contiguous tensor on the host to be filled, which `_copies_back` copies to this one."""
        on_accelerator = not tensor.is_cpu
        is_lazy = tensor.is_conj() or tensor.is_neg()
        if not tensor.is_contiguous() or on_accelerator or is_lazy or self._always_stage:
            tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=on_accelerator)
        return tensor if tensor.dtype not in _FLOAT8 else tensor.view(torch.uint8)

    def _reduction(self, tensor: Tensor, opts: Any) -> tuple[Tensor, Any]:
        """A contiguous tensor on the host of a type that the engine reduces, and the engine's operation."""
        if tensor.dtype in _FLOAT8:  # the engine would be given bytes
            raise TypeError(f"float8 tensors are moved but not reduced; convert this one of {tensor.dtype} first")
        op = _reduce_op(opts)
        if op == dist.ReduceOp.SUM and not tensor.is_complex():
            return self._input(tensor), self._sum
        if op == dist.ReduceOp.PREMUL_SUM:
            _, factor = op.__getstate__()  # `op.factor` is not there before torch 2.13
            tensor, op = tensor * factor, dist.ReduceOp.SUM
        name = _name_of(op)
        buffer = self._input(tensor)
        if tensor.is_complex():
            if name not in ("SUM", "AVERAGE"):
                raise ValueError(f"complex tensors can be summed and averaged, not reduced by {name}")
            buffer = torch.view_as_real(buffer)
        return buffer, getattr(self._operations, name)

    def _copy_back(self, tensor: Tensor, buffer: Tensor) -> Callable[[], None] | None:
        """What copies a result from where the engine left it; None if that is the caller's memory."""
        if buffer is tensor or buffer.data_ptr() == tensor.data_ptr():
            return None
        if tensor.is_complex() and not buffer.is_complex():
            buffer = torch.view_as_complex(buffer)
        return lambda: tensor.detach().copy_(buffer.view(tensor.dtype))

    def _copies_back(self, tensors: Sequence[Tensor], buffers: Sequence[Tensor]) -> Callable[[], None] | None:
        copies = [self._copy_back(*pair) for pair in zip(tensors, buffers, strict=True)]

        def copy() -> None:
            for one in copies:
                if one is not None:
                    one()

        return copy if any(copies) else None


def _operations_of(works: Sequence[Work]) -> list[Any]:
    return [operation for work in works for operation in work._operations]


def _reduce_op(opts: Any) -> Any:
    return dist.ReduceOp.SUM if opts is None else getattr(opts, "reduceOp", opts)


def _name_of(op: Any) -> str:
    """The engine's name of a reduction."""
    # Not by key: their hashes differ.
    return next((name for known, name in _OPERATIONS.items() if op == known), str(op))


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
    return [pickle.loads(row) for row in _gather_unequal(process_group, pickle.dumps(value))]


def gather_json(process_group: dist.ProcessGroup, value: Any) -> list[Any]:
    """The same of what JSON can say. Collective, blocks."""
    return [json.loads(row) for row in _gather_unequal(process_group, json.dumps(value).encode())]


def _gather_unequal(process_group: dist.ProcessGroup, data: bytes) -> list[bytes]:
    lengths = [int.from_bytes(row, "little") for row in gather_bytes(process_group, len(data).to_bytes(8, "little"))]
    rows = gather_bytes(process_group, data.ljust(max(lengths), b"\0"))
    return [row[:length] for row, length in zip(rows, lengths, strict=True)]
