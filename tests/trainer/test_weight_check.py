# SPDX-License-Identifier: Apache-2.0
"""A weight that is not the denominator of the loss's mean is refused in the first step, and nothing else changes."""

import copy
import random
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from one_process import assert_same
from ranks import on_ranks, same_message
from small_models import F64, Net, batch, mlp, sgd
from torch import nn
from torch.distributed.nn.functional import all_gather
from torch.utils.data import TensorDataset

from distributed_trainer import create_distributed_trainer

some = on_ranks(1, 2, 3)
LENGTH, NUM_WORDS = 12, 20
SAME = "the loss of two parts of a batch, weighted, is that of the whole ("


def num_labels(labels):
    return (labels != -100).sum()


def num_shifted_labels(labels):
    return (labels[:, 1:] != -100).sum()


def shifted(outputs, labels):
    """Return the loss of the next word at each position, as a causal language model has it."""
    logits = outputs["logits"] if isinstance(outputs, dict) else outputs
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def loss_of_model(outputs, _labels):
    return outputs["loss"]


class Language(nn.Module):
    """Language model with dropout, a counter and BatchNorm, which computes the loss itself or does not."""

    def __init__(self, computes_loss, dtype=torch.float32, raises_in_eval=False):
        super().__init__()
        torch.manual_seed(0)
        self.computes_loss, self.raises_in_eval = computes_loss, raises_in_eval
        self.embedding = nn.Embedding(NUM_WORDS, 8, dtype=dtype)
        self.norm = nn.BatchNorm1d(LENGTH, dtype=dtype)
        self.frozen = nn.BatchNorm1d(LENGTH, dtype=dtype).eval()
        self.dropout = nn.Dropout(0.3)
        self.linear = nn.Linear(8, NUM_WORDS, dtype=dtype)
        self.register_buffer("num_calls", torch.zeros(()))

    def forward(self, words, labels=None):
        assert self.training or not self.raises_in_eval
        self.num_calls += 1
        hidden = self.dropout(self.frozen(self.norm(self.embedding(words).cumsum(1))))
        logits = self.linear(hidden)
        return {"loss": shifted(logits, labels), "logits": logits} if self.computes_loss else logits


def text(num_samples, seed=0):
    """Return words, and labels that are -100 after each text's end."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(NUM_WORDS, (num_samples, LENGTH), generator=generator)
    ends = torch.randint(3, LENGTH, (num_samples, 1), generator=generator)
    return words, torch.where(torch.arange(LENGTH) < ends, words, -100)


def arguments(computes_loss, labels, words):
    """Return inputs, targets and criterion of a step."""
    inputs = {"words": words, "labels": labels} if computes_loss else words
    return inputs, labels, loss_of_model if computes_loss else shifted


@pytest.mark.parametrize("computes_loss", [False, True])
@some
def test_language_model(world, computes_loss, capfd, caplog):
    """The count of all labels is refused, and that of samples, but not the count of the labels that are predicted."""
    model = Language(computes_loss)
    trainer = create_distributed_trainer(model)
    optimizer, before = sgd(model), copy.deepcopy(dict(model.named_parameters()))
    words, labels = text(11)
    step = arguments(computes_loss, labels, words)
    options = {"microbatches": 2 if world.size == 1 else 1}
    capfd.readouterr()
    for weight, finding in ((num_labels, "weight= is wrong"), (None, "it is no mean over samples")):
        for _ in range(2):
            with pytest.raises(ValueError, match=f"the loss of two parts .* together .* So {finding}") as error:
                trainer.train_step(*step, optimizer, weight=weight, **options)
            message = same_message(world, error)
            assert re.search("On rank 0 the first [12] of", message)
            assert "check_weight=False" in message
    assert_same(dict(model.named_parameters()), before, rtol=0)
    assert not optimizer.state
    capfd.readouterr()
    for _ in range(2):
        trainer.train_step(*step, optimizer, weight=num_shifted_labels, **options)
    out = capfd.readouterr().out
    line = f"distributed_trainer: weight= fits {'loss_of_model' if computes_loss else 'shifted'}: {SAME}"
    assert (out.count(line), out.count("\n")) == ((1, 1) if world.rank == 0 else (0, 0)), out
    assert "s; check_weight=False leaves this out)" in out or world.rank
    trainer.train_step(*step, optimizer, weight=num_labels, check_weight=False, **options)
    assert "counts as a mean" not in caplog.text
    trainer.close()


def unknown_mean(outputs, targets):
    return -outputs.log_softmax(1).gather(1, targets[:, None]).mean()


def terms(outputs, targets):
    return {"loss": unknown_mean(outputs, targets), "norm": outputs.square().mean()}


class OwnLoss(nn.Module):
    """Loss that counts its calls in a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("num_calls", torch.zeros(()))

    def forward(self, outputs, targets):
        self.num_calls += 1
        return unknown_mean(outputs, targets)


