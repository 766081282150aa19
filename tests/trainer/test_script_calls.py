# SPDX-License-Identifier: Apache-2.0
"""trainer.any, reduce and gather: values, errors, and a contrastive loss over the batch, compared with one process."""

import contextlib
import math

import pytest
import torch
import torch.nn.functional as F
from one_process import assert_same, plain_step
from ranks import mixed, on_ranks, same_message
from small_models import F64, sgd
from torch import nn
from torch.utils.data import TensorDataset

from distributed_trainer import MismatchError, create_distributed_trainer

several = on_ranks(2, 3)


class Towers(nn.Module):
    """Two encoders of pairs, as of images and texts."""

    def __init__(self, norm=False, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(6, 5, dtype=F64)
        self.second = nn.Linear(4, 5, dtype=F64)
        self.norm = nn.BatchNorm1d(5, dtype=F64) if norm else nn.Identity()
        self.scale = nn.Parameter(torch.tensor(1.5, dtype=F64))

    def forward(self, x):
        first, second = torch.tanh(self.first(x[:, :6])), self.second(x[:, 6:])
        return F.normalize(self.norm(first)), F.normalize(second), self.scale


def pairs(num_samples, seed=1):
    """Inputs, and targets that number the samples."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_samples, 10, generator=generator, dtype=F64), torch.arange(num_samples)


def info_nce(outputs, targets):
    """The loss of one process, in both directions."""
    first, second, scale = outputs
    logits, labels = scale * first @ second.t(), torch.arange(len(first))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), labels)) / 2


class GlobalInfoNCE:
    """`info_nce` of this rank's rows against those of all ranks."""

    def __init__(self, trainer):
        self.trainer = trainer

    def __call__(self, outputs, targets):
        first, second, scale = outputs
        trainer = self.trainer
        ranks = trainer.gather(torch.full((len(first),), trainer.rank))
        labels = torch.arange(len(first)) + (ranks < trainer.rank).sum()
        losses = [
            F.cross_entropy(scale * own @ trainer.gather(other).t(), labels)
            for own, other in ((first, second), (second, first))
        ]
        return sum(losses) / 2


@mixed
def test_reduce_numbers(world):
    trainer = create_distributed_trainer(nn.Linear(1, 1))
    ranks, n = range(world.size), world.size
    assert trainer.any(world.rank == n - 1) is True
    assert trainer.any(False) is False
    assert trainer.any(torch.tensor(world.rank == 0)) is True
    assert trainer.reduce(2**70 + world.rank) == sum(2**70 + rank for rank in ranks)
    assert trainer.reduce(world.rank, "mean") == sum(ranks) / n
    assert trainer.reduce(world.rank - 5, "min") == -5
    assert trainer.reduce(0.5 * world.rank, "max") == 0.5 * (n - 1)
    assert trainer.reduce(True) == n
    assert trainer.reduce(world.rank == 0, "min") is (n == 1)
    for op in ("sum", "mean", "min", "max"):
        assert math.isnan(trainer.reduce(math.nan if world.rank == n - 1 else 1.0, op))
    assert len(set(world.gather(trainer.reduce(0.1 + world.rank)))) == 1
    trainer.close()


@mixed
def test_reduce_tensors(world):
    trainer = create_distributed_trainer(nn.Linear(1, 1))
    every = [torch.randn(3, 4, generator=torch.Generator().manual_seed(rank)) * 4 for rank in range(world.size)]
    for dtype in (
        torch.float64,
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.int64,
        torch.int8,
        torch.complex64,
    ):
        values = torch.stack([value.to(dtype) for value in every])
        own = values[world.rank].t().contiguous().t()
        expected = {"sum": values.to(torch.complex128).sum(0)}
        if not dtype.is_complex:
            expected |= {"min": values.amin(0), "max": values.amax(0)}
        if dtype.is_floating_point or dtype.is_complex:
            expected["mean"] = values.to(torch.complex128).mean(0)
        for op, value in expected.items():
            result = trainer.reduce(own, op)
            assert (result.dtype, result.shape, result.requires_grad) == (dtype, own.shape, False)
            tolerance = {} if dtype.itemsize > 2 or not dtype.is_floating_point else {"rtol": 1e-2, "atol": 1e-2}
            exact = value if dtype.is_complex or not value.is_complex() else value.real
            torch.testing.assert_close(result, exact.to(dtype), **tolerance)
            assert len({str(one.tolist()) for one in world.gather(result)}) == 1
    flags = torch.tensor([True, world.rank == 0, False])
    assert trainer.reduce(flags, "max").tolist() == [True, True, False]
    assert trainer.reduce(flags, "min").tolist() == [True, world.size == 1, False]
    assert trainer.reduce(torch.tensor(world.rank)).tolist() == sum(range(world.size))
    assert trainer.reduce(torch.empty(0, 3)).shape == (0, 3)
    own = torch.ones(2, requires_grad=True)
    assert not trainer.reduce(own).requires_grad
    trainer.close()


@mixed
def test_gather_values(world):
    trainer = create_distributed_trainer(nn.Linear(1, 1))
    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex128):
        for lengths in ([2] * world.size, range(world.size), [0] * world.size, [3 * (rank == 0) for rank in range(4)]):
            every = [torch.arange(rank, rank + 2 * lengths[rank]).view(-1, 2).to(dtype) for rank in range(world.size)]
            result = trainer.gather(every[world.rank].t().contiguous().t())
            assert torch.equal(result, torch.cat(every)) and result.dtype == dtype
    assert trainer.gather(torch.empty(2, 0, 3)).shape == (2 * world.size, 0, 3)
    with torch.no_grad():
        assert not trainer.gather(torch.ones(2, requires_grad=True)).requires_grad
    trainer.close()


