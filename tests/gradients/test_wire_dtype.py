# SPDX-License-Identifier: Apache-2.0
"""float32 gradients sent between machines in 16 bits, compared with a formula that rounds in the same places."""

import pytest
import torch
import torch.distributed as dist
from ranks import everywhere, on_ranks, one_node
from torch import nn

from distributed_trainer import PowerSGD, create_distributed_trainer
from distributed_trainer.backend import job as jobs

between_nodes = on_ranks((2, 1), (3, 1), (3, 2), (4, 2))


def contribution(rank, count):
    return torch.randn(count, generator=torch.Generator().manual_seed(rank)) * 8


def expected(world, nodes, count, dtype):
    """Return round(sum over machines of round(sum over their ranks)), all sums in float32 and in order."""
    total = torch.zeros(count)
    for number, node in enumerate(dict.fromkeys(nodes)):
        members = [contribution(rank, count) for rank in range(world.size) if nodes[rank] == node]
        partial = members[0]
        for member in members[1:]:
            partial = partial + member
        partial = partial.to(dtype).float()
        total = partial if number == 0 else total + partial
    return total.to(dtype).float()


@between_nodes
@pytest.mark.parametrize("name", ["bfloat16", "float16"])
@pytest.mark.parametrize("is_registered", [False, True])
def test_formula(world, name, is_registered):
    job = jobs.start(None, None)
    group = job.create_group(wire_dtype=name)
    for count in (1, 100, 10_007, 500_001):
        tensor = group.allocate(4 * count).view(torch.float32) if is_registered else torch.empty(count)
        tensor.copy_(contribution(world.rank, count))
        group.allreduce([tensor]).wait()
        wanted = expected(world, job.node_of_rank, count, getattr(torch, name))
        assert torch.equal(tensor, wanted)
        assert not torch.equal(wanted, expected(world, job.node_of_rank, count, torch.float32)) or count == 1


@everywhere
def test_other_reductions_stay_exact(world):
    """Dtypes other than float32, and reductions other than sums, stay exact."""
    group = jobs.start(None, None).create_group(wire_dtype="bfloat16")
    exact = 1 + 2**-20
    for dtype, op, wanted in [
        (torch.float64, dist.ReduceOp.SUM, exact * world.size),
        (torch.int32, dist.ReduceOp.SUM, 16_777_217 * world.size),
        (torch.float32, dist.ReduceOp.MAX, exact),
    ]:
        tensor = torch.tensor([wanted / world.size if op == dist.ReduceOp.SUM else wanted], dtype=dtype)
        options = dist.AllreduceOptions()
        options.reduceOp = op
        group.allreduce([tensor], options).wait()
        assert tensor.item() == wanted


@one_node
def test_changes_nothing_on_one_node(world):
    job = jobs.start(None, None)
    results = []
    for name in (None, "bfloat16", "float16"):
        tensor = contribution(world.rank, 10_007)
        job.create_group(wire_dtype=name).allreduce([tensor]).wait()
        results.append(tensor)
    assert all(torch.equal(result, results[0]) for result in results)


def train(name, num_steps=3):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 64), nn.Tanh(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with create_distributed_trainer(model, compression=name) as trainer:
        for step in range(num_steps):
            data = torch.Generator().manual_seed(step)
            inputs, targets = torch.randn(24, 40, generator=data), torch.randint(0, 10, (24,), generator=data)
            loss = trainer.train_step(inputs, targets, nn.CrossEntropyLoss(), optimizer)
    return [loss, *(parameter.detach() for parameter in model.parameters())]


@everywhere
@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_training(world, name):
    """All ranks end with the same bits, near those of the exact run; on one node the bits are equal."""
    exact, narrow = train(None), train(name)
    for others in world.gather([tensor.tolist() for tensor in narrow]):
        assert others == [tensor.tolist() for tensor in narrow]
    has_several_nodes = max(jobs.start(None, None).node_of_rank) > 0
    is_same = all(torch.equal(a, b) for a, b in zip(exact, narrow, strict=True))
    assert is_same != has_several_nodes
    for a, b in zip(exact, narrow, strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.002)


@on_ranks((2, 1), (3, 2))
def test_disagreement(world):
    """Ranks whose groups send sums in different types get the same error."""
    job = jobs.start(None, None)
    group = job.create_group(wire_dtype="bfloat16" if world.rank == world.size - 1 else None)
    with pytest.raises(RuntimeError, match=r"float32, as bfloat16 between nodes\)") as error:
        group.allreduce([torch.zeros(8)]).wait()
    assert len(set(world.gather(str(error.value)))) == 1


def test_refusals():
    model = nn.Linear(2, 2)
    for name, error in [("float32", ValueError), ("int8", ValueError), (torch.bfloat16, TypeError)]:
        known = rf'compression must be "bfloat16", "float16", PowerSGD\(rank=4\) or None, not {name!r}'
        with pytest.raises(error, match=known):
            create_distributed_trainer(model, compression=name)


@on_ranks(1)
def test_needs_our_own_group(world, tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        for compression in ("float16", PowerSGD(rank=1, dtype="float16")):
            with pytest.raises(ValueError, match=r"compression=.*float16.* needs this package's own exchange"):
                create_distributed_trainer(nn.Linear(2, 2), group=dist.group.WORLD, compression=compression)
    finally:
        dist.destroy_process_group()


@on_ranks(2, (2, 1))
def test_over_a_group_of_torch(world):
    """The user's own shmpi group is not changed."""
    dist.init_process_group("shmpi", init_method="mpi://")
    try:
        model = nn.Linear(3, 1, bias=False)
        nn.init.ones_(model.weight)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        trainer = create_distributed_trainer(model, group=dist.group.WORLD, compression="bfloat16")
        inputs = torch.full((2, 3), 1 + 2**-12)
        trainer.train_step(inputs, torch.zeros(2, 1), lambda outputs, _: outputs.mean(), optimizer)
        step = 1.0 if world.job.ranks_per_node else 1 + 2**-12
        assert model.weight.tolist() == [[1 - step] * 3]
    finally:
        dist.destroy_process_group()
