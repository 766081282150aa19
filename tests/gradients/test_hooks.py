# SPDX-License-Identifier: Apache-2.0
"""Users' functions that see gradients: which gradient they see, what is refused, and what rank 0 warns of."""

import logging

import pytest
import torch
import torch.nn.functional as F
from ranks import mixed, on_ranks, same_message
from small_models import F64, Net, batch, own_loss, sgd
from torch import nn

from distributed_trainer import create_distributed_trainer
from distributed_trainer.gradients.hooks import ParameterHooks

several = on_ranks(2, 3, (3, 2))


def step(trainer, optimizer, seed=0, **options):
    return trainer.train_step(*batch(7, F64, seed), nn.CrossEntropyLoss(), optimizer, **options)


def clamped(gradient):
    return gradient.clamp(-0.01, 0.01)


@pytest.mark.parametrize("options", [{}, {"reproducible": 4}, {"nonfinite_gradients": "skip"}], ids=str)
@mixed
def test_sum(world, options):
    """A function sees the sum over ranks and microbatches once; what it returns is what clipping sees."""
    model, plain = Net(F64), Net(F64)
    trainer = create_distributed_trainer(model, **options)
    seen = []
    trainer.on_gradient(model.conv.weight, lambda gradient: seen.append(gradient.clone()))
    trainer.on_gradient(model.conv.weight, clamped)
    x, y = batch(7, F64, 0)
    F.cross_entropy(plain(x), y).backward()
    step(trainer, sgd(model), microbatches=1 if "reproducible" in options else 2, clip_norm=1e9)
    torch.testing.assert_close(seen, [plain.conv.weight.grad], rtol=1e-11, atol=0)
    plain.conv.weight.grad = clamped(plain.conv.weight.grad)
    norm = nn.utils.get_total_norm([parameter.grad for parameter in plain.parameters()])
    torch.testing.assert_close(trainer.gradient_norm, norm, rtol=1e-11, atol=0)
    trainer.close()


@mixed
def test_accumulation(world):
    """In a manual loop a function sees each exchange's sum, without what was in `.grad` before, as torch's hooks do."""
    model, plain = Net(F64), Net(F64)
    trainer = create_distributed_trainer(model)
    handle = trainer.on_gradient(model.conv.weight, clamped)
    plain_handle = plain.conv.weight.register_hook(clamped)
    for seed in range(3):
        x, y = batch(7, F64, seed)
        F.cross_entropy(plain(x), y).backward()
        trainer.backward(*own_loss(trainer, model, x, y))
        for ours, expected in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, expected.grad, rtol=1e-10, atol=1e-14)
        if seed == 1:
            handle.remove()
            plain_handle.remove()
    trainer.close()


@mixed
def test_wrong_arguments(world):
    model = Net(F64)
    trainer = create_distributed_trainer(model)
    for parameter, function, error, text in [
        (torch.zeros(2), len, TypeError, "must be an nn.Parameter, not Tensor"),
        (nn.Parameter(torch.zeros(2)), len, ValueError, "not one of the model"),
        (model.conv.weight, 3, TypeError, "function must be callable, not 3"),
    ]:
        with pytest.raises(error, match=text):
            trainer.on_gradient(parameter, function)
    handle = trainer.on_gradient(model.conv.weight, lambda gradient: gradient[:1])
    before = model.conv.weight.detach().clone()
    with pytest.raises(ValueError, match=r"shape \[3, 2, 3, 3\], not shape \[1, 2, 3, 3\]") as raised:
        step(trainer, sgd(model))
    same_message(world, raised)
    assert torch.equal(model.conv.weight, before)
    handle.remove()
    step(trainer, sgd(model))
    trainer.close()
    with pytest.raises(ValueError, match="was closed"):
        trainer.on_gradient(model.conv.weight, clamped)
    trainer = create_distributed_trainer(model, shard="optimizer")
    with pytest.raises(ValueError, match='does not work with shard="optimizer"'):
        trainer.on_gradient(model.conv.weight, clamped)
    trainer.close()


