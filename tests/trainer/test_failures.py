# SPDX-License-Identifier: Apache-2.0
"""An exception of one rank's step, caught by a script that continues: as in one process, or an error on every rank."""

import copy

import pytest
import torch
from one_process import assert_same
from ranks import mixed, on_ranks, same_message
from small_models import F64, Net, NormNet, batch, sgd
from torch import nn
from torch.utils.data import TensorDataset

from distributed_trainer import MismatchError, PowerSGD, create_distributed_trainer

several = on_ranks(2, 3, (3, 2))
MARK = 1000.0


class BadSampleError(ValueError):
    """Cannot be pickled: it needs two arguments."""

    def __init__(self, what, where):
        super().__init__(f"{what} at {where}")


class _Raise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, error):
        ctx.error = error
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        if ctx.error is not None:
            raise ctx.error
        return gradient, None


class Fragile(nn.Module):
    """Model that raises where it sees the marked sample."""

    def __init__(self, inner, place, error):
        super().__init__()
        self.inner, self.place, self.error = inner, place, error

    def forward(self, x):
        is_marked = bool((x == MARK).any())
        if is_marked and self.place == "before":
            raise self.error
        outputs = self.inner(x.clamp(max=3))
        if is_marked and self.place == "after":
            raise self.error
        return _Raise.apply(outputs, self.error if is_marked and self.place == "backward" else None)


def train(model, step, is_marked_at, num_samples=12):
    """Train for 5 steps; skip the batches whose step raises. Return which were skipped."""
    optimizer = sgd(model)
    skipped = []
    for number in range(5):
        x, y = batch(num_samples, F64, number)
        if number in is_marked_at:
            x[-1, 0, 0, 0] = MARK  # the last rank's, not among the first two samples of its part
        try:
            step(x, y, optimizer)
        except (ValueError, RuntimeError, KeyError) as error:
            assert "broken sample" in str(error), error
            skipped.append((number, type(error)))
    return skipped


def plain_step(model):
    def step(x, y, optimizer):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


@pytest.mark.parametrize("place", ["before", "after", "backward"])
@pytest.mark.parametrize("kind", [Net, NormNet], ids=["plain", "batchnorm"])
@mixed
def test_skipped_batches(world, kind, place):
    """`except: continue` skips the batch on every rank, also if it is the first, as it does in one process."""
    model = Fragile(kind(F64), place, KeyError("broken sample"))
    reference = copy.deepcopy(model)
    expected = train(reference, plain_step(reference), {0, 2})
    assert [number for number, _ in expected] == [0, 2]
    trainer = create_distributed_trainer(model)

    def step(x, y, optimizer):
        trainer.train_step(x, y, nn.CrossEntropyLoss(), optimizer)

    assert train(model, step, {0, 2}) == expected
    if kind is NormNet and place == "before" and world.size > 1:
        return  # in one process no sample of the batch reaches BatchNorm's statistics, here the other ranks' do
    assert_same(model, reference, 1e-10)
    trainer.close()


@pytest.mark.parametrize(
    "options",
    [{"microbatches": 2}, {"microbatches": "auto"}, {"reproducible": 4}, {"shard": "optimizer"}],
    ids=["microbatches", "auto", "reproducible", "sharded"],
)
@several
def test_options(world, options):
    microbatches = options.pop("microbatches", 1)
    model = Fragile(Net(F64), "after", RuntimeError("broken sample"))
    reference = copy.deepcopy(model)
    expected = train(reference, plain_step(reference), {1, 3})
    trainer = create_distributed_trainer(model, **options)

    def step(x, y, optimizer):
        trainer.train_step(x, y, nn.CrossEntropyLoss(), optimizer, microbatches=microbatches)

    assert train(model, step, {1, 3}) == expected
    assert_same(model, reference, 1e-10)
    trainer.close()


@several
def test_compression(world):
    """PowerSGD keeps nothing of a step that was not made."""
    model = Fragile(Net(F64), "backward", RuntimeError("broken sample"))
    trainer = create_distributed_trainer(model, compression=PowerSGD(rank=64))
    reference = copy.deepcopy(model)
    train(reference, plain_step(reference), {1, 3})
    train(model, lambda x, y, o: trainer.train_step(x, y, nn.CrossEntropyLoss(), o), {1, 3})
    assert_same(model, reference, 1e-5)
    trainer.close()