@some
def test_ordinary_losses(world, capfd, caplog):
    """A mean over samples passes without a warning; the line is printed once, for criteria made in each step, too."""
    for make in (lambda: unknown_mean, lambda: lambda outputs, y: unknown_mean(outputs, y), lambda: terms, OwnLoss):
        model = Net(torch.bfloat16 if make is OwnLoss else torch.float32)
        trainer = create_distributed_trainer(model)
        capfd.readouterr()
        optimizer = sgd(model)
        for step in range(2):
            criterion = make()
            trainer.train_step(*batch(9, next(model.parameters()).dtype, step), criterion, optimizer)
        if make is OwnLoss:
            assert criterion.num_calls == 1
        out = capfd.readouterr().out
        line = f"counts as a mean over samples: {SAME}"
        assert out.count(line) == out.count("such as padding, pass weight=") == (world.rank == 0 < world.size - 1), out
        assert "counts as a mean" not in caplog.text
        trainer.close()


@pytest.mark.parametrize("computes_loss", [False, True])
@some
def test_nothing_changes(world, computes_loss):
    """Weights, buffers, modes and random states are the same bits with the check and without."""
    results = []
    for check_weight in (True, False):
        for generator in (random.seed, np.random.seed, torch.manual_seed):
            generator(5)
        model = Language(computes_loss)
        trainer = create_distributed_trainer(model)
        optimizer = sgd(model)
        modes = [module.training for module in model.modules()]
        for step in range(3):
            words, labels = text(11, step)
            trainer.train_step(
                *arguments(computes_loss, labels, words),
                optimizer,
                weight=num_shifted_labels,
                microbatches=2,
                check_weight=check_weight,
            )
        assert [module.training for module in model.modules()] == modes
        state = {name: value.clone() for name, value in model.state_dict().items()}
        results.append((state, torch.rand(3), random.random(), np.random.rand()))
        trainer.close()
    assert_same(results[0][0], results[1][0], rtol=0)
    assert torch.equal(results[0][1], results[1][1])
    assert results[0][2:] == results[1][2:]


def drawn(outputs, targets):
    return unknown_mean(outputs, targets) * torch.rand(()).item()


def infinite(outputs, targets):
    return unknown_mean(outputs, targets) + torch.inf


def of_all_ranks(outputs, targets):
    everyone, labels = torch.cat(all_gather(outputs)), torch.cat(all_gather(targets))
    return unknown_mean(everyone, labels)


@on_ranks(2, 3)
def test_not_checked(world, default_group, caplog, capfd):
    """Where the loss of parts says nothing the step is made; rank 0 says so, or warns as without a check."""
    x, y = batch(4 * world.size, F64)
    for criterion in (drawn, infinite, of_all_ranks):
        caplog.clear()
        model = nn.Sequential(nn.Flatten(), mlp(32, 4))
        trainer = create_distributed_trainer(model)
        trainer.train_step(x, y, criterion, sgd(model))
        assert caplog.text.count("counts as a mean over samples") == (world.rank == 0)
        trainer.close()
    reasons = {
        "AssertionError": (Language(True, raises_in_eval=True), 4 * world.size),
        "a forward of the model writes to its weights": (Language(True), 4 * world.size),
        "one of the two parts has weight 0": (Language(True), 4 * world.size),
    }
    for reason, (model, num_samples) in reasons.items():
        words, labels = text(num_samples)
        if "writes" in reason:
            model.embedding.max_norm = 1.0
        if "weight 0" in reason:
            labels[:] = -100
            labels[1 :: world.size] = words[1 :: world.size]
        trainer = create_distributed_trainer(model)
        capfd.readouterr()
        for _ in range(2):
            trainer.train_step(*arguments(True, labels, words), sgd(model), weight=num_shifted_labels)
        out = capfd.readouterr().out
        assert out.count(f"weight= of loss_of_model was not checked, since {reason}") == (world.rank == 0), out
        trainer.close()


