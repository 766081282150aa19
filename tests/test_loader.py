# SPDX-License-Identifier: Apache-2.0
"""trainer.loader: each rank reads its part, and the samples are those of one process, in its order."""

import functools
import itertools
import random

import numpy as np
import pytest
import torch
from ranks import mixed_and_four, on_ranks, one_node
from test_exactness import F64, Net, NormNet, batch
from test_microbatches import accumulated_step, assert_same, sgd
from torch import nn
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from distributed_trainer import create_distributed_trainer
from distributed_trainer.data import part_bounds
from distributed_trainer.loader import PartLoader


def part_of(rank, world_size):
    return lambda: functools.partial(part_bounds, rank=rank, world_size=world_size)


class Squares(Dataset):
    """Counts what is read, and draws from all streams, as augmentation does."""

    def __init__(self, num_samples):
        self.num_samples = num_samples
        self.read = []

    def __len__(self):
        return self.num_samples

    def __getitem__(self, index):
        self.read.append(index)
        return index, torch.tensor([random.random(), np.random.rand(), torch.rand(()).item()], dtype=F64)


class Stream(IterableDataset):
    def __init__(self, num_samples):
        self.num_samples = num_samples

    def __iter__(self):
        yield from range(self.num_samples)


def whole(loader_of, num_ranks):
    """Batches that the parts of all ranks make up."""
    parts = zip(*(loader_of(rank) for rank in range(num_ranks)), strict=True)
    return [[torch.cat(tensors) for tensors in zip(*part, strict=True)] for part in parts]


