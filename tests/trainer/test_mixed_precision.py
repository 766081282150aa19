# SPDX-License-Identifier: Apache-2.0
"""Autocast, GradScaler and 16-bit parameters on several ranks, compared with one process."""

import copy

import pytest
import torch
import torch.nn.functional as F
from one_process import relative_difference
from ranks import on_ranks
from small_models import Net, batch, own_loss, sgd
from torch import nn

from distributed_trainer import create_distributed_trainer

some = on_ranks(1, 2, 3, (4, 2))
F32 = torch.float32


@pytest.mark.parametrize("own_loop", [False, True], ids=["train_step", "own loop"])
@some
def test_autocast(world, own_loop):
    """Products are bfloat16, weights float32. The samples that a rank multiplies together change the rounding."""
    model, reference = Net(F32), Net(F32)
    trainer = create_distributed_trainer(model)
    optimizer, plain_optimizer = sgd(model), sgd(reference)
    for step in range(4):
        x, y = batch(12, F32, step)
        plain_optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            expected = F.cross_entropy(reference(x), y)
        expected.backward()
        plain_optimizer.step()
        if own_loop:
            with trainer.forward(), torch.autocast("cpu", torch.bfloat16):
                loss, weight = own_loss(trainer, model, x, y)
            optimizer.zero_grad()
            loss = trainer.backward(loss, weight=weight)
            trainer.step(optimizer)
        else:
            with torch.autocast("cpu", torch.bfloat16):
                loss = trainer.train_step(x, y, nn.CrossEntropyLoss(), optimizer)
        torch.testing.assert_close(loss, expected.detach(), rtol=2e-2, atol=0)
    for (name, parameter), other in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert parameter.dtype == F32
        assert relative_difference(parameter.detach(), other.detach()) < 1e-2, name
    trainer.close()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@some
def test_many_tokens(world, dtype):
    """With 10,000 tokens a rank, the sum of their gradients is more than float16 holds, but their mean is small."""
    torch.manual_seed(0)
    model = nn.Linear(4, 2, dtype=dtype)
    reference = copy.deepcopy(model).float()
    num_tokens = 10000 * world.size
    x = 8 + torch.rand(num_tokens, 4)
    y = torch.full((num_tokens, 2), -4.0)
    F.mse_loss(reference(x.to(dtype).float()), y).backward()
    assert reference.weight.grad.abs().max() * 10000 > 5 * 65504
    trainer = create_distributed_trainer(model)
    loss = trainer.train_step(x.to(dtype), y.to(dtype), nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=0.0))
    assert torch.isfinite(loss)
    tolerance = 1e-2 if dtype == torch.float16 else 3e-2
    assert relative_difference(model.weight.grad.float(), reference.weight.grad) < tolerance
    trainer.close()


@some
def test_scaler_with_float16(world):
    """If one rank's part overflows, the scale falls on every rank in that step, and the weights stay equal."""
    model = Net(F32)
    trainer = create_distributed_trainer(model)
    optimizer = sgd(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**15, growth_interval=100)
    scales = []
    for step in range(5):
        x, y = batch(12, F32, step)
        if step == 2:
            x[11] = 1e30  # in the last rank's part
        optimizer.zero_grad()
        with trainer.forward(), torch.autocast("cpu", torch.float16):
            loss, weight = own_loss(trainer, model, x, y)
        trainer.backward(scaler.scale(loss.float()), weight=weight)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert scales[1] > scales[2] == scales[4]
    assert len(set(map(str, world.gather(scales)))) == 1
    weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    assert all(torch.equal(weights, other) for other in world.gather(weights))
    trainer.close()