@several
def test_other_ranks(world):
    """The other ranks' exception is of the same type, with the traceback of its rank; or of our own, if need be."""
    model = Fragile(Net(F64), "after", BadSampleError("broken sample", "3"))
    trainer = create_distributed_trainer(model)
    x, y = batch(12, F64)
    x[-1, 0, 0, 0] = MARK
    with pytest.raises((BadSampleError, RuntimeError), match="broken sample at 3") as raised:
        trainer.train_step(x, y, nn.CrossEntropyLoss(), sgd(model))
    is_own = world.rank == world.size - 1
    assert isinstance(raised.value, BadSampleError) == is_own
    if not is_own:
        assert f"raised on rank {world.size - 1}" in str(raised.value.__cause__)
        assert "in forward" in str(raised.value.__cause__)
    trainer.close()


@several
def test_terms_of_the_first_step(world):
    """In a first step, the rank that fails does not know how many terms the loss has."""
    model = Fragile(Net(F64), "after", KeyError("broken sample"))
    trainer = create_distributed_trainer(model)
    x, y = batch(12, F64)
    x[-1, 0, 0, 0] = MARK

    def terms(outputs, targets):
        loss = nn.functional.cross_entropy(outputs, targets)
        return loss, 2 * loss

    with pytest.raises(KeyError, match="broken sample"):
        trainer.train_step(x, y, terms, sgd(model))