@several
def test_wrong_values(world):
    trainer = create_distributed_trainer(nn.Linear(1, 1))
    is_first = world.rank == 0
    wrong = [
        (ValueError, 'op must be "sum".* not .prod', lambda: trainer.reduce(1, "prod" if is_first else "sum")),
        (TypeError, "reduce takes .* not str", lambda: trainer.reduce("1" if is_first else 1)),
        (TypeError, r"mean of torch.int64", lambda: trainer.reduce(torch.ones(2).long(), "mean")),
        (TypeError, r"sum of torch.bool", lambda: trainer.reduce(torch.ones(2).bool())),
        (TypeError, "complex", lambda: trainer.reduce(torch.ones(2, dtype=torch.complex64), "max")),
        (TypeError, "sparse", lambda: trainer.reduce(torch.ones(2).to_sparse())),
        (MismatchError, r"sum of int, rank 1 .* of float", lambda: trainer.reduce(1 if is_first else 1.0)),
        (MismatchError, r"to the max .* to the min", lambda: trainer.reduce(1, "max" if is_first else "min")),
        (MismatchError, r"float32 \[1\], rank 1 .* \[2\]", lambda: trainer.reduce(torch.ones(1 if is_first else 2))),
        (MismatchError, "reduce .* gather", lambda: (trainer.reduce if is_first else trainer.gather)(torch.ones(2))),
        (TypeError, "gather takes a tensor, not list", lambda: trainer.gather([1] if is_first else torch.ones(1))),
        (ValueError, "has none", lambda: trainer.gather(torch.ones(()))),
        (MismatchError, r"\[rows, 2\] .*\[rows, 3\]", lambda: trainer.gather(torch.ones(4, 2 if is_first else 3))),
        (
            MismatchError,
            r"\[rows, 2\] .*\[rows, 2, 2\]",
            lambda: trainer.gather(torch.ones((4, 2) + (2,) * world.rank)),
        ),
        (MismatchError, r"float32.*float64", lambda: trainer.gather(torch.ones(1, dtype=None if is_first else F64))),
        (MismatchError, r"with a graph.*without", lambda: trainer.gather(torch.ones(1, requires_grad=is_first))),
        (RuntimeError, "ambiguous", lambda: trainer.any(torch.ones(2) if is_first else False)),
    ]
    for kind, message, call in wrong:
        with pytest.raises(kind, match=f"(?s){message}") as error:
            call()
        same_message(world, error)
        assert trainer.reduce(1) == world.size  # the calls are in order again
    trainer.close()
    with pytest.raises(ValueError, match="was closed"):
        trainer.any(True)


@mixed
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "batchnorm"])
@pytest.mark.parametrize("source", ["whole", "loader"])
def test_contrastive(world, norm, source):
    """The last batches leave ranks without samples: what these compute counts for nothing."""
    model, reference = Towers(norm), Towers(norm)
    trainer = create_distributed_trainer(model)
    optimizer, plain = sgd(model), sgd(reference)
    criterion = GlobalInfoNCE(trainer)
    sizes = (12, 7, 2, 5, 2) if norm else (12, 7, 2, 5, 1)
    x, y = pairs(sum(sizes))
    batches = list(zip(x.split(sizes), y.split(sizes), strict=True))
    if source == "loader":
        batches = list(zip(x.split(5), y.split(5), strict=True))
        parts = trainer.loader(TensorDataset(x, y), 5)
    for (inputs, targets), own in zip(batches, parts if source == "loader" else batches, strict=True):
        loss = trainer.train_step(*own, criterion, optimizer)
        expected = plain_step(reference, inputs, targets, info_nce, plain)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert_same(model, reference, rtol=1e-10)
    trainer.close()


