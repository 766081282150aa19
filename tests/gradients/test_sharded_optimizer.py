# SPDX-License-Identifier: Apache-2.0
"""Sharded optimizer: weights and state are those of one process, for each optimizer and each kind of parameter."""

import copy
import functools
import io
import itertools
import os
import time
from pathlib import Path
from unittest import mock

import pytest
import small_models
import torch
import torch.distributed as dist
from one_process import plain_step
from ranks import mixed, on_ranks
from small_models import adam, regression_batch
from torch import nn

from distributed_trainer import MismatchError, create_distributed_trainer
from distributed_trainer.backend.engine_group import EngineGroup
from distributed_trainer.gradients import layout, sharded_optimizer

several = on_ranks(2, 3, (3, 2))
nodes = on_ranks(2, (4, 2))
MEAN = nn.MSELoss()
mlp = functools.partial(small_models.mlp, 9, 33, 40, 3)


def batches(num_steps, dtype=torch.float64, num_samples=8, width=9):
    return (regression_batch(num_samples, seed, dtype, inputs=width, outputs=3) for seed in range(num_steps))


def assert_same(actual, expected, tolerance=1e-9):
    for (name, one), other in zip(actual.named_parameters(), expected.parameters(), strict=True):
        assert one.grad is None
        difference = (one.detach() - other.detach()).abs()
        assert not other.numel() or difference.amax() <= tolerance * other.detach().abs().amax(), name


def assert_same_state(actual, expected, tolerance=1e-9):
    assert actual["param_groups"] == expected["param_groups"]
    assert actual["state"].keys() == expected["state"].keys()
    for index, state in expected["state"].items():
        assert actual["state"][index].keys() == state.keys()
        for key, value in state.items():
            found = actual["state"][index][key]
            if isinstance(value, torch.Tensor):
                assert found.stride() == value.stride()
                torch.testing.assert_close(found, value, rtol=tolerance, atol=tolerance)
            else:
                assert found == value


@mixed
def test_sgd_in_float32(world):
    """The result differs by rounding at most from that of a trainer without sharding."""
    model, whole = mlp(dtype=torch.float32), mlp(dtype=torch.float32)
    sharded, plain = create_distributed_trainer(model, shard="optimizer"), create_distributed_trainer(whole)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01) for m in (model, whole)]
    for x, y in batches(20, torch.float32):
        losses = [t.train_step(x, y, MEAN, o) for t, o in zip((sharded, plain), optimizers, strict=True)]
        torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
    if world.size > 1:
        assert_same(model, whole_without_gradients(whole), 1e-6)
    sharded.close()
    plain.close()


def whole_without_gradients(model):
    model = copy.deepcopy(model)
    model.zero_grad()
    return model


@pytest.mark.parametrize("bucket_bytes", [1, 4 << 20])
@mixed
def test_adam(world, monkeypatch, bucket_bytes):
    """The result is that of plain torch, also with batches in which some ranks have no sample."""
    monkeypatch.setattr(layout, "BUCKET_BYTES", bucket_bytes)
    model, reference = mlp(), mlp()
    trainer = create_distributed_trainer(model, shard="optimizer")
    optimizer, expected = adam(model), adam(reference)
    for step, (x, y) in enumerate(batches(50)):
        num_samples = 1 + step % 7
        loss = trainer.train_step(x[:num_samples], y[:num_samples], MEAN, optimizer)
        torch.testing.assert_close(
            loss, plain_step(reference, x[:num_samples], y[:num_samples], MEAN, expected), rtol=1e-9, atol=0
        )
    if world.size > 1:
        assert_same(model, reference)
    trainer.close()


