# SPDX-License-Identifier: Apache-2.0
"""Operations of torch.distributed on tensors, each by a rank's inputs, the call, and results from all ranks' inputs."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from operations import (
    FLOATS,
    INTEGERS,
    MOVED,
    REDUCTIONS,
    Call,
    Inputs,
    Operation,
    Shapes,
    Started,
    on_tensors,
    reduced,
)
from torch.distributed.distributed_c10d import _coalescing_manager

# ---- shapes


def one(c: Call, rank: int) -> Shapes:
    return [(c.rows, 2)]


def two(c: Call, rank: int) -> Shapes:
    return [(c.rows, 2), (c.rows, 1)]


def flat(c: Call, rank: int) -> Shapes:
    return [(2 * c.rows,)]


def list_of_all(c: Call, rank: int) -> Shapes:
    return [(c.rows, 2)] * c.size


def all_in_one(c: Call, rank: int) -> Shapes:
    return [(c.size * c.rows, 2)]


def two_of_all(c: Call, rank: int) -> Shapes:
    return [(c.size * c.rows, 2), (c.size * c.rows, 1)]


def all_stacked(c: Call, rank: int) -> Shapes:
    return [(c.size, c.rows, 2)]


def growing(c: Call, rank: int) -> Shapes:
    return [(rank * c.rows, 2)]  # rank 0 has no rows


def growing_list(c: Call, rank: int) -> Shapes:
    return [(other * c.rows, 2) for other in range(c.size)]


def splits(c: Call, rank: int) -> list[int]:
    """Return the number of rows that a rank sends to each rank, and receives from it."""
    return [(rank + other) % 3 * c.rows for other in range(c.size)]


def list_of_splits(c: Call, rank: int) -> Shapes:
    return [(rows, 2) for rows in splits(c, rank)]


def splits_in_one(c: Call, rank: int) -> Shapes:
    return [(sum(splits(c, rank)), 2)]


# ---- results


def each(c: Call, x: Inputs, number: int = 0) -> list[torch.Tensor]:
    return [inputs[number] for inputs in x]


def own(c: Call, x: Inputs, number: int = 0) -> list[torch.Tensor]:
    return [tensor.tensor_split(c.size)[c.rank] for tensor in each(c, x, number)]


def own_splits(c: Call, x: Inputs) -> list[torch.Tensor]:
    return [inputs[0].split(splits(c, rank))[c.rank] for rank, inputs in enumerate(x)]


def before(c: Call, x: Inputs) -> list[torch.Tensor]:
    return [x[c.rank - 1][0]]


# ---- calls


def outputs_like(c: Call, tensors: Any) -> list[torch.Tensor]:
    return [c.output(*tensor.shape) for tensor in tensors]


def coalesced(c: Call, start: Callable[[], Any]) -> list[Any]:
    with _coalescing_manager(group=c.group, async_ops=c.async_op) as manager:
        start()
    return [manager] if c.async_op else []


def all_reduce_sparse(c: Call, t: torch.Tensor) -> Started:
    sparse = t.clamp(min=0).to_sparse()
    return [dist.all_reduce(sparse, c.reduce_op, c.group, c.async_op)], [sparse]


def all_gather(c: Call, t: torch.Tensor) -> Started:
    outputs = outputs_like(c, [t] * c.size)
    return [dist.all_gather(outputs, t, c.group, c.async_op)], outputs


def all_gather_uneven(c: Call, t: torch.Tensor) -> Started:
    outputs = [c.output(*growing(c, rank)[0]) for rank in range(c.size)]
    return [dist.all_gather(outputs, t, c.group, c.async_op)], outputs


def all_gather_into(c: Call, t: torch.Tensor, *shape: int) -> Started:
    output = c.output(*shape)
    return [dist.all_gather_into_tensor(output, t, c.group, c.async_op)], [output]


def all_gather_coalesced(c: Call, *inputs: torch.Tensor) -> Started:
    outputs = [outputs_like(c, inputs) for _ in range(c.size)]
    return [dist.all_gather_coalesced(outputs, list(inputs), c.group, c.async_op)], [
        output for row in outputs for output in row
    ]


def all_gather_managed(c: Call, *inputs: torch.Tensor) -> Started:
    outputs = [c.output(c.size * t.shape[0], t.shape[1]) for t in inputs]
    pairs = zip(outputs, inputs, strict=True)
    return coalesced(c, lambda: [dist.all_gather_into_tensor(o, t, c.group) for o, t in pairs]), outputs


def gather(c: Call, t: torch.Tensor) -> Started:
    outputs = outputs_like(c, [t] * c.size) if c.rank == c.root else []
    return [dist.gather(t, outputs or None, c.root, c.group, c.async_op)], outputs


def scatter(c: Call, *inputs: torch.Tensor) -> Started:
    output = c.output(*inputs[0].shape)
    sources = list(inputs) if c.rank == c.root else None
    return [dist.scatter(output, sources, c.root, c.group, c.async_op)], [output]


def reduce_scatter(c: Call, *inputs: torch.Tensor) -> Started:
    output = c.output(*inputs[c.rank].shape)
    return [dist.reduce_scatter(output, list(inputs), c.reduce_op, c.group, c.async_op)], [output]


def reduce_scatter_tensor(c: Call, t: torch.Tensor) -> Started:
    output = c.output(c.rows, 2)
    return [dist.reduce_scatter_tensor(output, t, c.reduce_op, c.group, c.async_op)], [output]


def reduce_scatter_managed(c: Call, *inputs: torch.Tensor) -> Started:
    outputs = [c.output(t.shape[0] // c.size, t.shape[1]) for t in inputs]
    pairs = zip(outputs, inputs, strict=True)
    return coalesced(c, lambda: [dist.reduce_scatter_tensor(o, t, c.reduce_op, c.group) for o, t in pairs]), outputs


def all_to_all(c: Call, *inputs: torch.Tensor) -> Started:
    outputs = outputs_like(c, inputs)
    return [dist.all_to_all(outputs, list(inputs), c.group, c.async_op)], outputs


def all_to_all_single(c: Call, t: torch.Tensor, sizes: list[int] | None = None) -> Started:
    output = c.output(*t.shape)
    return [dist.all_to_all_single(output, t, sizes, sizes, c.group, c.async_op)], [output]


def send_along(c: Call, t: torch.Tensor) -> Started:
    """Send from each rank to the next, blocking."""
    output = c.output(*t.shape)
    if c.rank > 0:
        assert dist.recv(output, c.rank - 1, c.group, tag=3) == c.rank - 1
    if c.rank < c.size - 1:
        dist.send(t, c.rank + 1, c.group, tag=3)
    return [], [output]


def ring(c: Call, t: torch.Tensor) -> Started:
    """Send to the next rank, and receive from the one before."""
    output = c.output(*t.shape)
    works = [dist.isend(t, (c.rank + 1) % c.size, c.group), dist.irecv(output, (c.rank - 1) % c.size, c.group)]
    return works, [output]


def ring_of_any(c: Call, t: torch.Tensor) -> Started:
    output = c.output(*t.shape)
    work = dist.isend(t, (c.rank + 1) % c.size, c.group)
    if c.size > 1:  # torch refuses a message to itself
        assert dist.recv(output, None, c.group) == (c.rank - 1) % c.size
        return [work], [output]
    return [work, dist.irecv(output, None, c.group)], [output]


def batch(c: Call, t: torch.Tensor) -> Started:
    output = c.output(*t.shape)
    receive = dist.P2POp(dist.irecv, output, (c.rank - 1) % c.size, c.group)
    send = dist.P2POp(dist.isend, t, (c.rank + 1) % c.size, c.group)
    return dist.batch_isend_irecv([receive, send] if c.rank % 2 else [send, receive]), [output]


# ---- operations, in the order of torch's documentation


def move(name: str, shapes: Any, start: Any, expected: Any, documented: str = "", **options: Any) -> Operation:
    return on_tensors(name, shapes, start, expected, MOVED, documented, **options)


def reduction(name: str, shapes: Any, start: Any, expected: Any, documented: str = "", **options: Any) -> Operation:
    return on_tensors(name, shapes, start, expected, REDUCTIONS, documented, **options)


def sums(c: Call, x: Inputs) -> list[torch.Tensor]:
    return [reduced(c.op, each(c, x, number)) for number in range(len(x[0]))]


def own_sums(c: Call, x: Inputs) -> list[torch.Tensor]:
    return [reduced(c.op, own(c, x, number)) for number in range(len(x[0]))]


CONTIGUOUS = [("contiguous", False), ("empty", False), ("large", False)]
MESSAGES = [
    move("send, recv", one, send_along, lambda c, x: before(c, x) if c.rank else [None], "send"),
    move("isend, irecv", one, ring, before, "send"),
    move("recv from any source", one, ring_of_any, before, "recv"),
    move("batch_isend_irecv", one, batch, before, "send"),
]
COLLECTIVES = [
    move(
        "broadcast",
        one,
        lambda c, t: ([dist.broadcast(t, c.root, c.group, c.async_op)], [t]),
        lambda c, x: [x[c.root][0]],
        "broadcast",
    ),
    reduction(
        "all_reduce",
        one,
        lambda c, t: ([dist.all_reduce(t, c.reduce_op, c.group, c.async_op)], [t]),
        sums,
        "all_reduce",
    ),
    on_tensors(
        "all_reduce of sparse COO tensors (integers, floats)",
        one,
        all_reduce_sparse,
        lambda c, x: [reduced("sum", [t.clamp(min=0) for t in each(c, x)])],
        {"sum": [*INTEGERS, *FLOATS]},  # torch gives the group a copy of complex ones
        variants=[*CONTIGUOUS[:1], ("contiguous", True), *CONTIGUOUS[1:]],
    ),
    reduction(
        "all_reduce_coalesced",
        two,
        lambda c, *t: ([dist.all_reduce_coalesced(list(t), c.reduce_op, c.group, c.async_op)], t),
        sums,
    ),
    reduction(
        "_coalescing_manager: all_reduce",
        two,
        lambda c, *t: (coalesced(c, lambda: [dist.all_reduce(tensor, c.reduce_op, c.group) for tensor in t]), t),
        sums,
    ),
    reduction(
        "reduce",
        one,
        lambda c, t: ([dist.reduce(t, c.root, c.reduce_op, c.group, c.async_op)], [t]),
        lambda c, x: sums(c, x) if c.rank == c.root else [None],
        "reduce",
    ),
    move("all_gather", one, all_gather, each, "all_gather"),
    move("all_gather, uneven", growing, all_gather_uneven, each, "all_gather"),
    move(
        "all_gather_into_tensor",
        one,
        lambda c, t: all_gather_into(c, t, c.size * c.rows, 2),
        lambda c, x: [torch.cat(each(c, x))],
        "all_gather",
    ),
    move(
        "all_gather_into_tensor, stacked",
        one,
        lambda c, t: all_gather_into(c, t, c.size, c.rows, 2),
        lambda c, x: [torch.stack(each(c, x))],
        "all_gather",
    ),
    move("all_gather_coalesced", two, all_gather_coalesced, lambda c, x: [tensor for inputs in x for tensor in inputs]),
    move(
        "_coalescing_manager: all_gather_into_tensor",
        two,
        all_gather_managed,
        lambda c, x: [torch.cat(each(c, x, number)) for number in range(2)],
    ),
    move("gather", one, gather, lambda c, x: each(c, x) if c.rank == c.root else [], "gather"),
    move("scatter", list_of_all, scatter, lambda c, x: [x[c.root][c.rank]], "scatter"),
    reduction(
        "reduce_scatter",
        list_of_all,
        reduce_scatter,
        lambda c, x: [reduced(c.op, each(c, x, c.rank))],
        "reduce_scatter",
    ),
    reduction(
        "reduce_scatter, uneven",
        growing_list,
        reduce_scatter,
        lambda c, x: [reduced(c.op, each(c, x, c.rank))],
        "reduce_scatter",
    ),
    reduction("reduce_scatter_tensor", all_in_one, reduce_scatter_tensor, own_sums, "reduce_scatter"),
    reduction(
        "reduce_scatter_tensor, stacked",
        all_stacked,
        reduce_scatter_tensor,
        lambda c, x: [sums(c, x)[0][c.rank]],
        "reduce_scatter",
    ),
    reduction("_coalescing_manager: reduce_scatter_tensor", two_of_all, reduce_scatter_managed, own_sums),
    move("all_to_all", list_of_all, all_to_all, lambda c, x: each(c, x, c.rank), "all_to_all"),
    move("all_to_all, uneven", list_of_splits, all_to_all, lambda c, x: each(c, x, c.rank), "all_to_all"),
    move("all_to_all_single", all_in_one, all_to_all_single, lambda c, x: [torch.cat(own(c, x))], "all_to_all"),
    move(
        "all_to_all_single, uneven",
        splits_in_one,
        lambda c, t: all_to_all_single(c, t, splits(c, c.rank)),
        lambda c, x: [torch.cat(own_splits(c, x))],
        "all_to_all",
    ),
]


# ---- functional collectives


def functional_reduction(name: str, shapes: Any, start: Any, expected: Any) -> Operation:
    dtypes = {op: types for op, types in REDUCTIONS.items() if op != "premul_sum"}  # they take a reduction's name
    return on_tensors(f"functional: {name}", shapes, start, expected, dtypes, variants=CONTIGUOUS)


def functional_move(name: str, shapes: Any, start: Any, expected: Any) -> Operation:
    return on_tensors(f"functional: {name}", shapes, start, expected, MOVED, variants=CONTIGUOUS)


def waited(*tensors: torch.Tensor) -> Started:
    return [], [functional.wait_tensor(tensor) for tensor in tensors]


FUNCTIONAL = [
    functional_reduction("all_reduce", one, lambda c, t: waited(functional.all_reduce(t, c.op, c.group)), sums),
    functional_reduction(
        "all_reduce_coalesced",
        two,
        lambda c, *t: waited(*functional.all_reduce_coalesced(list(t), c.op, c.group)),
        sums,
    ),
    functional_move(
        "broadcast",
        one,
        lambda c, t: waited(functional.broadcast(t, c.root, c.group)),
        lambda c, x: [x[c.root][0]],
    ),
    functional_move(
        "all_gather_single",
        one,
        lambda c, t: waited(functional.all_gather_single(t, 1, c.group)),
        lambda c, x: [torch.cat(each(c, x), 1)],
    ),
    functional_move(
        "all_gather_single_coalesced",
        two,
        lambda c, *t: waited(*functional.all_gather_single_coalesced(list(t), c.group)),
        lambda c, x: [torch.cat(each(c, x, number)) for number in range(2)],
    ),
    functional_reduction(
        "reduce_scatter_single",
        all_in_one,
        lambda c, t: waited(functional.reduce_scatter_single(t, c.op, 0, c.group)),
        own_sums,
    ),
    functional_reduction(
        "reduce_scatter_single_coalesced",
        two_of_all,
        lambda c, *t: waited(*functional.reduce_scatter_single_coalesced(list(t), c.op, [0, 0], c.group)),
        own_sums,
    ),
    functional_move(
        "all_to_all_single",
        all_in_one,
        lambda c, t: waited(functional.all_to_all_single(t, None, None, c.group)),
        lambda c, x: [torch.cat(own(c, x))],
    ),
    functional_move(
        "all_to_all_single, uneven",
        splits_in_one,
        lambda c, t: waited(functional.all_to_all_single(t, splits(c, c.rank), splits(c, c.rank), c.group)),
        lambda c, x: [torch.cat(own_splits(c, x))],
    ),
    functional_move(
        "permute_tensor",
        flat,
        lambda c, t: waited(functional.permute_tensor(t, [*range(1, c.size), 0], c.group)),
        before,
    ),
]

OPERATIONS = [*MESSAGES, *COLLECTIVES, *FUNCTIONAL]