@some
def test_ways_of_data(world, capfd):
    """Parts of each rank's own, of `trainer.loader`, and shards are checked like whole batches."""
    words, labels = text(24)
    for computes_loss in (False, True):
        for kind in ("own", "loader", "reproducible", "one sample each"):
            if kind == "own" and world.size == 1:
                continue  # nothing is cut
            model = Language(computes_loss)
            if kind == "one sample each":
                model.norm.eval()  # it needs more than one sample
            options = {"own": {"split_batches": False}, "reproducible": {"reproducible": 3}}.get(kind, {})
            trainer = create_distributed_trainer(model, **options)
            optimizer, microbatches = sgd(model), 2 if world.size == 1 and kind != "reproducible" else 1
            own = slice(None)
            if kind == "own":
                own = slice(world.rank * 8, world.rank * 8 + 8)
            elif kind == "one sample each":
                own, microbatches = slice(3), 4 - world.size
            x, y = words[own], labels[own]
            if kind == "loader":
                ((x, y),) = trainer.loader(TensorDataset(words, labels), 24)
            x, y, criterion = arguments(computes_loss, y, x)
            with pytest.raises(ValueError, match="So weight= is wrong") as error:
                trainer.train_step(x, y, criterion, optimizer, weight=num_labels, microbatches=microbatches)
            same_message(world, error)
            capfd.readouterr()
            trainer.train_step(x, y, criterion, optimizer, weight=num_shifted_labels, microbatches=microbatches)
            assert (SAME in capfd.readouterr().out) == (world.rank == 0), kind
            trainer.close()


class Attention(nn.Module):
    """Model that computes the loss of one long sample, whose first dimension does not count samples."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(6, 6)

    def forward(self, x, y):
        outputs = self.linear(x) + x.mean(0)
        return {"loss": (outputs - y).square().mean(), "outputs": outputs}


def contrastive(outputs, targets):
    similarity = F.normalize(outputs) @ F.normalize(outputs).t()
    return F.binary_cross_entropy_with_logits(similarity, (targets[:, None] == targets).to(outputs.dtype))


@on_ranks(2)
def test_comparing_samples(world, capfd):
    """A contrastive loss is refused by default; a part that is no batch of samples is not."""
    model = nn.Sequential(nn.Flatten(), mlp(32, 4))
    trainer = create_distributed_trainer(model)
    x, y = batch(9, F64)
    with pytest.raises(ValueError, match="compare the samples of each part with each other, pass check_weight=False"):
        trainer.train_step(x, y, contrastive, sgd(model))
    trainer.train_step(x, y, contrastive, sgd(model), check_weight=False)
    trainer.close()
    model = Attention()
    trainer = create_distributed_trainer(model, split_batches=False)
    capfd.readouterr()
    x, y = torch.randn(7 + world.rank, 6), torch.randn(7 + world.rank, 6)
    trainer.train_step((x, y), y, loss_of_model, sgd(model), weight=len)
    out = capfd.readouterr().out
    reason = "the model's outputs for a part of the samples are not those for all of them"
    assert out.count(f"was not checked, since {reason}") == (world.rank == 0), out
    trainer.close()


@on_ranks(3)
def test_one_rank(world):
    """A wrong weight that one rank alone finds is the same error on every rank, and no rank's weights change."""
    words, labels = text(12)
    labels[:8] = words[:8]  # all texts of ranks 0 and 1 have one length
    model = Language(True)
    trainer = create_distributed_trainer(model)
    before = copy.deepcopy(dict(model.named_parameters()))
    with pytest.raises(ValueError, match=r"On rank 2 the first 1 of 4 samples") as error:
        trainer.train_step(*arguments(True, labels, words), sgd(model), weight=num_labels)
    same_message(world, error)
    assert_same(dict(model.named_parameters()), before, rtol=0)
    trainer.close()


