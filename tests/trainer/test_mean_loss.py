# SPDX-License-Identifier: Apache-2.0
"""Losses whose denominators only the criterion or the model knows, against one process on the whole batch."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from one_process import assert_same, plain_step
from ranks import mixed, on_ranks, same_message
from small_models import F64, sgd
from torch import nn

from distributed_trainer import MeanLoss, MismatchError, PowerSGD, create_distributed_trainer

several = on_ranks(2, 3)
VOCABULARY, IGNORED = 9, -100


class Language(nn.Module):
    """Model of tokens [N, T], with outputs [N, T, VOCABULARY]."""

    def __init__(self, norm=False):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, 4, dtype=F64)
        self.norm = nn.BatchNorm1d(4, dtype=F64) if norm else nn.Identity()
        self.linear = nn.Linear(4, VOCABULARY, dtype=F64)

    def forward(self, tokens):
        return self.linear(self.norm(self.embedding(tokens).transpose(1, 2)).transpose(1, 2).tanh())


def tokens_of(num_samples=7, seed=1):
    """Return tokens [N, 6] and labels, of which the first samples have none."""
    torch.manual_seed(seed)
    tokens = torch.randint(VOCABULARY, (num_samples, 6))
    return tokens, tokens.masked_fill(torch.arange(6) >= torch.arange(-1, num_samples - 1)[:, None], IGNORED)


def mean(outputs, labels):
    return F.cross_entropy(outputs.flatten(0, 1), labels.flatten())


def counted(outputs, labels):
    is_label = labels != IGNORED
    return MeanLoss(F.cross_entropy(outputs[is_label], labels[is_label], reduction="sum"), is_label.sum())


def terms(outputs, labels):
    """Return terms with different denominators: labels, elements, a number that is not an integer, samples."""
    first = outputs[:, 0].square()
    return {
        "labels": counted(outputs, labels),
        "others": [MeanLoss(first.sum(), first.numel()), MeanLoss(first.sum()[None], 2.5 * len(first))],
        "samples": outputs[:, 1].exp().mean(),
    }


def mean_of_terms(outputs, labels):
    first = outputs[:, 0].square()
    return mean(outputs, labels) + first.mean() + first.sum() / (2.5 * len(first)) + outputs[:, 1].exp().mean()


def many(outputs, labels):
    return [MeanLoss(outputs[:, 0, index].square().sum(), len(outputs)) for index in range(VOCABULARY)] * 2


def mean_of_many(outputs, _):
    return 2 * outputs[:, 0].square().sum(1).mean()


@pytest.mark.parametrize(
    ("criterion", "expected", "options"),
    [
        (counted, mean, {}),
        (counted, mean, {"microbatches": 3}),
        (counted, mean, {"microbatches": "auto"}),
        (terms, mean_of_terms, {}),
        (many, mean_of_many, {}),
        (many, mean_of_many, {"microbatches": 2}),
    ],
    ids=["one", "microbatches", "auto", "terms", "many", "many-microbatches"],
)
@mixed
def test_mean_loss(world, criterion, expected, options):
    model = Language()
    reference = copy.deepcopy(model)
    optimizers = sgd(model), sgd(reference)
    trainer = create_distributed_trainer(model)
    for step, num_samples in enumerate([7, 8, 2]):  # rank 2 has no sample of the last batch
        batch = tokens_of(num_samples, step)
        batch[1][-1, 0] = 0
        loss = trainer.train_step(*batch, criterion, optimizers[0], **options)
        if criterion is terms:
            assert list(loss) == ["labels", "others", "samples"]
            loss = loss["labels"] + sum(loss["others"]) + loss["samples"]
        loss = sum(loss) if isinstance(loss, list) else loss
        assert loss.shape == ()
        torch.testing.assert_close(loss, plain_step(reference, *batch, expected, optimizers[1]), rtol=1e-12, atol=0)
    assert_same(model, reference)
    with torch.no_grad():
        value = expected(reference(batch[0]), batch[1]).item()
    result = trainer.evaluate([batch], criterion)["loss"]
    if criterion is terms:
        result = result["labels"] + sum(result["others"]) + result["samples"]
    assert (sum(result) if isinstance(result, list) else result) == pytest.approx(value, rel=1e-12)
    trainer.close()


@pytest.mark.parametrize("options", [{"shard": "optimizer"}, {"compression": PowerSGD(rank=64)}], ids=["shard", "psgd"])
@several
def test_options(world, options):
    model = Language()
    reference = copy.deepcopy(model)
    optimizers = sgd(model), sgd(reference)
    trainer = create_distributed_trainer(model, **options)
    for step in range(2):
        batch = tokens_of(seed=step)
        trainer.train_step(*batch, counted, optimizers[0], microbatches=2)
        plain_step(reference, *batch, mean, optimizers[1])
    assert_same(model, reference, 1e-5)
    trainer.close()


@mixed
def test_mean_over_nothing(world):
    """The result is that of one process: NaN."""
    model = Language()
    trainer = create_distributed_trainer(model)
    tokens, labels = tokens_of()
    for microbatches in (1, 2):
        loss = trainer.train_step(tokens, labels.fill_(IGNORED), counted, sgd(model), microbatches=microbatches)
        assert loss.isnan()
    assert math.isnan(trainer.evaluate([(tokens, labels)], counted)["loss"])


class _Raise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, _):
        raise KeyError("broken sample")


@pytest.mark.parametrize("microbatches", [1, 3, "auto"])
@pytest.mark.parametrize("has_norm", [False, True], ids=["plain", "batchnorm"])
@several
def test_failures(world, has_norm, microbatches):
    """A rank whose criterion or backward raises: the same error on every rank, and the next step is exact."""
    model = Language(has_norm)
    reference = copy.deepcopy(model)
    optimizers = sgd(model), sgd(reference)
    trainer = create_distributed_trainer(model)
    is_last = world.rank == world.size - 1
    for step, place in enumerate(["criterion", None, "backward", "criterion", None]):

        def criterion(outputs, labels, place=place):
            if is_last and place == "criterion":
                raise KeyError("broken sample")
            return counted(_Raise.apply(outputs) if is_last and place else outputs, labels)

        batch = tokens_of(12, seed=step)
        if place is None:
            trainer.train_step(*batch, criterion, optimizers[0])
            if not has_norm:  # running statistics keep the ranks' samples of failed steps
                plain_step(reference, *batch, mean, optimizers[1])
        else:
            with pytest.raises(KeyError, match="broken sample"):
                trainer.train_step(*batch, criterion, optimizers[0], microbatches=microbatches)
    if not has_norm:
        assert_same(model, reference, 1e-10)
    trainer.close()


@several
def test_one_rank_returns_another_kind(world):
    model = Language()
    trainer = create_distributed_trainer(model)
    criterion = mean if world.rank == 0 else counted
    with pytest.raises(
        MismatchError, match=r"MeanLoss in 0 of 1 term.* and in 1 of 1 term.* on different ranks"
    ) as error:
        trainer.train_step(*tokens_of(), lambda *pair: criterion(*pair), sgd(model))
    same_message(world, error)


@mixed
def test_refusals(world):
    model = Language()
    trainer = create_distributed_trainer(model)
    batch, optimizer = tokens_of(), sgd(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"several means, over 15 and 7 items of the batch.*microbatches=1"):
        trainer.train_step(*batch, lambda o, y: [counted(o, y), MeanLoss(o.sum(), len(o))], optimizer, microbatches=2)
    with pytest.raises(ValueError, match=r"returns MeanLoss, whose count is the weight.*Leave"):
        trainer.train_step(*batch, counted, optimizer, weight=len)
    for count in (-1, math.inf, torch.ones(2)):
        with pytest.raises(ValueError, match="count of MeanLoss"):
            trainer.train_step(*batch, lambda o, _, count=count: MeanLoss(o.sum(), count), optimizer)
    assert_same(model.state_dict(), before, 0)
    trainer.close()
    trainer = create_distributed_trainer(model, reproducible=4)
    with pytest.raises(ValueError, match="reproducible="):
        trainer.train_step(*batch, counted, optimizer)


def test_arguments():
    with pytest.raises(TypeError, match="must be a tensor"):
        MeanLoss(1.0, 2)
    with pytest.raises(ValueError, match=r"one element, not shape \[2\]"):
        MeanLoss(torch.ones(2), 2)


class WithLoss(Language):
    """Model that computes its loss as those of transformers do: labels are shifted by one."""

    def __init__(self, kind="mean"):
        super().__init__()
        self.kind = kind

    def loss_function(self, outputs, labels, number):
        labels = F.pad(labels, (0, 1), value=IGNORED)[:, 1:]
        pair = outputs.flatten(0, 1), labels.flatten()
        if number is not None:
            return F.cross_entropy(*pair, reduction="sum") / number
        return nn.CrossEntropyLoss()(*pair)

    def forward(self, tokens, labels, num_items_in_batch=None):
        outputs = super().forward(tokens)
        loss = self.loss_function(outputs, labels, num_items_in_batch)
        if self.kind == "two":
            loss = (loss + F.cross_entropy(outputs[:, 0], labels[:, 0])) / 2
        if self.kind == "router":
            loss += 0.1 * outputs.square().mean((1, 2)).mean()  # a mean over samples
        return {"loss": loss, "logits": outputs}


def of_model(outputs, _):
    return outputs["loss"]


def train_with_loss(world, kind="mean", number=None, **options):
    model = WithLoss(kind)
    reference = copy.deepcopy(model)
    optimizers = sgd(model), sgd(reference)
    trainer = create_distributed_trainer(model)
    for step in range(3):
        tokens, labels = tokens_of(seed=step)
        labels[1, 0] = 0
        batch = {"tokens": tokens, "labels": labels} | ({} if number is None else {"num_items_in_batch": number})
        loss = trainer.train_step(batch, labels, of_model, optimizers[0], **options)
        optimizers[1].zero_grad()
        expected = reference(**batch)["loss"]
        expected.backward()
        optimizers[1].step()
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=0)
    assert_same(model, reference)
    if number is None and kind != "router":
        value = trainer.evaluate([(batch, labels)], of_model)["loss"]
        with torch.no_grad():
            assert value == pytest.approx(reference(**batch)["loss"].item(), rel=1e-12)
    trainer.close()


@pytest.mark.parametrize(
    ("kind", "number", "options"),
    [
        ("mean", None, {}),
        ("mean", None, {"microbatches": 3}),
        ("mean", 21, {}),
        ("mean", torch.tensor(21), {}),
        ("mean", 21, {"microbatches": 2}),
        ("two", None, {}),
        ("router", None, {}),
    ],
    ids=["mean", "microbatches", "int", "tensor", "int-microbatches", "two", "router"],
)
@mixed
def test_loss_of_the_model(world, kind, number, options, caplog):
    """A mean of torch that the model has computed is exact; what is not such a mean is named in a warning."""
    train_with_loss(world, kind, number, **options)
    warned = any("outputs.loss" in record.getMessage() for record in caplog.records)
    assert warned == (kind == "router" and world.size > 1 and world.rank == 0)


@several
def test_wrong_numbers(world):
    model = WithLoss()
    tokens, labels = tokens_of()
    trainer = create_distributed_trainer(model)
    batch = {"tokens": tokens, "labels": labels}
    with pytest.raises(ValueError, match="num_items_in_batch is 3, but the batch has 10 targets"):
        trainer.train_step(batch | {"num_items_in_batch": 3}, labels, of_model, sgd(model))
    with pytest.raises(
        ValueError, match=r"weight= gives \d+ of 15 for the part of rank 0, .* a mean over \d+ of 10 targets"
    ):
        trainer.train_step(batch, labels, of_model, sgd(model), weight=lambda y: (y != IGNORED).sum())
    trainer.train_step(batch, labels, of_model, sgd(model), weight=lambda y: (y[:, 1:] != IGNORED).sum())
    trainer.close()
    trainer = create_distributed_trainer(model, reproducible=4)
    with pytest.raises(ValueError, match=r"ignores some targets.*weight="):
        trainer.train_step(batch, labels, of_model, sgd(model))
