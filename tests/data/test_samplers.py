# SPDX-License-Identifier: Apache-2.0
"""Tests of trainer.loader with samplers: global batches are those of torch's DataLoader with the same sampler."""

import contextlib
import functools
import itertools
import os
import random

import numpy as np
import pytest
import torch
from one_process import accumulated_step, assert_same
from ranks import mixed, on_ranks, same_message
from small_models import F64, Net, Squares, batch, sgd
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from distributed_trainer import MismatchError, create_distributed_trainer
from distributed_trainer.data import rng
from distributed_trainer.data.loader import ShardedDataLoader
from distributed_trainer.data.position import DataPosition
from distributed_trainer.data.split import part_bounds

NUM_SAMPLES = 17
LENGTHS = [index * 7 % 13 + 1 for index in range(NUM_SAMPLES)]


class Buckets(Sampler):
    """Batches of samples of like lengths, in an order that is drawn from `random`."""

    def __iter__(self):
        order = sorted(range(NUM_SAMPLES), key=LENGTHS.__getitem__)
        batches = [order[start : start + 4] for start in range(0, NUM_SAMPLES, 4)]
        random.shuffle(batches)
        yield from batches

    def __len__(self):
        return 5


class Tokens(Sampler):
    """Batches of at most 20 tokens, in an order that is drawn from a generator of NumPy."""

    def __init__(self):
        self.generator = np.random.default_rng()

    def __iter__(self):
        taken = []
        for index in self.generator.permutation(NUM_SAMPLES).tolist():
            if sum(LENGTHS[other] for other in [*taken, index]) > 20:
                yield taken
                taken = []
            taken.append(index)
        yield taken


class ByEpoch(Sampler):
    """Indices in an order that is drawn from the epoch's number alone."""

    epoch = -1

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        yield from random.Random(self.epoch).sample(range(NUM_SAMPLES), 12)

    def __len__(self):
        return 12


SAMPLERS = {
    "weighted": lambda: {"batch_size": 5, "sampler": WeightedRandomSampler(range(1, NUM_SAMPLES + 1), 13)},
    "own generator": lambda: {
        "batch_size": 5,
        "sampler": WeightedRandomSampler(LENGTHS, 13, generator=torch.Generator()),
        "drop_last": True,
    },
    "subset": lambda: {"batch_size": 4, "sampler": SubsetRandomSampler([3, 1, 4, 15, 9, 2])},
    "list": lambda: {"batch_size": 4, "sampler": [3, 1, 4, 1, 5]},
    "by epoch": lambda: {"batch_size": 5, "sampler": ByEpoch()},
    "buckets": lambda: {"batch_sampler": Buckets()},
    "tokens": lambda: {"batch_sampler": Tokens()},
    "nested": lambda: {"batch_sampler": BatchSampler(RandomSampler(range(9), generator=torch.Generator()), 4, True)},
}
kinds = pytest.mark.parametrize("kind", SAMPLERS)


def loaders_of(num_ranks, kind, dataset=None, **options):
    """Return the loaders of all ranks. Each rank has a sampler of its own."""
    loaders = []
    for rank in range(num_ranks):
        part_of = functools.partial(part_bounds, rank=rank, world_size=num_ranks)
        arguments = {"batch_size": None, **SAMPLERS[kind](), **options}
        data = Squares(NUM_SAMPLES) if dataset is None else dataset
        loaders.append(ShardedDataLoader(data, split=lambda part_of=part_of: part_of, seed=7, **arguments))
    return loaders


def whole(loaders):
    """Return the global batches that the parts of all ranks make up; between two, each rank's script draws numbers."""
    batches = []
    for parts in zip(*loaders, strict=True):
        torch.rand(len(batches)), random.random(), np.random.rand()
        batches.append([torch.cat(tensors) for tensors in zip(*parts, strict=True)])
    return batches


def orders(batches):
    return [index.tolist() for index, *_ in batches]


def plain(kind, epoch):
    """Return the batches of torch's DataLoader, in one process, with the seeds of this epoch."""
    options = SAMPLERS[kind]()
    for sampler in options.values():
        for one in (sampler, getattr(sampler, "sampler", None)):
            rng.seed_generators(one, rng.mix(7, epoch, "sampler"))
            with contextlib.suppress(AttributeError):
                one.set_epoch(epoch)
    with rng.preserved():
        rng.seed_host(rng.mix(7, epoch))
        return orders([[indices] for indices in DataLoader(range(NUM_SAMPLES), generator=torch.Generator(), **options)])


@kinds
def test_same_as_torch(kind):
    """Batches are torch's, and the samples' random numbers are the same for any number of ranks and workers."""
    epochs = {}
    for num_ranks, workers in [(1, 0), (2, 0), (3, 0), (2, 2)][: 4 if kind == "tokens" else 3]:
        loaders = loaders_of(num_ranks, kind, num_workers=workers)
        epochs[num_ranks, workers] = [whole(loaders) for _ in range(2)]
        torch.testing.assert_close(epochs[num_ranks, workers], epochs[1, 0], rtol=0, atol=0)
    assert [orders(epoch) for epoch in epochs[1, 0]] == [plain(kind, 0), plain(kind, 1)]
    assert (orders(epochs[1, 0][0]) != orders(epochs[1, 0][1])) == (kind != "list")
    draws = torch.cat([drawn for epoch in epochs[1, 0] for _, drawn in epoch])
    assert len(draws.unique()) == draws.numel()  # also for a sample that is drawn twice
    if kind != "tokens":  # it has no length
        assert len(loaders[0]) == len(epochs[1, 0][0])