def trained(criterion, x, y, num_steps=3, trains=None):
    """Return losses of steps of a model, by the trainer or by plain torch, and the model."""
    model = Net(F64)
    optimizer = sgd(model)
    losses = []
    for _ in range(num_steps):
        given = x.clone(), y.clone()
        if trains is None:
            optimizer.zero_grad()
            loss = criterion(model(given[0]), given[1])
            loss.backward()
            optimizer.step()
        else:
            loss = trains(model, *given, criterion, optimizer)
        losses.append(loss.item())
    return losses, model


class Counting:
    """Loss that depends on how often it was called, and keeps a list of its results."""

    def __init__(self):
        self.num_calls, self.results = 0, []

    def __call__(self, outputs, targets):
        self.num_calls += 1
        loss = F.cross_entropy(outputs, targets) / self.num_calls
        self.results.append(loss.item())
        return loss


def counting_closure():
    num_calls, results = 0, []

    def loss(outputs, targets):
        nonlocal num_calls
        num_calls += 1
        results.append(num_calls)
        return F.cross_entropy(outputs, targets) / len(results)

    return loss


def in_place(outputs, targets):
    return F.cross_entropy(outputs.mul_(2.0), targets)


def one_based(outputs, targets):
    targets -= 1
    return F.cross_entropy(outputs, targets)


@some
@pytest.mark.parametrize("make", [Counting, counting_closure, lambda: in_place, lambda: one_based])
def test_what_a_criterion_changes(world, make):
    """A criterion that counts its calls, or writes to its arguments, does the same as in one process."""
    x, y = batch(12, F64)
    y = y + 1 if make() is one_based else y
    expected, reference = trained(make(), x, y)
    trainers = []

    def train(model, *arguments):
        trainers.extend([] if trainers else [create_distributed_trainer(model)])
        return trainers[0].train_step(*arguments)

    criterion = make()
    losses, model = trained(criterion, x, y, trains=train)
    assert losses == pytest.approx(expected, rel=1e-12)
    assert_same(model, reference)
    if isinstance(criterion, Counting):  # the step itself calls it once
        assert (criterion.num_calls, len(criterion.results)) == (3, 3)


@some
def test_says_nothing_good_of_what_one_rank_cannot_see(world, capfd, caplog):
    """A rank whose samples have no labels, or a loss that is NaN, proves nothing: the warning stays."""
    if world.size == 1:
        return
    x, y = batch(12, F64)
    y[6:] = -1

    def labelled(outputs, targets):
        losses = F.cross_entropy(outputs, targets.clamp(min=0), reduction="none")
        return (losses * (targets >= 0)).sum() / (targets >= 0).sum().clamp(min=1)

    for criterion in (labelled, lambda outputs, targets: F.cross_entropy(outputs, targets, ignore_index=-1)):
        model = Net(F64)
        trainer = create_distributed_trainer(model)
        try:
            trainer.train_step(x, y, criterion, sgd(model))
        except ValueError as error:
            assert "is not that of the whole" in str(error)  # where a rank has both kinds of samples
        assert SAME not in capfd.readouterr().out
        trainer.close()


@some
def test_criteria_of_one_factory(world):
    """Each of several criteria with the same code is checked."""
    x, y = batch(12, F64)
    mean, total = (
        lambda outputs, targets, kind=kind: F.cross_entropy(outputs, targets, reduction=kind)
        for kind in ("mean", "sum")
    )
    model = Net(F64)
    trainer = create_distributed_trainer(model)
    trainer.train_step(x, y, mean, sgd(model))
    if world.size > 1:
        with pytest.raises(ValueError, match="is not that of the whole"):
            trainer.train_step(x, y, total, sgd(model))
    trainer.close()
