# SPDX-License-Identifier: Apache-2.0
"""Weights that some ranks have changed by themselves are found, by name and rank."""

import pytest
import torch
import torch.nn.functional as F
from ranks import on_ranks
from test_exactness import F64, Net, batch
from test_microbatches import sgd
from torch import nn

from distributed_trainer import MismatchError, create_distributed_trainer, drift


@pytest.fixture
def every_third(monkeypatch):
    monkeypatch.setattr(drift, "EVERY_STEPS", 3)


def train(trainer, step, loop, optimizer):
    x, y = batch(8, F64, step)
    if loop == "train_step":
        trainer.train_step(x, y, nn.CrossEntropyLoss(), optimizer)
    else:
        optimizer.zero_grad()
        trainer.backward(F.cross_entropy(trainer.model(x), y), weight=1)
        trainer.step(optimizer)


@pytest.mark.parametrize("loop", ["train_step", "own loop"])
@on_ranks(1, 2, (3, 2))
def test_drift(world, every_third, monkeypatch, loop):
    """One bit of one weight, on the last rank: the same sentence on every rank, at the next comparison."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # on machines with unequal numbers of ranks it differs
    model = Net(F64)
    trainer = create_distributed_trainer(model)
    optimizer = sgd(model)
    for step in range(4):
        train(trainer, step, loop, optimizer)
    culprit = world.size - 1
    if world.rank == culprit:
        bits = model.linear.bias.detach().view(torch.int64)
        bits[1] ^= 1 << 3
    train(trainer, 4, loop, optimizer)
    if world.size == 1:
        train(trainer, 5, loop, optimizer)
        trainer.close()
        return
    with pytest.raises(MismatchError) as raised:
        train(trainer, 5, loop, optimizer)
    text = str(raised.value)
    assert text.startswith("weights have drifted apart: after step 6 ")
    assert f"is another on rank(s) {culprit} than on rank 0" in text
    assert set(world.gather(text)) == {text}
    trainer.close()


@on_ranks(3)
def test_tolerance(world, every_third, monkeypatch):
    """Other processors round otherwise, which is no drift; a rank that goes another way is one."""
    monkeypatch.setattr(drift, "instruction_sets", lambda: f"CPU {world.rank % 2}")
    model = Net(F64)
    trainer = create_distributed_trainer(model)
    optimizer = sgd(model)
    with torch.no_grad():
        model.conv.weight.mul_(1 + 1e-7 * world.rank)
    for step in range(4):
        train(trainer, step, "train_step", optimizer)
    with torch.no_grad():
        model.conv.weight.mul_(2.0 if world.rank == 1 else 1.0)
    train(trainer, 4, "train_step", optimizer)
    with pytest.raises(MismatchError, match=r"conv.weight is another on rank\(s\) 1 than"):
        train(trainer, 5, "train_step", optimizer)
    trainer.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64, torch.int8])
@pytest.mark.parametrize("num_elements", [0, 1, 7, 8, 1001])
def test_sum_of_bits(dtype, num_elements):
    """Every bit counts, wherever the tensor begins and however it lies."""
    storage = torch.zeros(num_elements + 3).to(dtype)
    for start in (0, 1):
        tensor = storage[start : start + num_elements]
        before = drift._sum_of_bits(tensor)
        for index in {0, num_elements // 2, num_elements - 1} if num_elements else ():
            tensor[index] = 1
            assert drift._sum_of_bits(tensor) != before
            tensor[index] = 0
        assert drift._sum_of_bits(tensor) == before
    image = torch.randn(2, 3, 5, 7)
    assert drift._sum_of_bits(image.to(memory_format=torch.channels_last)) == drift._sum_of_bits(image)
