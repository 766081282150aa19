# SPDX-License-Identifier: Apache-2.0
"""Collectives inside torch.compile(fullgraph=True)."""

from functools import partial

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from operations import Call, Operation


def inputs(rank: int) -> torch.Tensor:
    return torch.arange(24.0).view(12, 2) * (rank + 1) + rank


def all_functional(x, group, size):
    """Call functional collectives, each with the result of the one before."""
    x = functional.all_reduce(x, "sum", group) / size
    x = functional.all_gather_single(x[:3], 0, group)
    (x,) = functional.all_reduce_coalesced([x + 1], "max", group)
    x = functional.all_to_all_single(x, None, None, group)
    x = functional.reduce_scatter_single(x, "avg", 0, group)
    x, y = functional.all_gather_single_coalesced([x, x / 2], group)
    x, y = functional.reduce_scatter_single_coalesced([x, y], "sum", [0, 0], group)
    return functional.broadcast(x / size + 2 * y / size, 0, group)


def all_of_dist(x, group, size):
    """Call the functions of torch.distributed that torch.compile takes into a graph."""
    x = x.clone()
    dist.all_reduce(x, group=group)
    gathered = x.new_empty(size * 3, 2)
    dist.all_gather_into_tensor(gathered, x[:3] / size, group)
    parts = [torch.empty_like(gathered) for _ in range(size)]
    dist.all_gather(parts, gathered, group)
    exchanged = torch.empty_like(gathered)
    dist.all_to_all_single(exchanged, parts[-1] + 1, group=group)
    scattered = x.new_empty(3, 2)
    dist.reduce_scatter_tensor(scattered, exchanged, dist.ReduceOp.MAX, group)
    return scattered * 2


def run(function, call: Call, backend: str = "inductor") -> None:
    """Check that one graph, without a break, gives the results of the same calls one by one, and the expected ones."""
    x = inputs(call.rank)
    wanted = function(x, call.group, call.size)
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    for _ in range(2):
        assert torch.equal(compiled(x, call.group, call.size), wanted)
    # After the first sum, all ranks exchange the same tensors.
    mean = sum(map(inputs, range(call.size))) / call.size
    torch.testing.assert_close(wanted, 2 * (mean[:3] + 1))


OPERATIONS = [
    Operation("torch.compile: functional collectives", partial(run, all_functional)),
    Operation(
        "torch.compile: all_reduce, all_gather, all_gather_into_tensor, all_to_all_single, reduce_scatter_tensor",
        partial(run, all_of_dist),
    ),
]
