# SPDX-License-Identifier: Apache-2.0
"""DTensor, tensor parallelism and pipelines of torch over shmpi, against one process."""

import copy
import itertools

import pytest
import torch
import torch.distributed as dist
from one_process import assert_same
from ranks import on_ranks
from small_models import mlp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from torch_groups import batches, train, trained_alone

pytestmark = pytest.mark.usefixtures("default_group")
several = on_ranks(2, 4, (4, 2))
four = on_ranks(4, (4, 2))


def mesh_2d():
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("rows", "columns"))


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@four
@pytest.mark.parametrize("shape", [(8, 6), (5, 3), (1, 7)], ids=str)
def test_redistribute(world, shape):
    """DTensors can change from each placement on the mesh to each other, with equal, unequal and empty parts."""
    mesh = mesh_2d()
    whole = torch.arange(shape[0] * shape[1], dtype=torch.float64).view(shape)
    each = [Replicate(), Shard(0), Shard(1)]
    for before, after in itertools.product(itertools.product(each, repeat=2), repeat=2):
        tensor = distribute_tensor(whole if world.rank == 0 else torch.zeros_like(whole), mesh, before)
        moved = tensor.redistribute(mesh, after)
        assert moved.placements == after
        assert torch.equal(moved.full_tensor(), whole)


@four
@pytest.mark.parametrize("shape", [(8, 6), (5, 3)], ids=str)
def test_partial(world, shape):
    """Partial sums, means and extremes are reduced over either dimension of the mesh, and over both."""
    mesh = mesh_2d()
    values = [
        torch.arange(shape[0] * shape[1], dtype=torch.float64).view(shape) * (-1) ** rank + rank for rank in range(4)
    ]
    grid = torch.stack(values).view(2, 2, *shape)
    reduce = {"sum": torch.sum, "avg": torch.mean, "max": torch.amax, "min": torch.amin}
    for op, after in itertools.product(reduce, itertools.product([Replicate(), Shard(0), Shard(1)], repeat=2)):
        partial = DTensor.from_local(values[world.rank], mesh, [Partial(op), Partial(op)])
        close(partial.redistribute(mesh, after).full_tensor(), reduce[op](grid, (0, 1)))
    # This one is over the columns only; the rows hold one value each.
    own_row = grid[:, 0][mesh.get_local_rank("rows")]
    partial = DTensor.from_local(own_row, mesh, [Partial(), Replicate()])
    close(partial.full_tensor(), grid[:, 0].sum(0))


@four
def test_operations(world):
    """Products, softmax over a sharded dimension, and gradients through them are those of one process."""
    mesh = mesh_2d()
    torch.manual_seed(0)
    left, right = torch.randn(6, 10, dtype=torch.float64), torch.randn(10, 5, dtype=torch.float64)
    expected = [left.clone().requires_grad_(), right.clone().requires_grad_()]
    (expected[0] @ expected[1]).softmax(-1).pow(2).sum().backward()
    each = [*itertools.product([Replicate(), Shard(0), Shard(1)], repeat=2)]
    for placements in zip(each, each[3:] + each[:3], strict=True):
        pair = zip((left, right), placements, strict=True)
        found = [distribute_tensor(tensor, mesh, placed).requires_grad_() for tensor, placed in pair]
        (found[0] @ found[1]).softmax(-1).pow(2).sum().backward()
        for one, other in zip(found, expected, strict=True):
            close(one.grad.full_tensor(), other.grad)


