# SPDX-License-Identifier: Apache-2.0
"""`shmpi`: torch.distributed's process group over the engine: shared memory in a node, MPI between nodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from .engine_group import EngineGroup
from .staging import (
    INTEGERS,
    copies_back,
    copy_back,
    input_buffer,
    name_of,
    output_buffer,
    reduce_op,
    reduction_buffer,
)
from .work import Work

if TYPE_CHECKING:
    from .._engine import Group, ReduceOp


class ProcessGroupShmpi(EngineGroup):
    """Process group with torch's collectives over the engine, and those of `EngineGroup` that torch does not have.

    Operations return a `Work` at once. They take tensors of any strides. Contiguous CPU tensors are used in place;
    others are copied to contiguous host memory (pinned, for an accelerator's), and back in `Work.wait`. Reductions take
    float32, float64, bfloat16, float16, int8, int16, int32, int64, uint8 and bool; sums and averages also take complex
    types. All other operations take any dtype. Messages (`send`, `recv`) keep their order for each tag, and do not wait
    for collectives.

    Args:
        group: The engine's group.
        operations: The engine's `ReduceOp`.
        create_group: Function that makes a group of the given ranks of the job, with the given timeout. Collective over
            these ranks.
        options: The other arguments of `EngineGroup`.
    """

    def __init__(
        self,
        group: Group,
        operations: type[ReduceOp],
        create_group: Callable[[Sequence[int], timedelta], ProcessGroupShmpi] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(group, operations, **options)
        self._create_group = create_group
        self._split_groups: list[ProcessGroupShmpi] = []
        self._name = ""

    # torch asks the C++ backends of a group for these; a group in Python has no such backends.
    @property
    def _device_types(self) -> list[torch.device]:
        return [torch.device("cpu")]

    def _get_backend(self, device: torch.device) -> ProcessGroupShmpi:  # type: ignore[override]  # a group is its backend
        return self

    def getBackendName(self) -> str:  # noqa: D102
        return "shmpi"

    def getGroupName(self) -> str:  # noqa: D102
        return self._name

    def setGroupName(self, name: str) -> None:  # noqa: D102
        self._name = name

    shutdown = EngineGroup.close  # as destroy_process_group calls it

    def abort(self) -> None:
        """Make every collective of this group fail on every rank, now and later. Local."""
        self._group.give_up(f"rank {self.rank()} has called abort()")

    def split_group(  # type: ignore[override]  # ignores torch's further arguments
        self,
        ranks: Sequence[int],
        timeout: timedelta | None = None,
        opts: Any = None,
        group_name: str | None = None,
        *_unused: Any,
        **_also_unused: Any,
    ) -> ProcessGroupShmpi | None:
        """Make a group of some ranks of this one; return None on the other ranks. Collective over `ranks`, blocks."""
        if self._create_group is None or self.rank() not in ranks:
            return None
        world_ranks = self._group.world_ranks
        group = self._create_group([world_ranks[rank] for rank in ranks], timeout or self._timeout)
        group.setGroupName(group_name or f"{self._name}:split:{','.join(map(str, ranks))}")
        self._split_groups.append(group)  # torch's C++ keeps only the C++ part of the object alive
        return group

    splitGroup = split_group  # the name by which torch's C++ calls it

    # torch's class also has forms with one tensor, a root and a timeout instead of a list and options. This class does
    # not have them: "no single tensor" below.
    def allreduce(  # type: ignore[override]  # no single tensor
        self, tensors: Sequence[Tensor], opts: Any = None
    ) -> Work:
        """Reduce a tensor over all ranks, in place, to the same bits on each. Collective.

        16-bit types are summed in float32, in the order of the ranks within a node and then of the nodes. An average of
        integers is rounded towards zero, as by NCCL. A sparse tensor is summed by gathering its elements; this call
        blocks.
        """
        (tensor,) = tensors
        if tensor.layout is not torch.strided:
            return self._reduce_sparse(tensor, opts)
        if tensor.dtype in INTEGERS and reduce_op(opts) == dist.ReduceOp.AVG:
            return self._average_integers(tensor)
        buffer, op = reduction_buffer(tensor, opts, self._operations)
        operation = self._group.all_reduce(buffer, op, self._wire_dtype)
        return self._start(operation, (buffer,), copy_back(tensor, buffer), tensors)

    def allreduce_coalesced(self, tensors: Sequence[Tensor], opts: Any = None) -> Work:
        """Do what `allreduce` does, for several tensors. Collective."""
        return self._join([self.allreduce([tensor], opts) for tensor in tensors], tensors)

    def reduce(  # type: ignore[override]  # no single tensor
        self, tensors: Sequence[Tensor], opts: Any = None
    ) -> Work:
        """Do what `allreduce` does, but give the result to rank `opts.rootRank` alone. Collective."""
        (tensor,) = tensors
        root = 0 if opts is None else opts.rootRank
        buffer, op = reduction_buffer(tensor, opts, self._operations)
        if self.rank() != root:
            buffer = buffer.clone()  # every rank's buffer gets the result
        back = copy_back(tensor, buffer) if self.rank() == root else None
        return self._start(self._group.reduce(buffer, op, root), (buffer,), back, tensors)

    def broadcast(  # type: ignore[override]  # no single tensor
        self, tensors: Sequence[Tensor], opts: Any = None
    ) -> Work:
        """Copy the tensor of rank `opts.rootRank` to every rank. Collective."""
        (tensor,) = tensors
        root = 0 if opts is None else opts if isinstance(opts, int) else opts.rootRank
        buffer = input_buffer(tensor) if self.rank() == root else output_buffer(tensor)
        operation = self._group.broadcast(buffer, root)
        back = copy_back(tensor, buffer) if self.rank() != root else None
        return self._start(operation, (buffer,), back, tensors)

    def all_gather_single(self, output: Tensor, input: Tensor, opts: Any = None) -> Work:
        """Fill `output` with the `input` of all ranks, by rank. Collective; all inputs have the same shape."""
        source, target = input_buffer(input), output_buffer(output)
        operation = self._group.all_gather(source, target)
        return self._start(operation, (source, target), copy_back(output, target), (output,))

    _allgather_base = all_gather_single  # its name before torch 2.13

    def allgather(  # type: ignore[override]  # no single tensor
        self, output_tensors: Sequence[Sequence[Tensor]], input_tensors: Sequence[Tensor], opts: Any = None
    ) -> Work:
        """Fill a list of outputs with the inputs of all ranks, whose sizes may differ. Collective."""
        (outputs,), (input,) = output_tensors, input_tensors
        source, targets = input_buffer(input), [output_buffer(output) for output in outputs]
        operation = self._group.all_gather(source, targets)
        back = copies_back(outputs, targets)
        return self._start(operation, (source, *targets), back, outputs)

    def allgather_coalesced(
        self, output_lists: Sequence[Sequence[Tensor]], input_list: Sequence[Tensor], opts: Any = None
    ) -> Work:
        """Do what `allgather` does, for several inputs: list r is filled with all inputs of rank r. Collective."""
        works = [
            self.allgather([[outputs[number] for outputs in output_lists]], [input])
            for number, input in enumerate(input_list)
        ]
        return self._join(works, [output for outputs in output_lists for output in outputs])

    def all_gather_single_coalesced(
        self, output_lists: Sequence[Tensor], input_list: Sequence[Tensor], opts: Any = None
    ) -> Work:
        """Do what `all_gather_single` does, for several inputs. Collective."""
        pairs = zip(output_lists, input_list, strict=True)
        return self._join([self.all_gather_single(*pair) for pair in pairs], output_lists)

    allgather_into_tensor_coalesced = all_gather_single_coalesced

    def gather(  # type: ignore[override]  # no single tensor
        self, output_tensors: Sequence[Sequence[Tensor]], input_tensors: Sequence[Tensor], opts: Any = None
    ) -> Work:
        """Fill a list of outputs on rank `opts.rootRank` with the inputs of all ranks. Collective."""
        (input,) = input_tensors
        outputs = list(output_tensors[0]) if output_tensors else []
        source, targets = input_buffer(input), [output_buffer(output) for output in outputs]
        operation = self._group.gather(source, targets or None, 0 if opts is None else opts.rootRank)
        back = copies_back(outputs, targets)
        return self._start(operation, (source, *targets), back, outputs)

    def scatter(  # type: ignore[override]  # no single tensor
        self, output_tensors: Sequence[Tensor], input_tensors: Sequence[Sequence[Tensor]], opts: Any = None
    ) -> Work:
        """Fill each rank's output with its tensor of a list on rank `opts.rootRank`. Collective."""
        (output,) = output_tensors
        sources = [input_buffer(input) for input in input_tensors[0]] if input_tensors else []
        target = output_buffer(output)
        operation = self._group.scatter(sources or None, target, 0 if opts is None else opts.rootRank)
        return self._start(operation, (*sources, target), copy_back(output, target), output_tensors)

    def reduce_scatter(  # type: ignore[override]  # no single tensor
        self, output_tensors: Sequence[Tensor], input_tensors: Sequence[Sequence[Tensor]], opts: Any = None
    ) -> Work:
        """Reduce input r of all ranks into the output of rank r; inputs 0 and 1 may differ in size. Collective."""
        (output,), (inputs,) = output_tensors, input_tensors
        reductions = [reduction_buffer(input, opts, self._operations) for input in inputs]
        return self._reduce_scatter(output, [buffer for buffer, _ in reductions], reductions[0][1])

    def reduce_scatter_single(self, output: Tensor, input: Tensor, opts: Any = None) -> Work:
        """Do what `reduce_scatter` does, with all of a rank's inputs one after the other in one tensor. Collective."""
        return self._reduce_scatter(output, *reduction_buffer(input, opts, self._operations))

    _reduce_scatter_base = reduce_scatter_single  # type: ignore[assignment]  # torch passes positions

    def reduce_scatter_single_coalesced(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any = None
    ) -> Work:
        """Do what `reduce_scatter_single` does, for several inputs. Collective."""
        pairs = zip(outputs, inputs, strict=True)
        return self._join([self.reduce_scatter_single(*pair, opts) for pair in pairs], outputs)

    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced  # type: ignore[assignment]  # torch passes positions

    def alltoall(self, output_tensors: Sequence[Tensor], input_tensors: Sequence[Tensor], opts: Any = None) -> Work:
        """Fill output r with the input that rank r has for this rank. Collective."""
        sources = [input_buffer(input) for input in input_tensors]
        targets = [output_buffer(output) for output in output_tensors]
        operation = self._group.all_to_all(sources, targets)
        back = copies_back(output_tensors, targets)
        return self._start(operation, (*sources, *targets), back, output_tensors)

    def all_to_all_single(
        self,
        output: Tensor,
        input: Tensor,
        output_split_sizes: Sequence[int] = (),
        input_split_sizes: Sequence[int] = (),
        opts: Any = None,
    ) -> Work:
        """Do what `alltoall` does, with tensors split along dimension 0, evenly unless sizes are given. Collective."""
        source, target = input_buffer(input), output_buffer(output)
        sources = list(source.split_with_sizes(list(input_split_sizes))) if input_split_sizes else source
        targets = list(target.split_with_sizes(list(output_split_sizes))) if output_split_sizes else target
        operation = self._group.all_to_all(sources, targets)
        return self._start(operation, (source, target), copy_back(output, target), (output,))

    alltoall_base = all_to_all_single  # type: ignore[assignment]  # torch passes positions

    def send(self, tensors: Sequence[Tensor], destination: int, tag: int = 0) -> Work:
        """Send a tensor to a rank of the group, which receives one of the same size and tag."""
        (tensor,) = tensors
        source = input_buffer(tensor)
        operation = self._group.send(source, destination, tag)
        return self._start(operation, (source,), None, tensors, is_message=True)

    def recv(self, tensors: Sequence[Tensor], source: int | None, tag: int = 0) -> Work:
        """Receive a tensor that a rank of the group sends with this tag."""
        (tensor,) = tensors
        target = output_buffer(tensor)
        operation = self._group.receive(target, source, tag)
        return self._start(operation, (target,), copy_back(tensor, target), tensors, is_message=True)

    def recv_anysource(self, tensors: Sequence[Tensor], tag: int = 0) -> Work:
        """Receive a tensor from any rank of the group; `Work.source_rank` returns the sender."""
        return self.recv(tensors, None, tag)

    def barrier(self, opts: Any = None) -> Work:
        """Complete once every rank has called this. Collective."""
        return self._start(self._group.barrier(), ())

    def monitored_barrier(self, timeout: timedelta | None = None, wait_all_ranks: bool = False) -> None:
        """Block until every rank has called this. Collective.

        (`torch.distributed.monitored_barrier` supports gloo only, so call this method of the group.)

        Args:
            timeout: How long to wait; None for the group's timeout.
            wait_all_ranks: No effect: all missing ranks are named in any case.

        Raises:
            DistBackendError: The time is over. The message says which ranks have not arrived, and where they were last
                seen. The group can't be used any more.
        """
        self._wait_or_give_up(self._group.barrier(), (timeout or self._timeout).total_seconds())

    def set_timeout(self, timeout: timedelta) -> None:
        """Set how long waits last from now on. Local."""
        self._timeout = timeout

    def _start_coalescing(self, device: torch.device) -> None:
        self._coalesced = []

    def _end_coalescing(self, device: torch.device) -> Work:
        works, self._coalesced = self._coalesced, None
        assert works is not None, "_end_coalescing without _start_coalescing"
        return self._join(works)

    def _average_integers(self, tensor: Tensor) -> Work:
        buffer = input_buffer(tensor)
        back = copy_back(tensor, buffer)

        def divide() -> None:
            buffer.div_(self.size(), rounding_mode="trunc")
            if back is not None:
                back()

        operation = self._group.all_reduce(buffer, self._operations.SUM)
        return self._start(operation, (buffer,), divide, (tensor,))

    def _reduce_scatter(self, output: Tensor, inputs: Tensor | list[Tensor], op: ReduceOp) -> Work:
        target = output_buffer(torch.view_as_real(output) if output.is_complex() else output)
        operation = self._group.reduce_scatter(inputs, target, op)
        sources = inputs if isinstance(inputs, list) else (inputs,)
        return self._start(operation, (*sources, target), copy_back(output, target), (output,))

    def _reduce_sparse(self, tensor: Tensor, opts: Any) -> Work:
        op = reduce_op(opts)
        if tensor.layout is not torch.sparse_coo or op != dist.ReduceOp.SUM:
            raise ValueError(
                f"shmpi can reduce sparse tensors only if they are COO, and only to their sum; this one is "
                f"{tensor.layout}, to be reduced by {name_of(op)}"
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

        return self._join(works, (tensor,), add)