@mixed
def test_microbatches(world):
    """Each piece is a batch of its own, as in one process."""
    model, reference = Towers(), Towers()
    trainer = create_distributed_trainer(model)
    x, y = pairs(11)
    trainer.train_step(x, y, GlobalInfoNCE(trainer), sgd(model), microbatches=3)
    plain = sgd(reference)
    plain.zero_grad()
    for inputs, targets in zip(x.tensor_split(3), y.tensor_split(3), strict=True):
        sizes = [len(part) for part in x.tensor_split(3)]
        (info_nce(reference(inputs), targets) * len(inputs) / sum(sizes)).backward()
    plain.step()
    assert_same(model, reference)
    trainer.close()


@mixed
def test_manual_loop(world):
    model, reference = Towers(), Towers()
    trainer = create_distributed_trainer(model)
    optimizer, plain = sgd(model), sgd(reference)
    criterion = GlobalInfoNCE(trainer)
    for size in (7, 2, 9):
        x, y = pairs(size)
        own_x, own_y = trainer.split((x, y))
        with trainer.forward():
            if len(own_x):
                loss = criterion(model(own_x), own_y)
            else:
                outputs = model(x[:1])
                criterion([output[:0] for output in outputs[:2]] + [outputs[2]], own_y)
                loss = info_nce(outputs, None)
        optimizer.zero_grad()
        total = trainer.backward(loss, weight=len(own_x))
        trainer.step(optimizer)
        expected = plain_step(reference, x, y, info_nce, plain)
        assert total.item() == pytest.approx(expected.item(), rel=1e-12)
    assert_same(model, reference, rtol=1e-11)
    trainer.close()


@several
def test_weight_of_nothing(world):
    """Rows that were gathered count in the other ranks' losses, so the rank's weight cannot be 0."""
    model = Towers()
    trainer = create_distributed_trainer(model)
    with trainer.forward():
        loss = GlobalInfoNCE(trainer)(model(pairs(3)[0]), None)
    with pytest.raises(ValueError, match=r"weight=0 does not go with rows that trainer.gather") as error:
        trainer.backward(loss, weight=0.0 if world.rank else 1.0)
    same_message(world, error)
    trainer.close()


@mixed
def test_loss_without_gathered_rows(world):
    """A rank whose loss does not depend on the others' rows still adds to their gradients, with or without a graph."""

    def plain(outputs, targets):
        first, second, _ = outputs
        losses = -(first @ second.t()).logsumexp(1)
        losses = torch.where(targets % 2 == 0, losses, first.sum(1) if targets.sum() % 3 else 0 * losses.detach())
        return losses.mean()

    model, reference = Towers(), Towers()
    trainer = create_distributed_trainer(model, split_batches=False)

    def criterion(outputs, targets):
        first, second, _ = outputs
        everyone = trainer.gather(second)
        if int(targets[0]) % 2 == 0:
            return -(first @ everyone.t()).logsumexp(1).mean()
        return first.sum(1).mean() if targets.sum() % 3 else torch.zeros((), dtype=F64)

    for kind in (1, 3):  # odd ranks: targets of 1 have a graph, those of 3 none
        x = pairs(2 * world.size)[0]
        targets = torch.tensor([kind * (rank % 2) for rank in range(world.size) for _ in range(2)])
        own = slice(2 * world.rank, 2 * world.rank + 2)
        trainer.train_step(x[own], targets[own], criterion, sgd(model))

        optimizer = sgd(reference)
        first, second, _ = reference(x)
        losses = -(first @ second.t()).logsumexp(1)
        odd = first.sum(1) if kind == 1 and 2 % 3 else torch.zeros(len(x), dtype=F64)
        torch.where(targets == 0, losses, odd).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert_same(model, reference, rtol=1e-11)
    trainer.close()


@mixed
def test_evaluate(world):
    """The last batch leaves ranks without samples; metrics call the ranks as well."""
    model = Towers()
    trainer = create_distributed_trainer(model)
    x, y = pairs(13)
    batches = list(zip(x.split(4), y.split(4), strict=True))
    outputs = [(model(inputs), len(inputs)) for inputs, _ in batches]
    expected = sum(info_nce(output, None).item() * number for output, number in outputs) / 13
    for loader in (batches, trainer.loader(TensorDataset(x, y), 4)):
        result = trainer.evaluate(
            loader, GlobalInfoNCE(trainer), {"rows": lambda outputs, targets: trainer.gather(targets).double().mean()}
        )
        assert result["loss"] == pytest.approx(expected, rel=1e-12)
        assert result["rows"] == pytest.approx(6.0)
    trainer.close()