class Odd(nn.Module):
    """Frozen, shared, 0-dimensional, empty, unused and sometimes used parameters, and one in channels-last."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(9, 36)
        self.convolution = nn.Conv2d(4, 4, 3, padding=1).to(memory_format=torch.channels_last)
        self.frozen = nn.Linear(36, 9).requires_grad_(False)
        self.again = nn.Linear(9, 36, bias=False)
        self.again.weight = self.first.weight
        self.last = nn.Linear(36, 3)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.unused = nn.Parameter(torch.ones(20))
        self.sometimes = nn.Parameter(torch.ones(36))
        self.double()
        self.use = True

    def forward(self, x):
        x = self.first(x).tanh()
        x = self.convolution(x.view(-1, 4, 3, 3)).reshape(-1, 36).tanh()
        x = self.again(self.frozen(x)).tanh()
        if self.use:
            x = x * self.sometimes
        return self.last(x) * self.scale + self.empty.sum()


VARIANTS = [(kind, {}) for kind in sharded_optimizer._ELEMENT_WISE] + [
    (torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "foreach": True}),
    (torch.optim.SGD, {"weight_decay": 0.1, "fused": True}),
    (torch.optim.Adam, {"amsgrad": True, "weight_decay": 0.1, "foreach": True}),
    (torch.optim.AdamW, {"maximize": True, "fused": True}),
    (torch.optim.Adam, {"lr": torch.tensor(0.01), "fused": True}),
    (torch.optim.Adagrad, {"initial_accumulator_value": 0.1, "fused": True}),
    (torch.optim.RMSprop, {"momentum": 0.9, "centered": True, "foreach": True}),
    (torch.optim.Rprop, {"foreach": True}),
    (torch.optim.NAdam, {"decoupled_weight_decay": True, "foreach": True}),
]


def variant_id(value):
    return value.__name__ if isinstance(value, type) else "-".join(value)


@pytest.mark.parametrize(("kind", "options"), VARIANTS, ids=variant_id)
@nodes
def test_optimizers(world, kind, options):
    """Each accepted optimizer, with parameters of every kind, has the weights and state of plain torch."""
    model, reference = Odd(), Odd()
    trainer = create_distributed_trainer(model, shard="optimizer")
    options = {"lr": 0.01, **options}
    optimizer, expected = kind(model.parameters(), **options), kind(reference.parameters(), **options)
    for step, (x, y) in enumerate(batches(6)):
        model.use = reference.use = step % 2 == 1
        trainer.train_step(x, y, MEAN, optimizer)
        plain_step(reference, x, y, MEAN, expected)
        optimizer.zero_grad()  # many loops call this
    assert_same(model, reference)
    assert_same_state(optimizer.state_dict(), expected.state_dict())
    trainer.close()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@several
def test_16_bit(world, dtype):
    """The bits are those of a trainer without sharding."""
    model, whole = mlp(dtype=dtype), mlp(dtype=dtype)
    trainers = create_distributed_trainer(model, shard="optimizer"), create_distributed_trainer(whole)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (model, whole)]
    for x, y in batches(4, dtype):
        for trainer, optimizer in zip(trainers, optimizers, strict=True):
            trainer.train_step(x, y, MEAN, optimizer)
    assert_same(model, whole, 0)
    for trainer in trainers:
        trainer.close()


@mixed
def test_groups_and_scheduler(world):
    """Schedulers made before and after the first step, a later group, and a learning rate set by hand all work."""
    model, reference = mlp(), mlp()
    trainer = create_distributed_trainer(model, shard="optimizer")

    def make(model):
        groups = [
            {"params": [model[0].weight, model[4].bias], "lr": 0.1},
            {"params": model[2].parameters(), "weight_decay": 0.3},
        ]
        optimizer = torch.optim.SGD(groups, lr=0.01, momentum=0.5)
        return optimizer, [torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.7)]

    (optimizer, schedulers), (expected, expected_schedulers) = make(model), make(reference)
    for step, (x, y) in enumerate(batches(8)):
        trainer.train_step(x, y, MEAN, optimizer)
        plain_step(reference, x, y, MEAN, expected)
        for scheduler in schedulers + expected_schedulers:
            scheduler.step()
        for one, of_scheduler, m in ((optimizer, schedulers, model), (expected, expected_schedulers, reference)):
            if step == 2:
                of_scheduler.append(torch.optim.lr_scheduler.ExponentialLR(one, 0.9))
            if step == 4:
                one.add_param_group({"params": [m[0].bias, m[4].weight], "lr": 0.2})
                of_scheduler.clear()
            if step == 6:
                one.param_groups[0]["lr"] = 0.05
    if world.size > 1:
        assert_same(model, reference)
    assert_same_state(optimizer.state_dict(), expected.state_dict())
    trainer.close()


@pytest.mark.parametrize("when", ["before the first step", "after it"])
@mixed
def test_state_dict(world, when):
    """State is loaded from a plain optimizer into a sharded one, and back through a file."""
    model, reference = mlp(), mlp()
    expected = adam(reference)
    steps = batches(9)
    for x, y in itertools.islice(steps, 3):
        plain_step(reference, x, y, MEAN, expected)

    trainer = create_distributed_trainer(model, shard="optimizer")
    optimizer = adam(model)
    if when == "after it":
        trainer.train_step(*next(batches(1)), MEAN, optimizer)
    model.load_state_dict(reference.state_dict())
    optimizer.load_state_dict(copy.deepcopy(expected.state_dict()))
    if when == "after it":
        assert_same_state(optimizer.state_dict(), expected.state_dict())
    for x, y in itertools.islice(steps, 3):
        trainer.train_step(x, y, MEAN, optimizer)
        plain_step(reference, x, y, MEAN, expected)

    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    trainer.close()
    weights, state = torch.load(file)
    again = mlp()
    optimizer = adam(again)
    again.load_state_dict(weights)
    optimizer.load_state_dict(state)
    for x, y in steps:
        plain_step(again, x, y, MEAN, optimizer)
        plain_step(reference, x, y, MEAN, expected)
    again.zero_grad()
    assert_same(again, reference)
    assert_same_state(optimizer.state_dict(), expected.state_dict())


@on_ranks(3, (4, 2))
def test_other_number_of_ranks(world):
    """State saved on all ranks is loaded in jobs of fewer ranks."""
    model, reference = mlp(), mlp()
    optimizer, expected = adam(model), adam(reference)
    for comm in (None, world.comm.Split(world.rank % 2)):
        state = optimizer.state_dict()
        model = copy.deepcopy(model)
        optimizer = adam(model)
        optimizer.load_state_dict(state)
        trainer = create_distributed_trainer(model, group=comm, shard="optimizer")
        for x, y in batches(4):
            trainer.train_step(x, y, MEAN, optimizer)
            plain_step(reference, x, y, MEAN, expected)
        state = optimizer.state_dict()
        assert_same_state(state, expected.state_dict())
        trainer.close()
        optimizer = adam(model)
        optimizer.load_state_dict(state)
    model.zero_grad()
    assert_same(model, reference)


@several
def test_two_optimizers_take_turns(world):
    model, reference = mlp(), mlp()
    trainer = create_distributed_trainer(model, shard="optimizer")

    def make(model):
        return torch.optim.Adam(model[0].parameters(), lr=0.01), torch.optim.SGD(model[2:].parameters(), lr=0.1)

    optimizers, expected = make(model), make(reference)
    for step, (x, y) in enumerate(batches(8)):
        trainer.train_step(x, y, MEAN, optimizers[step // 2 % 2])
        reference.zero_grad()
        plain_step(reference, x, y, MEAN, expected[step // 2 % 2])
    reference.zero_grad()
    assert_same(model, reference)
    trainer.close()


@several
def test_freezing_between_steps(world):
    """A frozen parameter is not updated, though it has momentum; after it is unfrozen, it continues with its state."""
    model, reference = mlp(), mlp()
    trainer = create_distributed_trainer(model, shard="optimizer")
    optimizer, expected = (torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (model, reference))
    for step, (x, y) in enumerate(batches(9)):
        for m in (model, reference):
            m[2].weight.requires_grad_(step // 3 != 1)
        trainer.train_step(x, y, MEAN, optimizer)
        plain_step(reference, x, y, MEAN, expected)
        assert_same(model, reference)
    trainer.close()


@several
def test_slow_ranks(world):
    """A rank that is late in backward reads no weights updated by others; a rank late in its update is waited for."""
    model, reference = mlp(), mlp()
    trainer = create_distributed_trainer(model, shard="optimizer")
    optimizer, expected = adam(model), adam(reference)
    is_late = world.rank == world.size - 1
    steps = batches(4)
    trainer.train_step(*(first := next(steps)), MEAN, optimizer)
    plain_step(reference, *first, MEAN, expected)
    if is_late:
        model[3].register_full_backward_hook(lambda *_: time.sleep(0.1))
        optimizer.register_step_pre_hook(lambda *_: time.sleep(0.1))
    for x, y in steps:
        trainer.train_step(x, y, MEAN, optimizer)
        plain_step(reference, x, y, MEAN, expected)
        assert_same(model, reference)
    trainer.close()


@mixed
def test_memory(world):
    """Each rank has 1/N of the state, and each machine one copy of the weights."""
    model = mlp()
    trainer = create_distributed_trainer(model, shard="optimizer")
    optimizer = adam(model)
    trainer.train_step(*next(batches(1)), MEAN, optimizer)
    own = sum(state["exp_avg"].numel() for state in optimizer.state.values())
    total = sum(parameter.numel() for parameter in model.parameters())
    assert sum(world.gather(own)) == total * (world.size if world.size == 1 else 1)
    line = 64 // 8
    assert abs(own - total / world.size) <= line * len(list(model.parameters()))
    if world.size > 1:
        files = {file_at(parameter.data_ptr()) for parameter in model.parameters()}
        assert len(files) == 1
        node_of_rank = world.gather(file_at(model[0].weight.data_ptr()))
        per_node = world.job.ranks_per_node or world.size
        expected = [rank // per_node for rank in range(world.size)]
        assert [list(dict.fromkeys(node_of_rank)).index(file) for file in node_of_rank] == expected
        assert len({parameter.untyped_storage().data_ptr() for parameter in model.parameters()}) == 6
    trainer.close()
    assert {file_at(parameter.data_ptr()) for parameter in model.parameters()} == {"0"} or world.size == 1


def file_at(address):
    """Return the inode of the file mapped at an address; "0" for memory without a file."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, stop = (int(number, 16) for number in line.split()[0].split("-"))
        if start <= address < stop:
            return line.split()[4]
    return None