SIZES = {0: [], 1: [1], 10: [5, 5], 17: [5, 5, 5, 2]}  # of the batches


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("num_samples", SIZES)
def test_same_for_any_number_of_ranks(num_samples, shuffle):
    """Batches, their order in three epochs, and what the samples drew."""
    epochs = {}
    for num_ranks in (1, 2, 3, 4):
        loaders = [
            PartLoader(Squares(num_samples), 5, part_of(r, num_ranks), 7, shuffle=shuffle) for r in range(num_ranks)
        ]
        epochs[num_ranks] = [whole(loaders.__getitem__, num_ranks) for _ in range(3)]
        assert all(len(loader) == -(-num_samples // 5) for loader in loaders)
        for epoch in epochs[num_ranks]:
            assert [len(index) for index, _ in epoch] == SIZES[num_samples]
            assert sorted(i for index, _ in epoch for i in index.tolist()) == list(range(num_samples))
        torch.testing.assert_close(epochs[num_ranks], epochs[1], rtol=0, atol=0)
    if num_samples > 5:
        orders = [[i for index, _ in epoch for i in index.tolist()] for epoch in epochs[1]]
        assert (orders[0] != orders[1]) == shuffle
        draws = [torch.cat([drawn for _, drawn in epoch]) for epoch in epochs[1]]
        assert not torch.equal(draws[0], draws[1])
        assert len(draws[0].unique()) == draws[0].numel()


def test_reads_its_part_only():
    datasets = [Squares(17) for _ in range(3)]
    for rank, dataset in enumerate(datasets):
        list(PartLoader(dataset, 5, part_of(rank, 3), 7))
    assert [len(dataset.read) for dataset in datasets] == [7, 7, 4]  # of the last 2 rank 2 reads one, for its shape


def test_own_streams_go_on():
    """Reading leaves the user's random numbers as they are."""
    torch.manual_seed(3)
    expected = torch.rand(2).tolist()
    torch.manual_seed(3)
    loader = iter(PartLoader(Squares(10), 5, part_of(0, 2), 7))
    drawn = []
    for _ in range(2):
        state = torch.get_rng_state()  # DataLoader draws a seed for its workers at the start of an epoch
        next(loader)
        torch.set_rng_state(state)
        drawn.append(torch.rand(()).item())
    assert drawn == expected


def test_workers():
    """By fork, two of them; the same samples."""
    loaders = [PartLoader(Squares(17), 5, part_of(1, 2), 7, shuffle=True, num_workers=number) for number in (0, 2)]
    for _ in range(2):
        torch.testing.assert_close(*(list(loader) for loader in loaders), rtol=0, atol=0)


def test_drop_last():
    loader = PartLoader(Squares(17), 5, part_of(1, 2), 7, drop_last=True)
    assert len(loader) == 3
    assert [len(index) for index, _ in loader] == [2, 2, 2]


@pytest.mark.parametrize("make", [Squares, Stream])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_resume(make, num_workers):
    """At any step, the rest of the epoch and then the next ones."""

    def read(loader):
        return [part[0].tolist() if make is Squares else part.tolist() for part in loader]

    options = {"num_workers": num_workers} | ({"shuffle": True} if make is Squares else {})
    expected = PartLoader(make(17), 5, part_of(0, 2), 7, **options)
    epochs = [read(expected) for _ in range(3)]
    for num_read in range(5):
        first = PartLoader(make(17), 5, part_of(0, 2), 7, **options)
        assert read(first) == epochs[0]
        for _, part in zip(range(num_read), first, strict=False):
            state = first.state_dict()
            assert part is not None
        if num_read == 0:
            state = first.state_dict()
        resumed = PartLoader(make(17), 5, part_of(0, 2), 8, **options)  # the seed comes with the state
        resumed.load_state_dict(state)
        assert read(resumed) == epochs[1][num_read:]
        assert read(resumed) == epochs[2]


def test_left_early():
    """A loop that was left is not gone on with: the next one is an epoch of its own."""
    loader = PartLoader(Squares(17), 5, part_of(0, 1), 7)
    next(iter(loader))
    assert loader.state_dict() == {"epoch": 0, "num_read": 1, "seed": 7}
    assert len(list(loader)) == 4
    assert loader.state_dict() == {"epoch": 2, "num_read": 0, "seed": 7}


@pytest.mark.parametrize("num_workers", [0, 1])
def test_iterable(num_workers):
    loaders = [PartLoader(Stream(12), 5, part_of(rank, 3), 7, num_workers=num_workers) for rank in range(3)]
    parts = [[part.tolist() for part in loader] for loader in loaders]
    assert parts == [[[0, 1], [5, 6], [10]], [[2, 3], [7, 8], [11]], [[4], [9], []]]
    with pytest.raises(TypeError, match="has no length"):
        len(loaders[0])


def test_wrong_arguments():
    for options, text in [
        ({"batch_size": 0}, "batch_size must be an int of at least 1"),
        ({"sampler": range(3)}, "sampler does not go with trainer.loader"),
        ({"batch_sampler": [[0]]}, "batch_sampler does not go with"),
    ]:
        with pytest.raises(ValueError, match=text):
            PartLoader(Squares(10), **{"batch_size": 5, "split": part_of(0, 1), "seed": 7, **options})
    with pytest.raises(ValueError, match="shuffle=True needs a dataset with an index"):
        PartLoader(Stream(10), 5, part_of(0, 1), 7, shuffle=True)
    with pytest.raises(ValueError, match="num_workers=1"):
        PartLoader(Stream(10), 5, part_of(0, 1), 7, num_workers=2)


@pytest.mark.parametrize("net", [Net, NormNet])
@mixed_and_four
def test_training(world, net):
    """Against one process on whole batches; some ranks have no part of the last batch of an epoch."""
    x, y = batch(14, F64)
    model, reference = net(F64), net(F64)
    trainer = create_distributed_trainer(model)
    loader = trainer.loader(TensorDataset(x, y, torch.arange(14)), 6, shuffle=True)
    optimizer, plain_optimizer = sgd(model), sgd(reference)
    orders = []
    for _ in range(3):
        for inputs, targets, index in loader:
            indices = [i for part in world.gather(index.tolist()) for i in part]
            orders.append(indices)
            tensors = (x[indices], y[indices])
            accumulated_step(reference, tensors, 1, len, nn.CrossEntropyLoss(), plain_optimizer)
            trainer.train_step(inputs, targets, nn.CrossEntropyLoss(), optimizer)
    assert [len(order) for order in orders] == [6, 6, 2] * 3
    assert sorted(itertools.chain(*orders[:3])) == list(range(14))
    assert orders[:3] != orders[3:6]
    assert_same(model, reference, 1e-9)
    trainer.close()


@one_node
def test_dropout_differs(world):
    """Ranks that read parts draw differently, and stay in step elsewhere."""
    model = nn.Sequential(nn.Linear(3, 40), nn.Dropout())
    trainer = create_distributed_trainer(model)
    loader = trainer.loader(TensorDataset(torch.ones(8, 3), torch.zeros(8, 40)), 8)
    masks = []
    model.register_forward_hook(lambda module, inputs, output: masks.append(tuple((output[0] == 0).tolist())))
    for inputs, targets in loader:
        trainer.train_step(inputs, targets, nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=0.1))
    assert len(set(world.gather(masks[0]))) == world.size
    assert len(set(world.gather(torch.rand(()).item()))) == 1
    trainer.close()


@on_ranks(2)
def test_not_after_whole_batches(world):
    trainer = create_distributed_trainer(model := Net(F64))
    trainer.train_step(*batch(8, F64), nn.CrossEntropyLoss(), sgd(model))
    with pytest.raises(ValueError, match="has trained on whole batches"):
        trainer.loader(TensorDataset(*batch(8, F64)), 4)
    trainer.close()


def test_seed():
    """torch's decides on the order."""
    orders = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        trainer = create_distributed_trainer(nn.Linear(1, 1))
        orders.append(torch.cat([part for part, _ in trainer.loader(Squares(20), 2, shuffle=True)]).tolist())
        trainer.close()
    assert orders[0] == orders[1] != orders[2]


def test_epochs():
    """All of them, or those that the loader's state leaves, the first from its middle."""
    trainer = create_distributed_trainer(nn.Linear(1, 1))
    loader = trainer.loader(Squares(6), 2, shuffle=True)
    seen = {epoch: [part.tolist() for part, _ in loader] for epoch in trainer.epochs(3)}
    assert list(seen) == [0, 1, 2]
    state = {"epoch": 1, "num_read": 2, "seed": loader.state_dict()["seed"]}
    resumed = trainer.loader(Squares(6), 2, shuffle=True)
    resumed.load_state_dict(state)
    rest = {epoch: [part.tolist() for part, _ in resumed] for epoch in trainer.epochs(3)}
    assert rest == {1: seen[1][2:], 2: seen[2]}
    assert list(trainer.epochs(2)) == [0, 1]  # that state was used
    for wrong in (-1, 2.0, True):
        with pytest.raises(ValueError, match="num_epochs must be an int of at least 0"):
            list(trainer.epochs(wrong))
    trainer.close()
