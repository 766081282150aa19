# SPDX-License-Identifier: Apache-2.0
"""Buffers on several ranks: what is copied, refused and warned of. tests/compatibility/test_buffers.py has the rest."""

import copy
import logging

import pytest
import torch
import torch.distributed as dist
from one_process import accumulated_step, assert_same
from ranks import on_ranks
from small_models import F64, regression_batch, sgd
from torch import nn

from distributed_trainer import MismatchError, create_distributed_trainer
from distributed_trainer.replica import divergence
from distributed_trainer.replica.buffer_rules import match_rules
from distributed_trainer.replica.model_state import Buffers, StepSnapshot


class Net(nn.Module):
    """Model whose forward calls `update(model, x)` first."""

    def __init__(self, update, **buffers):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 2, dtype=F64)
        self.update = update
        for name, value in buffers.items():
            self.register_buffer(name, value)

    def forward(self, x):
        self.update(self, x.detach())
        return self.linear(x)


def average(model, x):
    model.center.mul_(0.9).add_(x.mean(0), alpha=0.1)


def keep(model, x):
    model.rows = x


def center():
    return torch.ones(4, dtype=F64)


def step(trainer, optimizer, number=0, num_samples=7, **options):
    return trainer.train_step(
        *regression_batch(num_samples, number, inputs=4, outputs=2), nn.MSELoss(), optimizer, **options
    )


class Reading(Net):
    """Model whose next microbatch reads what the last one has left in the buffers."""

    def __init__(self):
        super().__init__(None, center=center(), rows=torch.zeros(0, 4, dtype=F64))

    def forward(self, x):
        x_now = x.detach()
        output = self.linear(x * self.center + self.rows.sum(0) / 10)
        self.center.data.mul_(0.9).add_(x_now.mean(0), alpha=0.1)
        self.rows = x_now
        return output


RULES = {"center": "mean", "rows": "gather"}


@on_ranks(1, 2, 3, (3, 2))
def test_microbatches(world):
    """The rules act after each microbatch, whose parts may be empty or have unequal sizes."""
    model = Reading()
    reference = copy.deepcopy(model)
    trainer = create_distributed_trainer(model, buffers=RULES)
    optimizer, other = sgd(model), sgd(reference)
    for number in range(3):
        batch = regression_batch(7, number, inputs=4, outputs=2)
        trainer.train_step(*batch, nn.MSELoss(), optimizer, microbatches=4)
        accumulated_step(reference, batch, 4, len, nn.MSELoss(), other)
    trainer.close()
    assert_same(model, reference)


@on_ranks(2, 3)
def test_no_sync(world):
    """The same in a manual loop that accumulates gradients."""
    model = Reading()
    reference = copy.deepcopy(model)
    trainer = create_distributed_trainer(model, buffers=RULES)
    optimizer, other = sgd(model), sgd(reference)
    batch = regression_batch(8, inputs=4, outputs=2)
    accumulated_step(reference, batch, 2, len, nn.MSELoss(), other)
    for number in (0, 1):
        x, y = trainer.split([tensor[number * 4 : number * 4 + 4] for tensor in batch])
        with trainer.forward():
            loss = nn.functional.mse_loss(model(x), y) / 2
        if number == 0:
            with trainer.no_sync():
                trainer.backward(loss, weight=len(x))
        else:
            trainer.backward(loss, weight=len(x))
    trainer.step(optimizer)
    trainer.close()
    assert_same(model, reference)


