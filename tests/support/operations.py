# SPDX-License-Identifier: Apache-2.0
"""Description of a test of torch.distributed's operations: inputs drawn by rank, layouts in memory, expected results.

tensor_operations.py and group_operations.py list the operations. test_operations.py runs them on shmpi, and
operations_table.py on gloo as well, for the table of docs/torch-distributed.md; nothing here depends on a backend.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional

# Functional collectives have other names before torch 2.13; newer versions of torch warn about the old names.
if not hasattr(functional, "all_gather_single"):
    functional.all_gather_single = functional.all_gather_tensor
    functional.all_gather_single_autograd = functional.all_gather_tensor_autograd
    functional.all_gather_single_coalesced = functional.all_gather_into_tensor_coalesced
    functional.reduce_scatter_single = functional.reduce_scatter_tensor
    functional.reduce_scatter_single_autograd = functional.reduce_scatter_tensor_autograd
    functional.reduce_scatter_single_coalesced = functional.reduce_scatter_tensor_coalesced

INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
COMPLEX = [torch.complex64, torch.complex128]
FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2]
MOVED = {"": [torch.bool, *INTEGERS, *FLOATS, *COMPLEX, *FLOAT8]}
REDUCED = [torch.bool, *INTEGERS, *FLOATS]
BITS = [torch.bool, *INTEGERS]

# torch takes no other reductions of complex tensors, whatever the backend.
REDUCTIONS = {
    "sum": [*REDUCED, *COMPLEX],
    "avg": [*FLOATS, *COMPLEX],
    "product": REDUCED,
    "min": REDUCED,
    "max": REDUCED,
    "band": BITS,
    "bor": BITS,
    "bxor": BITS,
    "premul_sum": FLOATS,
}

# Layout in memory, and the value of async_op. strided: every second element. mixed: transposed on every other rank.
# large: more than one piece of a collective.
VARIANTS = [
    ("contiguous", False),
    ("contiguous", True),
    ("strided", True),
    ("mixed", False),
    ("empty", False),
    ("large", False),
]
ROWS = {"empty": 0, "large": 150_001}


@dataclass(frozen=True)
class Call:
    """One call of an operation, on one rank."""

    group: dist.ProcessGroup
    rank: int
    size: int
    dtype: torch.dtype = torch.float32
    op: str = ""
    layout: str = "contiguous"
    async_op: bool = False
    root: int = 0

    def __str__(self) -> str:
        how = f"{self.op} {self.dtype} {self.layout} async_op={self.async_op}"
        return f"{how}, rank {self.rank} of {self.size}, root {self.root}"

    @property
    def rows(self) -> int:
        """Number of rows, the unit of all sizes."""
        return ROWS.get(self.layout, 3)

    @property
    def reduce_op(self) -> dist.ReduceOp:
        if self.op == "premul_sum":
            return dist._make_nccl_premul_sum(factor(self.rank))
        return getattr(dist.ReduceOp, self.op.upper())

    def output(self, *shape: int) -> torch.Tensor:
        """Return a tensor to be filled, in the call's layout."""
        if self.layout == "strided":
            tensor = torch.empty(*shape, 2, dtype=self.dtype)[..., 1]
        elif self.layout == "mixed" and self.rank % 2:
            tensor = torch.empty(*reversed(shape), dtype=self.dtype).permute(*reversed(range(len(shape))))
        else:
            tensor = torch.empty(*shape, dtype=self.dtype)
        return tensor.copy_(torch.ones((), dtype=self.dtype))

    def draw(self, rank: int, shapes: "Shapes") -> list[torch.Tensor]:
        """Draw a rank's inputs: small numbers, whose reductions are exact, or any bits if there is no reduction."""
        random = torch.Generator().manual_seed(rank)
        return [_draw(random, shape, self.dtype, is_reduced=self.op != "") for shape in shapes]


Shapes = list[tuple[int, ...]]  # shapes of a rank's inputs
Inputs = list[list[torch.Tensor]]  # inputs of all ranks
Started = tuple[list[Any], list[torch.Tensor]]  # works to wait for (or None), and tensors for the results