@several
def test_forked_child_reads_weights(world):
    model = mlp()
    trainer = create_distributed_trainer(model, shard="optimizer")
    total = float(model[0].weight.sum())
    child = os.fork()
    if child == 0:
        os._exit(0 if float(model[0].weight.sum()) == total else 1)
    assert os.waitpid(child, 0)[1] == 0
    trainer.close()


@several
def test_after_close(world):
    """The user may change the model again; the optimizer reports the calls that no longer work."""
    model = mlp()
    trainer = create_distributed_trainer(model, shard="optimizer")
    optimizer = adam(model)
    x, y = next(batches(1))
    trainer.train_step(x, y, MEAN, optimizer)
    trainer.close()
    with pytest.raises(ValueError, match=r"before trainer\.close\(\)"):
        optimizer.state_dict()
    with pytest.raises(ValueError, match="called by itself"):
        optimizer.step()
    before = model[0].weight.detach().clone()
    world.comm.Barrier()
    if world.rank == 0:
        model[0].weight.data.zero_()
    world.comm.Barrier()
    assert world.rank == 0 or torch.equal(model[0].weight, before)
    trainer = create_distributed_trainer(model, shard="optimizer")
    with pytest.raises(ValueError, match=r"6 parameter\(s\) that are not the model's"):
        trainer.train_step(x, y, MEAN, optimizer)
    trainer.close()


