# SPDX-License-Identifier: Apache-2.0
"""Functional collectives in autograd and in compiled graphs; tensor_operations.py tests each of them separately."""

import compiled_operations
import pytest
import torch
import torch.distributed._functional_collectives as functional
from operations import Call
from ranks import everywhere, on_ranks


@pytest.mark.slow
@on_ranks(2)
@pytest.mark.parametrize("operation", compiled_operations.OPERATIONS, ids=lambda operation: operation.name)
def test_compiled(world, group, operation):
    operation.run(Call(group, world.rank, world.size))


@on_ranks((3, 2))
@pytest.mark.parametrize("operation", compiled_operations.OPERATIONS, ids=lambda operation: operation.name)
def test_traced(world, group, operation):
    """The graph of test_compiled works without generated code, which takes long to generate."""
    operation.run(Call(group, world.rank, world.size), backend="aot_eager")


@everywhere
def test_gradients(world, group):
    """Gradients of the autograd operations flow back to the ranks that the inputs came from."""
    rank, size = world.rank, world.size
    x = torch.full((2, 3), float(rank), requires_grad=True)
    weights = torch.arange(float(size * 6)).view(size * 2, 3) + rank
    (functional.all_gather_single_autograd(x, 0, group) * weights).sum().backward()
    ours = torch.arange(float(size * 6)).view(size, 2, 3)[rank]
    assert torch.equal(x.grad, size * ours + sum(range(size)))
    y = torch.full((2 * size, 3), float(rank), requires_grad=True)
    (functional.reduce_scatter_single_autograd(y, "sum", 0, group) * (rank + 1)).sum().backward()
    assert torch.equal(y.grad, torch.arange(1.0, size + 1).repeat_interleave(2)[:, None].expand(-1, 3))
    z = torch.full((size, 3), float(rank), requires_grad=True)
    ones = [1] * size
    (functional.all_to_all_single_autograd(z, ones, ones, group) * (rank + 1)).sum().backward()
    assert torch.equal(z.grad, torch.arange(1.0, size + 1)[:, None].expand(-1, 3))


@everywhere
def test_many_in_flight(world, group):
    """Many operations complete although only torch's C++ holds them until their results are read."""
    results = [
        functional.all_reduce(torch.full((100,), float(world.rank + number)), "sum", group) for number in range(50)
    ]
    for number, result in enumerate(results):
        assert (result == sum(range(world.size)) + number * world.size).all()