def _draw(random: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype, is_reduced: bool) -> torch.Tensor:
    def integers(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=random)

    if dtype == torch.bool:
        return integers(0, 2, *shape).bool()
    if not is_reduced:
        num_bytes = torch.Size(shape).numel() * dtype.itemsize
        return integers(0, 256, num_bytes).to(torch.uint8).view(dtype).view(shape)
    numbers = integers(1, 4, *shape)
    if dtype != torch.uint8:
        numbers *= 2 * integers(0, 2, *shape) - 1
    return (numbers * (1 - 2j) if dtype.is_complex else numbers).to(dtype)


def factor(rank: int) -> float:
    """Return a rank's factor in premul_sum."""
    return (rank + 1) / 2


def reduced(op: str, tensors: list[torch.Tensor]) -> torch.Tensor:
    """Return the reduction of one tensor of each rank."""
    dtype = tensors[0].dtype
    wide = torch.complex128 if dtype.is_complex else torch.float64 if dtype.is_floating_point else torch.int64
    stacked = torch.stack(tensors).to(wide)
    if op in ("band", "bor", "bxor"):
        result = stacked[0]
        for other in stacked[1:]:
            result = {"band": result & other, "bor": result | other, "bxor": result ^ other}[op]
    elif op == "premul_sum":
        result = sum(tensor * factor(rank) for rank, tensor in enumerate(stacked))
    elif op in ("min", "max"):
        result = stacked.amin(0) if op == "min" else stacked.amax(0)
    else:
        result = stacked.prod(0) if op == "product" else stacked.sum(0)
    return (result / len(tensors) if op == "avg" else result).to(dtype)


@dataclass(frozen=True)
class Operation:
    """Operation of torch.distributed, or a variant of one."""

    name: str
    run: Callable[[Call], None]
    """Call the operation and check its results. Collective."""
    documented: str = ""
    """Name of its row in the table of backends in torch's documentation."""
    dtypes: dict[str, list[torch.dtype]] | None = None
    """Data types by reduction, "" where nothing is reduced; None for an operation without tensors."""
    variants: list[tuple[str, bool]] | None = None

    def calls(self, group: dist.ProcessGroup) -> Iterator[Call]:
        """Yield the calls of its test: all variants in float32, two of every dtype and reduction. Roots take turns."""
        rank, size = group.rank(), group.size()
        if self.dtypes is None:
            yield Call(group, rank, size)
            return
        cases = [(op, dtype) for op, dtypes in self.dtypes.items() for dtype in dtypes]
        for number, (op, dtype) in enumerate(cases):
            plain, *others, large = self.variants or VARIANTS
            if dtype != torch.float32:
                others = [others[number % len(others)]]
            elif op in ("", "sum"):
                others.append(large)
            for layout, async_op in (plain, *others):
                yield Call(group, rank, size, dtype, op, layout, async_op, number % size)


def on_tensors(
    name: str,
    shapes: Callable[[Call, int], Shapes],
    start: Callable[..., Started],
    expected: Callable[[Call, Inputs], list[torch.Tensor | None]],
    dtypes: dict[str, list[torch.dtype]],
    documented: str = "",
    variants: list[tuple[str, bool]] | None = None,
) -> Operation:
    """Return an operation, given a rank's input shapes, its call, and its results by all inputs (None: unspecified)."""

    def run(call: Call) -> None:
        drawn = [call.draw(rank, shapes(call, rank)) for rank in range(call.size)]
        inputs = [call.output(*tensor.shape).copy_(tensor) for tensor in drawn[call.rank]]
        works, outputs = start(call, *inputs)
        for work in works:
            if work is not None:
                work.wait()
                assert not isinstance(work, dist.Work) or work.is_completed(), "is_completed() is False after wait()"
        wanted = expected(call, drawn)
        assert len(outputs) == len(wanted)
        for output, want in zip(outputs, wanted, strict=True):
            if want is not None:
                compare(output, want, is_exact=call.op not in ("avg", "premul_sum"))
        for tensor, want in zip(inputs, drawn[call.rank], strict=True):
            if not any(tensor is output for output in outputs):
                compare(tensor, want, is_exact=True)  # the operation has only read it

    return Operation(name, run, documented, dtypes, variants)


def compare(output: torch.Tensor, want: torch.Tensor, is_exact: bool) -> None:
    output = output.to_dense() if output.is_sparse else output
    assert (output.dtype, output.shape) == (want.dtype, want.shape)
    if is_exact:
        same = torch.equal(output, want) if want.dtype == torch.bool else torch.equal(_bytes(output), _bytes(want))
        assert same, f"{output} must be {want}"
    else:
        torch.testing.assert_close(output, want)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