@kinds
def test_resume(kind):
    """A loader resumes at any batch, on another number of ranks, with the rest of the epoch, then the next one."""
    first = loaders_of(2, kind)
    whole(first)
    states, seen = [], []
    for parts in zip(*first, strict=True):
        seen.append(torch.cat([part[0] for part in parts]).tolist())
        (state,) = {tuple(loader.state_dict().items()) for loader in first}
        states.append(dict(state))
    following = orders(whole(first))
    for number, state in enumerate(states, 1):
        resumed = loaders_of(3, kind)
        for loader in resumed:
            loader.load_state_dict(state)
        assert orders(whole(resumed)) == seen[number:]
        assert orders(whole(resumed)) == following


class Stateful(Sampler):
    """Indices in an order that depends on how often it was drawn."""

    num_draws = 0

    def __iter__(self):
        self.num_draws += 1
        yield from np.random.default_rng(self.num_draws).permutation(10).tolist()


@pytest.mark.parametrize("sampler", [Stateful, lambda: range(2)])
def test_draws_again_differently(sampler):
    """To continue in the middle of an epoch with other samples is an error."""
    stateful = Stateful()
    loader = ShardedDataLoader(Squares(10), 4, lambda: lambda number: (0, number), 7, sampler=stateful)
    list(loader)
    next(iter(loader))
    resumed = ShardedDataLoader(Squares(10), 4, lambda: lambda number: (0, number), 7, sampler=sampler())
    resumed.load_state_dict(loader.state_dict())
    with pytest.raises(ValueError, match="the first 1 batches of epoch 1 are not those that were read of it before"):
        list(resumed)


def test_read_again():
    """When the ranks have changed, the batch in progress is read again, even if the sampler is stateful."""
    positions, sizes = DataPosition(), [2, 4]
    data = TensorDataset(torch.arange(10))
    loader = ShardedDataLoader(data, 4, lambda: lambda number: (0, sizes[0]), 7, sampler=Stateful())
    positions.add(loader)
    (part,) = next(iter(loader))
    sizes.reverse()
    again, _ = positions.read_again(part, part)
    assert len(part) == 2
    assert again[:2].tolist() == part.tolist()
    assert again.tolist() == np.random.default_rng(1).permutation(10).tolist()[:4]


@pytest.mark.parametrize("kind", ["weighted", "tokens"])
@mixed
def test_training(world, kind):
    """Compare with one process on whole batches of any sizes."""
    x, y = batch(NUM_SAMPLES, F64)
    model, reference = Net(F64), Net(F64)
    trainer = create_distributed_trainer(model)
    loader = trainer.loader(TensorDataset(x, y, torch.arange(NUM_SAMPLES)), **SAMPLERS[kind]())
    optimizer, plain_optimizer = sgd(model), sgd(reference)
    for _ in range(2):
        for inputs, targets, index in loader:
            indices = list(itertools.chain(*world.gather(index.tolist())))
            expected, _ = accumulated_step(
                reference, (x[indices], y[indices]), 1, len, nn.CrossEntropyLoss(), plain_optimizer
            )
            loss = trainer.train_step(inputs, targets, nn.CrossEntropyLoss(), optimizer)
            torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    assert_same(model, reference, 1e-9)
    trainer.close()


class OwnDraw(Sampler):
    """Indices that each process draws in its own way."""

    def __iter__(self):
        while True:
            yield int.from_bytes(os.urandom(7), "little") % NUM_SAMPLES


@pytest.mark.parametrize("way", ["step", "reproducible", "manual", "length"])
@on_ranks(2, 3)
def test_differs_between_ranks(world, way):
    """Samplers, or datasets, that differ between ranks raise the same error on every rank."""
    model = nn.Linear(1, 1)
    trainer = create_distributed_trainer(model, reproducible=4 if way == "reproducible" else None)
    num_samples = NUM_SAMPLES + (world.rank == 1) * (way == "length")
    data = TensorDataset(torch.randn(num_samples, 1), torch.randn(num_samples, 1))
    loader = trainer.loader(data, 8, **({"shuffle": True} if way == "length" else {"sampler": OwnDraw()}))
    for inputs, targets in loader:
        with pytest.raises(MismatchError, match=r"on rank 0 are not those on rank 1: .*set_epoch") as raised:
            if way == "manual":
                with trainer.forward():
                    loss = (model(inputs) - targets).square().mean()
                trainer.backward(loss, len(inputs))
            else:
                trainer.train_step(inputs, targets, nn.MSELoss(), sgd(model))
        same_message(world, raised)
        break
    trainer.close()