@several
def test_stuck_in_batchnorm(world):
    """If no sample of the rank reaches BatchNorm, no rank waits for it."""
    model = Fragile(NormNet(F64), "before", KeyError("broken sample"))
    trainer = create_distributed_trainer(model)
    x, y = batch(12, F64)
    x[12 - 12 // world.size :, 0, 0, 0] = MARK  # all samples of the last rank
    is_own = world.rank == world.size - 1
    with pytest.raises(KeyError if is_own else MismatchError):
        trainer.train_step(x, y, nn.CrossEntropyLoss(), sgd(model))


@several
def test_backward_of_a_manual_loop(world):
    model = Fragile(Net(F64), "backward", KeyError("broken sample"))
    reference = copy.deepcopy(model)
    expected = train(reference, plain_step(reference), {0, 2})
    trainer = create_distributed_trainer(model)

    def step(x, y, optimizer):
        optimizer.zero_grad()
        x, y = trainer.split((x, y))
        trainer.backward(nn.functional.cross_entropy(model(x), y), weight=len(y))
        trainer.step(optimizer)

    assert train(model, step, {0, 2}) == expected
    assert_same(model, reference, 1e-10)
    trainer.close()


def manual_steps(world, model, trainer, batches, retries):
    """Skip or repeat the forward of a batch that raises on the last rank. Return how many raised on this rank."""
    num_caught = 0
    for x, y in batches:
        try:
            with trainer.forward():
                loss = nn.functional.cross_entropy(model(x), y)
        except KeyError:
            num_caught += 1
            if not retries:
                continue
            with trainer.forward():
                loss = nn.functional.cross_entropy(model(x.clamp(max=3)), y)
        trainer.backward(loss, weight=len(y))
    return num_caught


@several
def test_forward_of_a_manual_loop(world):
    """A rank that skips a batch by itself, while the others wait in its backward, is found in its next backward."""
    model = Fragile(Net(F64), "after", KeyError("broken sample"))
    trainer = create_distributed_trainer(model)
    before = copy.deepcopy(model.state_dict())
    x, y = batch(24, F64)
    x[11, 0, 0, 0] = MARK  # the last rank's, in the first of two batches
    loader = trainer.loader(TensorDataset(x, y), 12)
    with pytest.raises(MismatchError, match=rf"on rank {world.size - 1} \(KeyError: 'broken sample'\)") as raised:
        manual_steps(world, model, trainer, loader, retries=False)
    same_message(world, raised)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    trainer.close()


@several
def test_forward_that_is_repeated(world):
    """A rank may repeat its forward in another way; a rank with data of its own may skip some of it."""
    model = Fragile(Net(F64), "after", KeyError("broken sample"))
    trainer = create_distributed_trainer(model)
    x, y = batch(24, F64)
    x[11, 0, 0, 0] = MARK
    is_last = world.rank == world.size - 1
    loader = trainer.loader(TensorDataset(x, y), 12)
    assert manual_steps(world, model, trainer, loader, retries=True) == is_last
    good, marked = (x[12:], y[12:]), (x[:12], y[:12])
    own = [marked, good, good] if is_last else [good, good]
    assert manual_steps(world, model, trainer, own, retries=False) == is_last
    trainer.close()


@several
def test_forward_that_raises_on_all_ranks(world):
    """Every rank skips the batch: nothing is wrong."""
    model = Fragile(Net(F64), "after", KeyError("broken sample"))
    trainer = create_distributed_trainer(model)
    for number in range(3):
        x, y = batch(4, F64, number)
        if number == 1:
            x[-1, 0, 0, 0] = MARK
        try:
            with trainer.forward():
                loss = nn.functional.cross_entropy(model(x), y)
        except KeyError:
            continue
        trainer.backward(loss, weight=4)
    trainer.close()


class Embedded(nn.Module):
    """Model whose forward is collective, since `max_norm` is."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(10, 4, max_norm=1.0, dtype=F64)
        self.linear = nn.Linear(4, 4, dtype=F64)

    def forward(self, tokens):
        return self.linear(self.embedding(tokens))


@pytest.mark.parametrize("kind", ["batchnorm", "max_norm"])
@mixed
def test_wrong_label_of_a_first_sample(world, kind):
    """The dummy that completes a step has the label that the criterion refuses, too: it does without the criterion."""
    model = NormNet(F64) if kind == "batchnorm" else Embedded()
    reference = copy.deepcopy(model)
    trainer = create_distributed_trainer(model)
    optimizers = sgd(model), sgd(reference)
    for step in range(4):
        x, y = batch(4 * world.size, F64, step)
        x = torch.randint(0, 10, (len(y),)) if kind == "max_norm" else x
        if step in (0, 2):
            y[-4] = 7  # the first label of the last rank
        try:
            optimizers[1].zero_grad()
            nn.functional.cross_entropy(reference(x), y).backward()
            optimizers[1].step()
        except IndexError:
            with pytest.raises(IndexError, match="Target 7 is out of bounds"):
                trainer.train_step(x, y, nn.CrossEntropyLoss(), optimizers[0])
        else:
            trainer.train_step(x, y, nn.CrossEntropyLoss(), optimizers[0])
    assert_same(model, reference, 1e-10)
    trainer.close()


@several
def test_stuck_in_max_norm(world):
    """If no sample of the rank can make the calls of `max_norm`, no rank waits, and the error names the cause."""
    model = Embedded()
    trainer = create_distributed_trainer(model)
    tokens, y = torch.zeros(4 * world.size, dtype=torch.long), torch.zeros(4 * world.size, dtype=torch.long)
    is_own = world.rank == world.size - 1
    if is_own:
        model.forward = lambda _: 1 / 0
    with pytest.raises(ZeroDivisionError if is_own else MismatchError) as raised:
        trainer.train_step(tokens, y, nn.CrossEntropyLoss(), sgd(model))
    if not is_own:
        assert "train_step (ZeroDivisionError)" in str(raised.value)


class Unprintable(Exception):
    def __str__(self):
        raise AttributeError("a typo")


@several
def test_exception_without_text(world):
    model = Fragile(Net(F64), "after", Unprintable())
    trainer = create_distributed_trainer(model)
    x, y = batch(12, F64)
    x[-1, 0, 0, 0] = MARK
    for microbatches in (1, "auto"):
        with pytest.raises(Unprintable):
            trainer.train_step(x, y, nn.CrossEntropyLoss(), sgd(model), microbatches=microbatches)
    trainer.close()


@several
def test_skipped_part(world):
    """A script that skips its own part of a batch of trainer.loader is found in the rank's next step."""
    model = Net(F64)
    trainer = create_distributed_trainer(model)
    optimizer = sgd(model)
    x, y = batch(36, F64)
    loader = trainer.loader(TensorDataset(x, y), 12)
    with pytest.raises(MismatchError, match=r"rank 0 has batch 2 of epoch 0.* such as by `continue`") as raised:
        for number, (inputs, targets) in enumerate(loader):
            if number == 1 and world.rank == world.size - 1:
                continue
            trainer.train_step(inputs, targets, nn.CrossEntropyLoss(), optimizer)
    assert f"rank {world.size - 1} has batch 3 of epoch 0" in same_message(world, raised)
    trainer.close()


@several
def test_look_at_one_rank(world):
    """A rank may read other loaders alone, and look ahead in none that the training uses."""
    model = Net(F64)
    trainer = create_distributed_trainer(model)
    optimizer, dataset = sgd(model), TensorDataset(*batch(24, F64))
    loader, other = trainer.loader(dataset, 12), trainer.loader(dataset, 12)
    for inputs, targets in loader:
        if trainer.is_main:
            next(iter(other))
        trainer.train_step(inputs, targets, nn.CrossEntropyLoss(), optimizer)
    trainer.close()
