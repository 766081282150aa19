# SPDX-License-Identifier: Apache-2.0
"""Weight gradients computed in their places: with the bits of autograd, and only where these are certain."""

import copy

import pytest
import torch
import torch.nn.functional as F
from internals import gradients_of
from ranks import on_ranks
from small_models import F64, regression_batch
from torch import nn
from torch.utils.checkpoint import checkpoint

from distributed_trainer import create_distributed_trainer
from distributed_trainer.gradients import direct_linear, layout

several = on_ranks(2, 3, (2, 1))


@pytest.fixture(autouse=True)
def any_size(monkeypatch):
    """Compute gradients of all layers in place, with a bucket for each parameter, sent when its gradient is ready."""
    monkeypatch.setattr(direct_linear, "MIN_BYTES", 0)
    monkeypatch.setattr(layout, "BUCKET_BYTES", 1)


class Net(nn.Module):
    """Layers for subclasses, each of which uses them in its own way."""

    def __init__(self, dtype=F64):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 6, dtype=dtype)
        self.second = nn.Linear(6, 6, bias=False, dtype=dtype)
        self.last = nn.Linear(6, 4, dtype=dtype)

    def forward(self, x):
        return self.last(torch.tanh(self.second(torch.tanh(self.first(x)))))


def train(world, model, criterion=None, dtype=F64, shape=(6,), num_steps=3):
    """Return the gradients of the last of some steps, and the names of the parameters that were not copied in it."""
    trainer = create_distributed_trainer(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    copied = set()
    take = gradients_of(trainer)._take

    def recorded(state):
        gradient, view = state.parameter.grad, state.view
        if gradient is not None and view is not None and gradient.data_ptr() != view.data_ptr():
            copied.add(state.name)
        take(state)

    gradients_of(trainer)._take = recorded
    x, y = regression_batch(dtype=dtype, inputs=shape, outputs=(*shape[:-1], 4))
    for _ in range(num_steps):
        copied.clear()
        trainer.train_step(x, y, criterion or nn.MSELoss(), optimizer)
    result = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    trainer.close()
    assert F.linear is torch._C._nn.linear
    return result, set(result) - copied


def compare(world, monkeypatch, make, expected_names, **options):
    """Check that the same training through autograd has the same bits."""
    actual, in_place = train(world, make(), **options)
    assert in_place == expected_names
    with monkeypatch.context() as patch:
        patch.setattr(direct_linear, "MIN_BYTES", 1 << 40)
        reference, none = train(world, make(), **options)
    assert not none
    for name, gradient in reference.items():
        assert torch.equal(actual[name], gradient), name


ALL = {"first.weight", "second.weight", "last.weight"}


@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 3, 6)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16], ids=str)
@several
def test_bits(world, monkeypatch, dtype, shape):
    compare(world, monkeypatch, lambda: Net(dtype), ALL, dtype=dtype, shape=shape)


@several
def test_switch(world, monkeypatch):
    monkeypatch.setenv("DTRAIN_DIRECT_GRADIENTS", "off")
    compare(world, monkeypatch, Net, set())


class TwiceUsed(Net):
    def forward(self, x):
        return super().forward(torch.tanh(self.second(x)))


class Shared(Net):
    def __init__(self):
        super().__init__()
        self.second.weight = self.first.weight


class UsedOutside(Net):
    """A weight that is also used outside of its layer: the gradient is a sum of three, added in autograd's order."""

    def forward(self, x):
        return super().forward(x) + x @ self.last.weight.t() + torch.sin(x) @ self.last.weight.t()


class Hooked(Net):
    def __init__(self):
        super().__init__()
        self.first.weight.register_hook(lambda gradient: None)


class OwnForward(Net):
    def __init__(self):
        super().__init__()
        self.first.forward = lambda x: 2 * F.linear(x, self.first.weight, self.first.bias)


class Subclass(Net):
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    def __init__(self):
        super().__init__()
        self.first = self.Scaled(6, 6, dtype=F64)


