# SPDX-License-Identifier: Apache-2.0
"""Buckets: their contents, the time when they are sent, and the gradients of all kinds of parameters."""

import functools
import gc

import pytest
import small_models
import torch
import torch.nn.functional as F
from internals import buckets_of, gradients_of
from ranks import everywhere, mapped_bytes, on_ranks
from small_models import regression_batch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from distributed_trainer import DistributedTrainerError, MismatchError, create_distributed_trainer
from distributed_trainer.gradients import layout

several = on_ranks(2, 3, 4, (2, 1), (3, 2), (4, 2))
mlp = functools.partial(small_models.mlp, 5, 5, 5, 5, 5)
batch = functools.partial(regression_batch, inputs=5, outputs=5)
sgd = functools.partial(small_models.sgd, lr=0.0)  # every step has the gradients of the first


def bits(tensor):
    return None if tensor is None else tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def seeded(make):
    torch.manual_seed(0)
    return make()


def plain_step(make, x, y, criterion):
    """Return gradients and loss of one process."""
    model = seeded(make)
    loss = criterion(model(x), y)
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}, loss.detach()


def assert_same(actual, expected, tolerance=1e-12):
    for name, reference in expected.items():
        if reference is None:
            assert actual[name].grad is None, name
        else:
            difference = (actual[name].grad - reference).abs()
            assert (difference <= tolerance * reference.abs().amax()).all() if reference.numel() else True, name


@pytest.mark.parametrize("bucket_bytes", [1, 300, 4 << 20])
@everywhere
def test_buckets(world, monkeypatch, bucket_bytes):
    """Buckets of one, several or all parameters give the gradients of one process, with the same bits on every rank."""
    monkeypatch.setattr(layout, "BUCKET_BYTES", bucket_bytes)
    model = seeded(mlp)
    trainer = create_distributed_trainer(model)
    optimizer = sgd(model)
    x, y = batch(7)
    expected, _ = plain_step(mlp, x, y, nn.MSELoss())
    for _ in range(3):
        trainer.train_step(x, y, nn.MSELoss(), optimizer)
        assert_same(dict(model.named_parameters()), expected)
        assert len(set(world.gather(tuple(bits(parameter.grad) for parameter in model.parameters())))) == 1
    num_buckets = len(buckets_of(trainer))
    assert num_buckets == (0 if world.size == 1 else {1: 8, 300: 2, 4 << 20: 1}[bucket_bytes])
    trainer.close()


@several
def test_overlap(world, monkeypatch):
    """All buckets but the first layer's are sent before backward reaches the first layer."""
    monkeypatch.setattr(layout, "BUCKET_BYTES", 1)
    model = seeded(mlp)
    trainer = create_distributed_trainer(model)
    events = []
    group = gradients_of(trainer)._group
    all_reduce = group.allreduce

    def recorded(tensors, *options):
        events.append(tensors[0].numel())
        return all_reduce(tensors, *options)

    group.allreduce = recorded
    model[0].weight.register_hook(lambda gradient: events.append("first layer"))
    optimizer = sgd(model)
    x, y = batch()
    for _ in range(2):
        events.clear()
        trainer.train_step(x, y, nn.MSELoss(), optimizer)
    started = events[: events.index("first layer")]
    assert started.count(25) == 3
    assert started.count(5) >= 3
    trainer.close()


@several
def test_reductions_end_while_backward_runs(world, monkeypatch):
    """Reductions end without a wait on any rank."""
    monkeypatch.setattr(layout, "BUCKET_BYTES", 1)
    model = seeded(mlp)
    trainer = create_distributed_trainer(model)
    is_done = []

    def wait_for_last_layer(gradient):
        if buckets_of(trainer):
            work = buckets_of(trainer)[0]._work
            while not work.is_completed():
                pass
            is_done.append(True)

    model[0].weight.register_hook(wait_for_last_layer)
    optimizer = sgd(model)
    x, y = batch()
    for _ in range(3):
        trainer.train_step(x, y, nn.MSELoss(), optimizer)
    assert is_done == [True] * 2
    trainer.close()


@several
def test_gradients_lie_in_the_arena(world):
    """`.grad` is memory of the bucket, which is memory of the group."""
    model = seeded(mlp)
    trainer = create_distributed_trainer(model)
    optimizer = sgd(model)
    x, y = batch()
    for _ in range(2):
        trainer.train_step(x, y, nn.MSELoss(), optimizer)
        (bucket,) = buckets_of(trainer)
        memory = bucket.memory.current.whole
        first = memory.data_ptr()
        for parameter in model.parameters():
            assert first <= parameter.grad.data_ptr() < first + memory.numel()
        assert mapping_of(first).startswith("/memfd:")
    trainer.close()


def mapping_of(address):
    with open("/proc/self/maps") as maps:
        for line in maps:
            start, stop = (int(number, 16) for number in line.split()[0].split("-"))
            if start <= address < stop:
                return line.split(maxsplit=5)[5]
    return ""