class Own(torch.optim.SGD):
    pass


@pytest.mark.parametrize("name", ["Adafactor", "Muon", "LBFGS", "SparseAdam", "Own"])
@on_ranks(1, 2)
def test_refused_optimizers(world, name):
    """The error has the optimizer's name and the remedy; raised before any communication, also on one rank alone."""
    model = nn.Linear(9, 3, bias=False).double()
    trainer = create_distributed_trainer(model, shard="optimizer")
    kind = Own if name == "Own" else getattr(torch.optim, name)
    optimizer = kind(list(model.parameters()))
    if world.rank == 0:
        with pytest.raises(ValueError, match=rf"does not work with {name}: .* Use one of .* leave shard out"):
            trainer.train_step(*next(batches(1)), MEAN, optimizer)
    trainer.train_step(*next(batches(1)), MEAN, torch.optim.SGD(model.parameters()))
    trainer.close()


@several
def test_refused_calls(world):
    model = mlp()
    trainer = create_distributed_trainer(model, shard="optimizer")
    optimizer = adam(model)
    x, y = next(batches(1))
    trainer.train_step(x, y, MEAN, optimizer)
    with pytest.raises(ValueError, match="called by itself"):
        optimizer.step()
    state = optimizer.state_dict()
    state["state"][0] = {**state["state"][0], "exp_avg": torch.zeros(3, 3)}
    with pytest.raises(ValueError, match=r"exp_avg of 0\.weight has shape \[3, 3\], the parameter has \[33, 9\]"):
        optimizer.load_state_dict(state)
    model[2].weight.data = model[2].weight.data.clone()
    with pytest.raises(ValueError, match=r"2\.weight was moved to other memory"):
        trainer.train_step(x, y, MEAN, optimizer)
    trainer.close()

    model[2].bias.data = model[0].weight.data.view(-1)[:40]
    with pytest.raises(ValueError, match=r"0\.weight and 2\.bias are different parameters in the same memory"):
        create_distributed_trainer(model, shard="optimizer")