@on_ranks(2)
def test_group_of_torch(world, shared_folder):
    """The rules, and buffers that are pickled, over a group of gloo."""
    store = dist.FileStore(str(shared_folder / "store"), world.size)
    dist.init_process_group("gloo", store=store, rank=world.rank, world_size=world.size)

    def update(model, x):
        average(model, x)
        keep(model, x)
        model.count += 1
        model.sparse = (model.sparse.to_dense() * 2).to_sparse()

    buffers = {"center": center(), "rows": None, "count": torch.zeros(()), "sparse": torch.eye(3).to_sparse()}
    model = Net(update, **buffers)
    reference = copy.deepcopy(model)
    with create_distributed_trainer(model, group=dist.group.WORLD, buffers=RULES) as trainer:
        step(trainer, sgd(model))
    reference(regression_batch(7, 0, inputs=4, outputs=2)[0])
    for (name, found), expected in zip(model.named_buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(found.to_dense(), expected.to_dense(), msg=name)
    dist.destroy_process_group()


def warnings_of(train):
    """Return the warnings that a function gives."""
    records = []
    logger = logging.getLogger("distributed_trainer")
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logger.addHandler(handler)
    try:
        train()
    finally:
        logger.removeHandler(handler)
    return [text for text in records if "buffer" in text]


@pytest.mark.parametrize("rules", [None, {"center": "first"}, {"center": "mean"}])
@on_ranks(1, 2, 3)
def test_warning(world, rules):
    """Rank 0 names a buffer that depends on the samples, once, unless it has a rule."""

    def update(model, x):
        average(model, x)
        model.count += 1

    model = Net(update, center=center(), count=torch.zeros(()))
    trainer = create_distributed_trainer(model, buffers=rules)
    optimizer = sgd(model)
    texts = warnings_of(lambda: [step(trainer, optimizer, number) for number in range(3)])
    trainer.close()
    if world.size == 1 or world.rank or rules:
        assert texts == []
    else:
        (text,) = texts
        assert "other values of buffer(s) 'center', which depend on its samples" in text
        assert "buffers={'center': \"mean\"}" in text
    assert len(set(world.gather(repr(model.center.tolist())))) == 1


@on_ranks(2)
def test_warning_of_later_change(world):
    """A buffer that begins to change in a later step is looked at then."""

    def update(model, x):
        model.count += 1
        if model.count > 2:
            average(model, x)

    model = Net(update, center=center(), count=torch.zeros(()))
    trainer = create_distributed_trainer(model)
    optimizer = sgd(model)
    counts = [len(warnings_of(lambda number=number: step(trainer, optimizer, number))) for number in range(4)]
    assert counts == [0, 0, 1 - world.rank, 0]
    trainer.close()


@on_ranks(2, (3, 2))
def test_different_buffers(world):
    """A buffer that only some ranks register is named on all ranks, before any weight has changed."""

    def update(model, x):
        if world.rank == world.size - 1:
            model.register_buffer("extra", torch.zeros(2))

    model = Net(update)
    trainer = create_distributed_trainer(model)
    before = model.linear.weight.detach().clone()
    with pytest.raises(MismatchError) as raised:
        step(trainer, sgd(model))
    text = str(raised.value)
    last = world.size - 1
    assert text.startswith(f"buffers differ: extra is on rank {last} and not on rank 0.")
    assert set(world.gather(text)) == {text}
    assert torch.equal(before, model.linear.weight)
    trainer.close()


@pytest.mark.parametrize("shape", ["rows", "no rows", "None"])
@on_ranks(2, 3)
def test_values_that_do_not_fit(world, shape):
    """The rules refuse what they cannot combine, with the same error on all ranks."""

    def update(model, x):
        model.rows = {"rows": x, "no rows": x.sum(), "None": None if world.rank else x}[shape]

    model = Net(update, rows=None)
    trainer = create_distributed_trainer(model, buffers={"rows": "gather" if shape == "no rows" else "mean"})
    with pytest.raises((MismatchError, ValueError)) as raised:
        step(trainer, sgd(model))
    text = str(raised.value)
    assert {
        "rows": 'buffer rows, whose rule is "mean", is [',
        "no rows": 'buffer rows is [] float64: the rule "gather" needs a dense tensor with rows',
        "None": 'buffer rows, whose rule is "mean", is [4, 4] float64 on rank 0 and None on rank 1'
        if world.size == 2
        else "float64 on rank 0 and None on rank 1",
    }[shape] in text
    assert set(world.gather(text)) == {text}
    trainer.close()


@on_ranks(2)
def test_registered_later(world):
    """A module with buffers that is added later gets rank 0's values, and its rule."""

    def update(model, x):
        average(model.later, x)

    model = Net(lambda model, x: None)
    trainer = create_distributed_trainer(model, buffers={})
    optimizer = sgd(model)
    step(trainer, optimizer)
    model.later = Net(None, center=center() + world.rank)
    model.later.linear = None
    model.update = lambda model, x: None
    step(trainer, optimizer)
    assert torch.equal(model.later.center, center())
    trainer.close()


@on_ranks(2)
def test_divergence(world, monkeypatch):
    """A buffer that differs between ranks is found and named, BatchNorm's too; one that has just changed is not."""
    monkeypatch.setattr(divergence, "EVERY_STEPS", 2)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), Net(lambda model, x: None, mask=torch.ones(2))).double()
    model[2].linear = nn.Linear(3, 2).double()
    trainer = create_distributed_trainer(model)
    optimizer = sgd(model)
    for _ in range(2):
        step(trainer, optimizer)
    step(trainer, optimizer)
    if world.rank:
        model[1].running_mean.data[0] += 1
    with pytest.raises(MismatchError, match=r"1 of \d+ parameters and buffers .* 1.running_mean on rank\(s\) 1"):
        step(trainer, optimizer)
    trainer.close()