class Copies(TorchDispatchMode):
    """Record writes to the memory of a bucket."""

    def __init__(self, memory):
        super().__init__()
        self._range = range(memory.data_ptr(), memory.data_ptr() + memory.numel())
        self.num_elements = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if arguments and isinstance(arguments[0], torch.Tensor) and arguments[0].data_ptr() in self._range:
            if function._schema.is_mutable:
                self.num_elements.append(arguments[0].numel())
        return function(*arguments, **(keywords or {}))


@several
def test_one_copy(world):
    """Each gradient is written once; later only the reduction writes to it."""
    model = seeded(mlp)
    trainer = create_distributed_trainer(model)
    optimizer = sgd(model)
    x, y = batch()
    trainer.train_step(x, y, nn.MSELoss(), optimizer)
    with Copies(buckets_of(trainer)[0].memory.current.whole) as copies:
        trainer.train_step(x, y, nn.MSELoss(), optimizer)
    assert sorted(copies.num_elements) == sorted(parameter.numel() for parameter in model.parameters())
    trainer.close()


class Experts(nn.Module):
    """Each sample goes to one layer, so a rank uses only some layers, and no sample uses the last layer."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(5, 5).double() for _ in range(4))

    def forward(self, x, choice):
        parts = [expert(x[choice == i]) for i, expert in enumerate(self.experts) if (choice == i).any()]
        order = torch.cat([(choice == i).nonzero().flatten() for i in range(len(self.experts))])
        return torch.cat(parts)[order.argsort()]


@everywhere
def test_unused(world):
    """Parameters are unused on some ranks or on all, and on different ranks in each step."""
    model = seeded(Experts)
    trainer = create_distributed_trainer(model)
    optimizer = sgd(model)
    x, y = batch()
    for choice in ([0, 0, 0, 0, 1, 1, 2, 2], [0] * 8, [2, 2, 2, 1, 1, 1, 1, 0], [1, 0, 1, 0, 1, 0, 1, 0]):
        choice = torch.tensor(choice)
        reference = seeded(Experts)
        expected_loss = F.mse_loss(reference(x, choice), y)
        expected_loss.backward()
        loss = trainer.train_step((x, choice), y, nn.MSELoss(), optimizer)
        torch.testing.assert_close(loss, expected_loss.detach(), rtol=1e-12, atol=0)
        assert_same(dict(model.named_parameters()), {n: p.grad for n, p in reference.named_parameters()})
    assert model.experts[3].weight.grad is None
    trainer.close()


class Odd(nn.Module):
    """Model with a frozen, a shared, a 0-dimensional and an empty parameter."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(5, 5).double()
        self.frozen = nn.Linear(5, 5).double().requires_grad_(False)
        self.second = nn.Linear(5, 5, bias=False).double()
        self.second.weight = self.first.weight
        self.scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
        self.empty = nn.Parameter(torch.zeros(0, 3, dtype=torch.float64))

    def forward(self, x):
        return self.second(self.frozen(self.first(x)).tanh()) * self.scale + self.empty.sum()


@everywhere
def test_odd_parameters(world):
    model = seeded(Odd)
    trainer = create_distributed_trainer(model)
    x, y = batch(5)
    expected, _ = plain_step(Odd, x, y, nn.MSELoss())
    optimizer = sgd(model)
    for _ in range(2):
        trainer.train_step(x, y, nn.MSELoss(), optimizer)
        assert_same(dict(model.named_parameters()), expected)
        assert model.scale.grad.shape == ()
        assert model.frozen.weight.grad is None
    trainer.close()


@everywhere
def test_freezing_between_steps(world):
    """A parameter may be frozen and unfrozen as in plain torch; the memory of the old buckets is freed."""
    model = seeded(mlp)
    trainer = create_distributed_trainer(model)
    optimizer = sgd(model)
    x, y = batch()
    expected, _ = plain_step(mlp, x, y, nn.MSELoss())
    mapped = []
    for frozen in ([], ["0.weight", "4.bias"], ["4.bias"], []):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in frozen)
        for _ in range(2):
            trainer.train_step(x, y, nn.MSELoss(), optimizer)
            now = {name: None if name in frozen else gradient for name, gradient in expected.items()}
            assert_same(dict(model.named_parameters()), now)
        gc.collect()
        mapped.append(mapped_bytes())
    assert mapped[-1] == mapped[0]
    trainer.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@everywhere
def test_dtypes(world, dtype):
    """Gradients have the parameter's dtype and its precision; 16-bit sums do not overflow."""

    def make():
        return mlp(dtype=dtype)

    model = seeded(make)
    trainer = create_distributed_trainer(model)
    x, y = batch(9, dtype=dtype)
    expected, expected_loss = plain_step(make, x, y, nn.MSELoss())
    optimizer = sgd(model)
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 4e-2, torch.float16: 5e-3}[dtype]
    for _ in range(2):
        loss = trainer.train_step(x, y, nn.MSELoss(), optimizer)
        assert loss.dtype == dtype
        assert abs(loss - expected_loss) <= tolerance * expected_loss
        assert_same(dict(model.named_parameters()), expected, tolerance)
        assert {parameter.grad.dtype for parameter in model.parameters()} == {dtype}
        assert len(set(world.gather(tuple(bits(parameter.grad) for parameter in model.parameters())))) == 1
    trainer.close()