@several
def test_reduce_in_criterion(world):
    """A dummy counts for nothing; a rank counts once."""
    model = nn.Linear(10, 1, dtype=F64)
    trainer = create_distributed_trainer(model)
    seen = []

    def criterion(outputs, targets):
        seen.append((trainer.reduce(len(targets)), trainer.any(int(targets.max()) > 0)))
        return (outputs.squeeze(1) - targets).square().mean()

    for size in (7, 1):
        trainer.train_step(*pairs(size), criterion, sgd(model))
    assert seen == [(7, True), (1, False)]
    trainer.close()


class _Fails:
    """Criterion that raises on one rank, before or after its calls, or in backward."""

    def __init__(self, trainer, place):
        self.loss, self.place, self.is_on = GlobalInfoNCE(trainer), place, False

    def __call__(self, outputs, targets):
        if self.is_on and self.place == "before":
            raise KeyError("before")
        loss = self.loss(outputs, targets)
        if self.is_on and self.place == "after":
            raise KeyError("after")
        if self.is_on and self.place in ("backward", "late backward"):

            def fail(gradient):
                raise KeyError(self.place)

            (outputs[0] if self.place == "late backward" else loss).register_hook(fail)
        return loss


@several
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "batchnorm"])
@pytest.mark.parametrize("place", ["before", "after", "backward", "late backward"])
def test_one_rank_fails(world, place, norm):
    """All ranks raise the exception, and training continues."""
    model, reference = Towers(norm), Towers(norm)
    trainer = create_distributed_trainer(model)
    criterion = _Fails(trainer, place)
    x, y = pairs(8)
    optimizer, plain = sgd(model), sgd(reference)
    trainer.train_step(x, y, criterion, optimizer)
    plain_step(reference, x, y, info_nce, plain)
    before = [parameter.clone() for parameter in model.parameters()]
    for microbatches in (1, 2):
        criterion.is_on = world.rank == 1
        with pytest.raises(KeyError, match=place):
            trainer.train_step(x, y, criterion, optimizer, microbatches=microbatches)
        assert all(map(torch.equal, before, model.parameters()))
    criterion.is_on = False
    trainer.train_step(x, y, criterion, optimizer)
    plain_step(reference, x, y, info_nce, plain)
    if not norm:
        assert_same(model, reference, rtol=1e-11)
    trainer.close()


@several
def test_one_rank_fails_in_evaluate(world):
    model = Towers()
    trainer = create_distributed_trainer(model)
    criterion = _Fails(trainer, "after")
    x, y = pairs(8)
    for loader in ([(x, y)] * 2, trainer.loader(TensorDataset(x, y), 4)):
        criterion.is_on = False
        trainer.evaluate(loader, criterion)
        criterion.is_on = world.rank == 1
        with pytest.raises(KeyError, match="after"):
            trainer.evaluate(loader, criterion)
    trainer.close()


@several
@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "batchnorm"])
def test_one_rank_fails_before_the_first_call(world, norm, step):
    """No rank knows yet that the criterion makes calls, but a failed rank takes part in the exchange of counts."""
    model = Towers(norm)
    trainer = create_distributed_trainer(model)
    x, y = pairs(8)
    for _ in range(step):
        trainer.train_step(x, y, lambda outputs, _: outputs[0].mean(), sgd(model))
    criterion = _Fails(trainer, "before")
    criterion.is_on = world.rank == 1
    with pytest.raises(KeyError, match="before"):
        trainer.train_step(x, y, criterion, sgd(model))
    trainer.close()


@several
@pytest.mark.parametrize("used", [False, True], ids=["first", "later"])
def test_one_rank_makes_no_call(world, used):
    model = Towers()
    trainer = create_distributed_trainer(model)
    loss = GlobalInfoNCE(trainer)
    x, y = pairs(8)
    if used:
        trainer.train_step(x, y, loss, sgd(model))
    with pytest.raises(MismatchError, match=r"calls differ|these differ"):
        trainer.train_step(x, y, info_nce if world.rank == 1 else loss, sgd(model))
    with contextlib.suppress(MismatchError):
        trainer.close()


@several
def test_refusals(world):
    model = Towers()
    x, y = pairs(8)
    trainer = create_distributed_trainer(model)

    def penalty(outputs, targets):
        everyone = trainer.gather(outputs[0])
        (gradient,) = torch.autograd.grad(everyone.square().sum(), outputs[0], create_graph=True)
        return gradient.square().mean()

    with pytest.raises(RuntimeError, match="no second derivative"):
        trainer.train_step(x, y, penalty, sgd(model))
    trainer.close()
    trainer = create_distributed_trainer(model, reproducible=3)
    with pytest.raises(ValueError, match="leave reproducible out"):
        trainer.train_step(x, y, GlobalInfoNCE(trainer), sgd(model))
    assert trainer.reduce(1) == world.size
    trainer.close()