@several
def test_hook_of_one_rank(world, caplog):
    """A watching hook of rank 0 works, with one warning. A hook that changes a gradient on any rank ends every rank."""
    model = Net(F64)
    trainer = create_distributed_trainer(model)
    optimizer = sgd(model)
    handles = []
    if world.rank == 0:
        watch = [(model.conv.weight, print), (model.linear.weight, lambda gradient: gradient)]
        handles = [parameter.register_hook(hook) for parameter, hook in watch]
    with caplog.at_level(logging.WARNING, "distributed_trainer"):
        for seed in range(2):
            step(trainer, optimizer, seed)
    warnings = [
        record.getMessage() for record in caplog.records if "sees the gradient of this rank's" in record.message
    ]
    assert len(warnings) == (world.rank == 0)
    assert all(text.startswith("the hook print on conv.weight sees") for text in warnings)
    for handle in handles:
        handle.remove()
    if world.rank == world.size - 1:
        handles = [model.linear.bias.register_hook(lambda gradient: gradient.add_(1))]
    before = model.linear.bias.detach().clone()
    with pytest.raises(ValueError, match=r"the hook .*<lambda> on linear.bias has changed the gradient") as raised:
        step(trainer, optimizer)
    same_message(world, raised)
    assert torch.equal(model.linear.bias, before)
    if world.rank == world.size - 1:
        handles[0].remove()
    step(trainer, optimizer)
    trainer.close()


@mixed
def test_hooks_stay_the_users(world):
    """After `close` a parameter has the hooks that it had."""
    model = Net(F64)
    trainer = create_distributed_trainer(model)
    model.conv.weight.register_hook(print)
    step(trainer, sgd(model))
    trainer.close()
    assert list(model.conv.weight._backward_hooks.values()) == [print]


@several
def test_parameters_are_read_once(world, monkeypatch):
    """Parameters are read again for a hook of the user's, but not for those that a manual loop itself registers."""
    model = nn.Sequential(nn.Linear(3, 2, dtype=F64), nn.BatchNorm1d(2, dtype=F64))
    trainer = create_distributed_trainer(model)
    read = []
    find = ParameterHooks._find
    monkeypatch.setattr(ParameterHooks, "_find", lambda self, *named: read.append(named[0]) or find(self, *named))

    def names_read():
        read.clear()
        x = torch.randn(8, 3, dtype=F64)
        with trainer.forward():
            loss = model(trainer.split(x)).square().sum()
        trainer.backward(loss, weight=None)
        return read

    assert names_read() == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert names_read() == []
    handle = model[0].weight.register_hook(lambda gradient: None)
    assert len(names_read()) == 4
    handle.remove()
    trainer.close()


@on_ranks(1)
def test_one_rank(world):
    """With one rank a hook acts as in plain torch, unless the batch is cut into microbatches."""
    model = Net(F64)
    trainer = create_distributed_trainer(model)
    model.conv.weight.register_hook(clamped)
    step(trainer, optimizer := sgd(model))
    with pytest.raises(ValueError, match=r"the hook clamped on conv.weight has changed"):
        step(trainer, optimizer, microbatches=2)
    trainer.close()


@several
def test_post_accumulate_hook_of_one_rank(world):
    """A hook after accumulation is refused on every rank, before forward; two trainers' own hooks are not."""
    model = Net(F64)
    trainer, other = create_distributed_trainer(model), create_distributed_trainer(model)
    for each in (trainer, other):
        step(each, sgd(model))
    if world.rank == 1:
        handle = model.linear.weight.register_post_accumulate_grad_hook(print)
    for train in (lambda: step(trainer, sgd(model)), lambda: trainer.backward(model(batch(4, F64)[0]).sum(), weight=1)):
        with pytest.raises(
            ValueError, match=r"the hook print runs after the gradient of linear.weight is acc"
        ) as raised:
            train()
        same_message(world, raised)
    if world.rank == 1:
        handle.remove()
    step(trainer, sgd(model))
    trainer.close()
    other.close()