def test_patterns():
    """The first pattern that matches counts; one that matches nothing names the buffers."""
    names = ["queue", "head.center", "head.scale"]
    rules = {"queue": "gather", "head.*": "mean", "*.scale": "first"}
    assert match_rules(names, rules) == {"queue": "gather", "head.center": "mean", "head.scale": "mean"}
    with pytest.raises(ValueError, match=r"'\*.scale': 'first'} matches no buffer that an earlier pattern does not"):
        match_rules(names, rules, is_strict=True)
    with pytest.raises(ValueError, match=r"'tail': 'mean'} matches no buffer. The model's buffers are queue, head.cen"):
        match_rules(names, {"tail": "mean"}, is_strict=True)


KINDS = {
    "dense": torch.arange(6.0).view(2, 3).t(),
    "expanded": torch.ones(1, 3).expand(4, 3),
    "sparse": torch.eye(3).to_sparse(),
    "csr": torch.eye(3).to_sparse_csr(),
    "quantised": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    "none": None,
    "complex": torch.ones(2, dtype=torch.complex64).conj(),
}


@pytest.mark.parametrize("change", ["write", "replace", "to None", "resize"])
@pytest.mark.parametrize("kind", KINDS)
def test_snapshot(kind, change):
    """A snapshot brings back values, shapes and None, and the tensor itself if it was only written to."""
    first = None if KINDS[kind] is None else KINDS[kind].clone()
    if kind == "expanded":
        first = torch.ones(1, 3).expand(4, 3)
    model = Net(None, buffer=first)
    snapshot = StepSnapshot(model, torch.device("cpu"))
    if change == "write" and kind in ("dense", "expanded", "complex"):
        model.buffer[0] = 5
    elif change == "resize" and kind in ("dense", "complex"):
        model.buffer.resize_(9).fill_(3)
    elif change == "to None":
        model.buffer = None
    else:
        model.buffer = torch.full((2,), 7.0)
    for _ in range(2):
        snapshot.restore()
        assert (model.buffer is None) == (first is None)
        if first is not None:
            expected = KINDS[kind]
            assert model.buffer.shape == expected.shape
            assert model.buffer.layout == expected.layout
            values = [tensor.dequantize() if tensor.is_quantized else tensor for tensor in (model.buffer, expected)]
            assert torch.equal(*(tensor.to_dense() for tensor in values))


def test_places():
    """A tensor in two modules stays one tensor when it is replaced."""
    model = Net(None, buffer=torch.ones(2))
    model.linear.register_buffer("same", model.buffer)
    buffers = Buffers(model)
    buffers.put(0, torch.zeros(3))
    assert model.buffer is model.linear.same
    assert model.buffer.shape == (3,)
    assert not buffers.have_moved()
    model.linear.register_buffer("other", None)
    assert buffers.have_moved()


@on_ranks(1, 2)
def test_reproducible(world):
    """Shards take buffers of any kind: sparse ones, None, and those that forward resizes."""

    def update(model, x):
        model.rows = x
        model.center.data.add_(x.mean(0))

    model = Net(update, rows=None, center=center(), sparse=torch.eye(3).to_sparse(), shown=torch.ones(1).expand(3))
    with create_distributed_trainer(model, reproducible=4) as trainer:
        step(trainer, sgd(model), num_samples=8)
    expected = regression_batch(8, 0, inputs=4, outputs=2)[0]
    torch.testing.assert_close(model.center, center() + expected.mean(0))
    torch.testing.assert_close(model.rows.shape, torch.Size((2, 4)))