@several
def test_tensor_parallel(world):
    """An MLP trains split by columns, then by rows; every rank has the whole batch."""
    mesh = init_device_mesh("cpu", (world.size,))
    model = mlp(12, 16, 8, 20, 6)
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel(), "4": ColwiseParallel(), "6": RowwiseParallel()}
    parallelize_module(model, mesh, plan)
    assert model[0].weight.to_local().shape == (16 // world.size, 12)
    assert model[2].weight.to_local().shape == (8, 16 // world.size)
    data = batches(4, 8, 12, 6)
    train(model, data)
    assert_same(model, trained_alone(mlp(12, 16, 8, 20, 6), data))


@several
def test_sequence_and_loss_parallel(world):
    """Activations can be sharded over the sequence between layers, and logits over the classes in the loss."""
    mesh = init_device_mesh("cpu", (world.size,))
    model = torch.nn.Sequential(torch.nn.LayerNorm(8, dtype=torch.float64), *mlp(8, 16, 8), *mlp(8, 12))
    alone = copy.deepcopy(model)
    plan = {
        "0": SequenceParallel(),
        "1": ColwiseParallel(input_layouts=Shard(1)),
        "3": RowwiseParallel(output_layouts=Shard(1)),
        "4": ColwiseParallel(input_layouts=Shard(1), use_local_output=False),
    }
    parallelize_module(model, mesh, plan)
    data = [(torch.randn(3, 8, 8, dtype=torch.float64), torch.randint(12, (24,))) for _ in range(3)]

    def cross_entropy(model, batch):
        return torch.nn.functional.cross_entropy(model(batch[0]).flatten(0, 1), batch[1])

    expected = trained_alone(alone, data, loss_of=cross_entropy)
    with loss_parallel():
        train(
            model,
            [(inputs.chunk(world.size, 1)[world.rank], targets) for inputs, targets in data],
            loss_of=cross_entropy,
        )
    assert_same(model, expected)


@four
def test_two_dimensions(world):
    """A model can be tensor parallel in one dimension of the mesh, and fully sharded over batches in the other."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    model = mlp(12, 16, 6)
    parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    fully_shard(model, mesh=mesh["data"])
    assert model[0].weight.to_local().shape == (4, 12)
    data = batches(4, 8, 12, 6)
    place = mesh.get_local_rank("data")
    train(model, [tuple(tensor.chunk(2)[place] for tensor in batch) for batch in data])
    assert_same(model, trained_alone(mlp(12, 16, 6), data))


def stages_of(world, rank, num_layers, per_rank=1):
    """Cut a deep MLP into stages of equally many layers; return it, with this rank's stages and their numbers."""
    whole = torch.nn.Sequential(*(mlp(10, 10, seed=number).append(torch.nn.Tanh()) for number in range(num_layers)))
    num_stages = world.size * per_rank
    numbers = [rank + world.size * turn for turn in range(per_rank)]
    length = num_layers // num_stages
    parts = [whole[number * length : (number + 1) * length] for number in numbers]
    device = torch.device("cpu")
    stages = [PipelineStage(part, number, num_stages, device) for part, number in zip(parts, numbers, strict=True)]
    return whole, parts, stages


@on_ranks(1, 2, 4, (4, 2))
@pytest.mark.parametrize("kind", [ScheduleGPipe, Schedule1F1B, ScheduleInterleaved1F1B], ids=lambda kind: kind.__name__)
def test_pipeline(world, kind):
    """Microbatches through stages on all ranks give the losses, outputs and weights of one process."""
    interleaved = kind is ScheduleInterleaved1F1B
    whole, parts, stages = stages_of(world, world.rank, 8, 2 if interleaved else 1)
    alone = copy.deepcopy(whole)
    schedule = kind(stages if interleaved else stages[0], 4, loss_fn=torch.nn.functional.mse_loss)
    first, last = world.rank == 0, world.rank == world.size - 1
    optimizer = torch.optim.SGD([each for part in parts for each in part.parameters()], lr=0.1)
    reference = torch.optim.SGD(alone.parameters(), lr=0.1)
    for inputs, targets in batches(3, 8, 10, 10):
        losses = []
        optimizer.zero_grad()
        output = schedule.step(*[inputs] * first, target=targets if last else None, losses=losses if last else None)
        reference.zero_grad()
        expected = alone(inputs)
        loss = torch.nn.functional.mse_loss(expected, targets)
        loss.backward()
        if last:
            close(output, expected)
            close(torch.stack(losses).mean(), loss)
        optimizer.step()
        reference.step()
    assert_same(whole_of(world, whole, stages), alone)


def whole_of(world, whole, stages):
    """Gather the weights of all stages from the ranks that trained them."""
    states = [None] * world.size
    dist.all_gather_object(states, [stage.submod.state_dict() for stage in stages])
    merged = {name: tensor for of_rank in states for state in of_rank for name, tensor in state.items()}
    whole.load_state_dict(merged)
    return whole