class Mixed(nn.Module):
    """Model with float32, float64 and bfloat16 parameters."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(5, 5, dtype=dtype) for dtype in (torch.bfloat16, torch.float64, torch.float32, torch.float64)
        )

    def forward(self, x):
        for layer in self.layers:
            x = layer(x.to(layer.weight.dtype)).tanh()
        return x


@everywhere
def test_mixed_dtypes(world):
    model = seeded(Mixed)
    trainer = create_distributed_trainer(model)
    x, y = batch(9)
    expected, _ = plain_step(Mixed, x, y, nn.MSELoss())
    optimizer = sgd(model)
    for _ in range(2):
        trainer.train_step(x, y, nn.MSELoss(), optimizer)
        assert_same({"": model.layers[3].weight}, {"": expected["layers.3.weight"]}, 1e-6)
        assert_same({"": model.layers[0].weight}, {"": expected["layers.0.weight"]}, 4e-2)
    assert len(buckets_of(trainer)) == (3 if world.size > 1 else 0)
    trainer.close()


@everywhere
def test_channels_last(world):
    """Gradients have the strides of their parameters."""

    def make():
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 5)).double().to(memory_format=layout)

    layout = torch.channels_last
    model = seeded(make)
    trainer = create_distributed_trainer(model)
    optimizer = sgd(model)
    x = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(1)).double().to(memory_format=layout)
    y = torch.arange(6) % 5
    expected, _ = plain_step(make, x, y, nn.CrossEntropyLoss())
    for _ in range(2):
        trainer.train_step(x, y, nn.CrossEntropyLoss(), optimizer)
        assert_same(dict(model.named_parameters()), expected)
        weight = model[0].weight
        assert weight.grad.stride() == weight.stride()
        assert weight.grad.is_contiguous(memory_format=layout)
    trainer.close()


@several
def test_layout_differs(world):
    """Ranks that freeze different parameters get the same error everywhere, with the parameter's name."""
    model = seeded(mlp)
    trainer = create_distributed_trainer(model)
    if world.rank == world.size - 1:
        model[2].weight.requires_grad_(False)
    x, y = batch()
    with pytest.raises(MismatchError) as error:
        trainer.train_step(x, y, nn.MSELoss(), sgd(model))
    (message,) = set(world.gather(str(error.value)))
    assert "2.weight" in message
    assert f"rank {world.size - 1} has" in message
    assert "without gradient" in message
    trainer.close()


@on_ranks(2, 3, 4)
def test_layout_differs_later(world):
    """Ranks that freeze different parameters later, when buckets are in use, get the same error."""
    model = seeded(mlp)
    trainer = create_distributed_trainer(model)
    optimizer = sgd(model)
    x, y = batch()
    trainer.train_step(x, y, nn.MSELoss(), optimizer)
    if world.rank == world.size - 1:
        model[2].weight.requires_grad_(False)
    with pytest.raises(MismatchError) as error:
        trainer.train_step(x, y, nn.MSELoss(), optimizer)
    (message,) = set(world.gather(str(error.value)))
    assert f"rank {world.size - 1}" in message
    trainer.close()


class Reentrant(nn.Module):
    """A weight whose gradient arrives in several backwards, with reentrant checkpointing."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 5).double()

    def forward(self, x):
        x = x.requires_grad_()
        return self.layer(checkpoint(self.layer, checkpoint(self.layer, x, use_reentrant=True), use_reentrant=True))


@several
def test_second_contribution(world):
    """A gradient that changes after its bucket was sent is an error, never a wrong sum."""
    model = seeded(Reentrant)
    trainer = create_distributed_trainer(model)
    optimizer = sgd(model)
    x, y = batch()
    expected, _ = plain_step(Reentrant, x.clone(), y, nn.MSELoss())
    trainer.train_step(x.clone(), y, nn.MSELoss(), optimizer)  # nothing is sent during the first backward
    assert_same(dict(model.named_parameters()), expected)
    with pytest.raises(DistributedTrainerError, match="use_reentrant=False"):
        trainer.train_step(x.clone(), y, nn.MSELoss(), optimizer)


@everywhere
def test_accumulation_outside(world):
    """The user's own backwards between steps do not change the step's gradients or the buckets."""
    model = seeded(mlp)
    trainer = create_distributed_trainer(model)
    optimizer = sgd(model)
    x, y = batch()
    expected, _ = plain_step(mlp, x, y, nn.MSELoss())
    for _ in range(3):
        trainer.train_step(x, y, nn.MSELoss(), optimizer)
        assert_same(dict(model.named_parameters()), expected)
        optimizer.zero_grad()
        F.mse_loss(model(x[world.rank : world.rank + 1]), y[world.rank : world.rank + 1]).backward()
    trainer.close()
