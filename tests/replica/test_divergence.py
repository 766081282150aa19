# SPDX-License-Identifier: Apache-2.0
"""Divergence check: weights that only some ranks have changed are found and reported by name and rank."""

import copy

import pytest
import torch
import torch.nn.functional as F
from one_process import assert_same
from ranks import on_ranks, same_message
from small_models import F64, Net, batch, sgd
from torch import nn

from distributed_trainer import MismatchError, create_distributed_trainer
from distributed_trainer.replica import divergence


@pytest.fixture
def every_third(monkeypatch):
    monkeypatch.setattr(divergence, "EVERY_STEPS", 3)


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
    """Change one bit of one weight on the last rank: the next comparison raises the same error on every rank."""
    # Machines with unequal numbers of ranks would have different numbers of threads.
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
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
    assert text.startswith("weights have drifted apart before step 6: ")
    assert f" on rank(s) {culprit} differs from " in text
    assert " on rank 0. Something has changed it on some ranks only" in text
    assert set(world.gather(text)) == {text}
    trainer.close()


@on_ranks(3)
def test_tolerance(world, every_third, monkeypatch):
    """Rounding differences between processors are accepted; a weight that differs by more is found."""
    monkeypatch.setattr(divergence, "instruction_sets", lambda: f"CPU {world.rank % 2}")
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
    with pytest.raises(MismatchError, match=r"conv.weight on rank\(s\) 1 differs from conv.weight"):
        train(trainer, 5, "train_step", optimizer)
    trainer.close()


@pytest.mark.parametrize("loop", ["train_step", "own loop"])
@on_ranks(2, 3, (3, 2))
def test_first_steps_and_end(world, monkeypatch, loop):
    """A difference is found in step 1 before a weight changes, in step 2 if the optimizers differ, and by `close`."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    model = Net(F64)
    trainer = create_distributed_trainer(model)
    with torch.no_grad():
        model.linear.bias.add_(world.rank)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(MismatchError, match=r"weights have drifted apart before step 1: 1 of 4 parameters"):
        train(trainer, 0, loop, sgd(model))
    assert_same(model.state_dict(), before, rtol=0)
    trainer.close()  # the difference was reported
    trainer = create_distributed_trainer(model)
    optimizer = sgd(model, lr=0.1 + world.rank)
    train(trainer, 0, loop, optimizer)
    with pytest.raises(MismatchError, match=r"weights have drifted apart before step 2: 4 of 4 parameters"):
        train(trainer, 1, loop, optimizer)
    trainer.close()
    trainer = create_distributed_trainer(model)
    for step in range(3):
        train(trainer, step, loop, optimizer := sgd(model))
    if world.rank == 1:
        with torch.no_grad():
            model.linear.bias.add_(1)
    with pytest.raises(MismatchError, match=r"weights have drifted apart at the end: 1 of 4 parameters") as raised:
        trainer.close()
    same_message(world, raised)


class SetByFirstBatch(nn.Module):
    """Layer whose scale the first batch sets."""

    def __init__(self):
        super().__init__()
        self.net = Net(F64)
        self.scale = nn.Parameter(torch.zeros((), dtype=F64))

    def forward(self, x):
        if not self.scale:
            with torch.no_grad():
                self.scale.copy_(1 / x.std())
        return self.net(x * self.scale)


@pytest.mark.parametrize("loop", ["train_step", "manual"])
@on_ranks(1, 2, 3, (3, 2))
def test_forward_sets_a_weight(world, monkeypatch, loop):
    """A weight that forward sets from each rank's part is refused before the optimizer steps."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    model = SetByFirstBatch()
    trainer = create_distributed_trainer(model)
    before = copy.deepcopy(model.net.state_dict())

    def step():
        x, y = batch(8, F64)
        if loop == "train_step":
            trainer.train_step(x, y, nn.CrossEntropyLoss(), sgd(model))
        else:
            own_x, own_y = trainer.split((x, y))
            with trainer.forward():
                loss = F.cross_entropy(model(own_x), own_y)
            trainer.backward(loss, weight=len(own_y))
            trainer.step(sgd(model))

    if world.size == 1:
        step()
    else:
        text = r"forward or backward has written to weights: 1 of 5 parameters and buffers are not .* scale on rank"
        with pytest.raises(MismatchError, match=text):
            step()
        assert_same(model.net.state_dict(), before, rtol=0)
    trainer.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64, torch.int8])
@pytest.mark.parametrize("num_elements", [0, 1, 7, 8, 1001])
def test_sum_of_bits(dtype, num_elements):
    """Each bit of a tensor changes the sum, at every alignment and with every stride."""
    storage = torch.zeros(num_elements + 3).to(dtype)
    for start in (0, 1):
        tensor = storage[start : start + num_elements]
        before = divergence.sum_of_bits(tensor)
        for index in {0, num_elements // 2, num_elements - 1} if num_elements else ():
            tensor[index] = 1
            assert divergence.sum_of_bits(tensor) != before
            tensor[index] = 0
        assert divergence.sum_of_bits(tensor) == before
    image = torch.randn(2, 3, 5, 7)
    assert divergence.sum_of_bits(image.to(memory_format=torch.channels_last)) == divergence.sum_of_bits(image)