class Autocast(Net):
    def __init__(self):
        super().__init__(torch.float32)

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            x = self.first(x)
        return self.last(torch.tanh(self.second(torch.tanh(x.float()))))


class Transformed(Net):
    def forward(self, x):
        x = torch.func.vmap(self.first)(x)
        return self.last(torch.tanh(self.second(torch.tanh(x))))


class Checkpointed(Net):
    def forward(self, x):
        x = checkpoint(self.first, x, use_reentrant=False)
        return self.last(torch.tanh(self.second(torch.tanh(x))))


class Functional(Net):
    """A functional call replaces the layer's weight by another tensor."""

    def forward(self, x):
        weight = {"weight": 2 * self.first.weight, "bias": self.first.bias}
        x = torch.func.functional_call(self.first, weight, (x,))
        return self.last(torch.tanh(self.second(torch.tanh(x))))


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (UsedOutside, ALL - {"last.weight"}),
        (TwiceUsed, ALL - {"second.weight"}),
        (Shared, {"last.weight"}),
        (Hooked, ALL - {"first.weight"}),
        (OwnForward, ALL),
        (Subclass, ALL),
        (Transformed, ALL - {"first.weight"}),
        (Checkpointed, ALL),
        (Functional, ALL - {"first.weight"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@several
def test_through_autograd(world, monkeypatch, make, names):
    torch.manual_seed(0)
    state = copy.deepcopy(make().state_dict())

    def same():
        model = make()
        model.load_state_dict(state)
        return model

    compare(world, monkeypatch, same, names)


@several
def test_autocast(world, monkeypatch):
    compare(world, monkeypatch, Autocast, ALL - {"first.weight"}, dtype=torch.float32)


class Attention(nn.Module):
    """Layers of a transformer, whose attention multiplies its weights without calling a module."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.last = nn.Linear(6, 4)

    def forward(self, x):
        return self.last(self.layers(x))


@several
def test_attention(world, monkeypatch):
    matrices = {name for name, parameter in Attention().named_parameters() if parameter.dim() == 2}
    assert len(matrices) == 9
    compare(world, monkeypatch, Attention, matrices, dtype=torch.float32, shape=(5, 6))


class Compiled(Net):
    def __init__(self):
        super().__init__()
        self.second = torch.compile(self.second, backend="eager")


@several
def test_compiled(world, monkeypatch):
    compare(world, monkeypatch, Compiled, {"first.weight", "last.weight"})
    compare(world, monkeypatch, lambda: nn.Sequential(torch.compile(Net(), backend="eager")), set())


class Reentrant(Net):
    """Two backwards run in the backward: in the first the weight is used as a matrix, in the second in its layer."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6, dtype=F64))

    def forward(self, x):
        x = checkpoint(self.first, x * self.scale, use_reentrant=True)
        x = checkpoint(lambda x: x @ self.first.weight.t(), torch.tanh(x), use_reentrant=True)
        return self.last(torch.tanh(self.second(torch.tanh(x))))


@several
def test_reentrant(world, monkeypatch):
    monkeypatch.setattr(layout, "BUCKET_BYTES", 1 << 20)  # one bucket, not sent before the second gradient
    compare(world, monkeypatch, Reentrant, ALL - {"first.weight"})


@pytest.mark.parametrize(("create_graph", "names"), [(True, set()), (False, ALL)])
@several
def test_gradients_in_a_criterion(world, monkeypatch, create_graph, names):
    """A gradient penalty (double backward), and a gradient that the criterion computes but does not use."""
    inputs = []

    class Kept(Net):
        def forward(self, x):
            inputs[:] = [x.requires_grad_()]
            return super().forward(x)

    def criterion(outputs, targets):
        (slope,) = torch.autograd.grad(outputs.sum(), inputs, create_graph=create_graph, retain_graph=True)
        return (outputs - targets).square().mean() + slope.square().mean()

    compare(world, monkeypatch, Kept, names, criterion=criterion)
