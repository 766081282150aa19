# SPDX-License-Identifier: Apache-2.0
"""Tensors besides the model's parameters that get gradients: found when they appear, and what other trainers may do."""

import pytest
import torch
import torch.nn.functional as F
from one_process import assert_same
from ranks import mixed, on_ranks, same_message
from small_models import F64, Net, batch, mlp, own_loss, regression_batch, sgd
from torch import nn

from distributed_trainer import create_distributed_trainer

several = on_ranks(2, 3, (3, 2))


@mixed
def test_later(world):
    """A criterion with a parameter is refused in its first step, also if that is a later one of the training."""
    model = Net(F64)
    trainer = create_distributed_trainer(model)
    optimizer, scale = sgd(model), nn.Parameter(torch.ones(4, dtype=F64))
    for step in range(3):
        trainer.train_step(*batch(6, F64, step), nn.CrossEntropyLoss(), optimizer)
    before = model.linear.weight.detach().clone()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"a parameter of shape \[4\] gets a gradient in this backward") as raised:
            trainer.train_step(*batch(6, F64), lambda outputs, y: F.cross_entropy(outputs * scale, y), optimizer)
        same_message(world, raised)
    assert torch.equal(model.linear.weight, before)
    trainer.close()


def generator_loss(generator, discriminator, x):
    return F.softplus(-discriminator(generator(x))).mean()


@mixed
def test_two_trainers(world):
    """The generator's loss may pass through the discriminator, if what it leaves there is cleared."""
    models = [[mlp(3, 4, 2, seed=1), mlp(2, 4, 1, seed=2)] for _ in range(2)]
    (generator, discriminator), (plain_generator, plain_discriminator) = models
    trainers = [create_distributed_trainer(model) for model in (generator, discriminator)]
    optimizers, plain_optimizers = [[sgd(model) for model in pair] for pair in models]
    for step in range(3):
        x, real = regression_batch(7, step, inputs=3, outputs=2)
        part, own_real = trainers[0].split((x, real))
        weight = len(part)
        plain_optimizers[0].zero_grad()
        generator_loss(plain_generator, plain_discriminator, x).backward()
        plain_optimizers[0].step()
        plain_optimizers[1].zero_grad()
        F.softplus(-plain_discriminator(real)).mean().backward()
        plain_optimizers[1].step()
        optimizers[0].zero_grad()
        trainers[0].backward(generator_loss(generator, discriminator, part), weight=weight)
        trainers[0].step(optimizers[0])
        optimizers[1].zero_grad()
        trainers[1].backward(F.softplus(-discriminator(own_real)).mean(), weight=weight)
        trainers[1].step(optimizers[1])
    assert_same(nn.ModuleList(models[0]), nn.ModuleList(models[1]), 1e-10)
    for trainer in trainers:
        trainer.close()


@pytest.mark.parametrize("call", ["backward", "step"])
@several
def test_unsummed(world, call):
    """Refuse what another trainer's backward left in `.grad`, since the ranks have not added it."""
    generator, discriminator = mlp(3, 4, 2, seed=1), mlp(2, 4, 1, seed=2)
    trainers = [create_distributed_trainer(model) for model in (generator, discriminator)]
    x, real = regression_batch(7, 0, inputs=3, outputs=2)
    part, own_real = trainers[0].split((x, real))
    for _ in range(2):  # the second graph is known already
        trainers[0].backward(generator_loss(generator, discriminator, part), weight=len(part))
        discriminator.zero_grad()
        trainers[1].backward(discriminator(own_real).mean(), weight=len(part))
        discriminator.zero_grad()
    trainers[0].backward(generator_loss(generator, discriminator, part), weight=len(part))
    before = discriminator[0].weight.detach().clone()
    with pytest.raises(ValueError, match=r"\.grad of .* holds gradients of another trainer's") as raised:
        if call == "backward":
            trainers[1].backward(discriminator(own_real).mean(), weight=len(part))
        else:
            trainers[1].step(sgd(discriminator))
    same_message(world, raised)
    assert torch.equal(discriminator[0].weight, before)
    for trainer in trainers:
        trainer.close()


@mixed
def test_inputs_of_a_part(world):
    """In a manual loop inputs get the gradient by this rank's samples, the same as in one process."""
    model, plain = Net(F64), Net(F64)
    trainer = create_distributed_trainer(model)
    x, y = batch(7, F64)
    whole = x.clone().requires_grad_()
    F.cross_entropy(plain(whole), y).backward()
    own_x, own_y = trainer.split((x, y))
    own_x.requires_grad_()
    trainer.backward(F.cross_entropy(model(own_x), own_y), weight=len(own_y))
    torch.testing.assert_close(own_x.grad, trainer.split(whole.grad), rtol=1e-11, atol=1e-16)
    trainer.close()


@mixed
def test_split_of_inputs_with_gradients(world):
    """Parts of inputs that require a gradient require one each; the whole has none."""
    model = Net(F64)
    trainer = create_distributed_trainer(model)
    x, y = batch(6, F64)
    x.requires_grad_()
    own_x, own_y = trainer.split((x, y))
    trainer.backward(F.cross_entropy(model(own_x), own_y), weight=len(own_y))
    assert x.grad is None
    assert own_x.grad.abs().sum() > 0
    trainer.backward(*own_loss(trainer, model, *batch(6, F64)))
    trainer.close()