@several
def test_state_dict_on_one_rank(world):
    """A call on one rank does not match the next call of the others; the rank that made the call gets the reason."""
    model = mlp()
    trainer = create_distributed_trainer(model, shard="optimizer")
    optimizer = adam(model)
    x, y = next(batches(1))
    trainer.train_step(x, y, MEAN, optimizer)
    with pytest.raises(MismatchError, match="call it on every rank" if world.rank == 0 else "disagree"):
        optimizer.state_dict() if world.rank == 0 else trainer.train_step(x, y, MEAN, optimizer)
    trainer.close()


def test_group_without_shared_memory():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match=r"one copy of the weights .* this one is gloo"):
            create_distributed_trainer(mlp(), group=dist.group.WORLD, shard="optimizer")
    finally:
        dist.destroy_process_group()
    with pytest.raises(ValueError, match="on the CPU, where ranks share memory; it is on meta"):
        sharded_optimizer.check_model(mlp(), mock.Mock(spec=EngineGroup), torch.device("meta"))


@pytest.mark.parametrize("element_bytes", [2, 4, 8])
def test_bounds(element_bytes):
    """Parts are consecutive, cover all elements, are cut at cache lines, and differ by at most one cache line."""
    for num_elements, num_ranks in itertools.product([0, 1, 7, 8, 9, 31, 32, 33, 1000, 10_007], [1, 2, 3, 4, 7]):
        bounds = [
            sharded_optimizer.shard_bounds(num_elements, element_bytes, rank, num_ranks) for rank in range(num_ranks)
        ]
        assert [stop for _, stop in bounds[:-1]] == [start for start, _ in bounds[1:]]
        assert (bounds[0][0], bounds[-1][1]) == (0, num_elements)
        lines = [-(-(stop - start) * element_bytes // 64) for start, stop in bounds]
        assert max(lines) - min(lines) <= 1
        assert all(start * element_bytes % 64 == 0 or start == num_elements for start, _ in bounds)
