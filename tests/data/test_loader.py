# SPDX-License-Identifier: Apache-2.0
"""Tests of trainer.loader: each rank reads its part, and the samples and their order are those of one process."""

import functools
import itertools
import os
import random

import numpy as np
import pytest
import torch
from one_process import accumulated_step, assert_same
from ranks import mixed_and_four, on_ranks, one_node, same_message
from small_models import F64, Net, NormNet, Squares, batch, sgd
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, TensorDataset, default_collate, get_worker_info
from torch.utils.data.distributed import DistributedSampler

from distributed_trainer import RankLostError, create_distributed_trainer
from distributed_trainer.data.loader import ShardedDataLoader
from distributed_trainer.data.position import DataPosition
from distributed_trainer.data.split import part_bounds


def part_of(rank, world_size):
    return lambda: functools.partial(part_bounds, rank=rank, world_size=world_size)


class Stream(IterableDataset):
    def __init__(self, num_samples):
        self.num_samples = num_samples

    def __iter__(self):
        yield from range(self.num_samples)


def whole(loader_of, num_ranks):
    """Return the global batches that the parts of all ranks make up."""
    parts = zip(*(loader_of(rank) for rank in range(num_ranks)), strict=True)
    return [[torch.cat(tensors) for tensors in zip(*part, strict=True)] for part in parts]


SIZES = {0: [], 1: [1], 10: [5, 5], 17: [5, 5, 5, 2]}  # sizes of the batches, by the number of samples


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("num_samples", SIZES)
def test_same_for_any_number_of_ranks(num_samples, shuffle):
    """Batches, their order in three epochs, and the samples' random numbers are the same for any number of ranks."""
    epochs = {}
    for num_ranks in (1, 2, 3, 4):
        parts = [part_of(rank, num_ranks) for rank in range(num_ranks)]
        loaders = [ShardedDataLoader(Squares(num_samples), 5, part, 7, shuffle=shuffle) for part in parts]
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
        list(ShardedDataLoader(dataset, 5, part_of(rank, 3), 7))
    # Rank 2 has none of the last 2 samples, and reads one for its shape.
    assert [len(dataset.read) for dataset in datasets] == [7, 7, 4]


def test_own_streams_go_on():
    """Reading samples does not change the user's random streams."""
    torch.manual_seed(3)
    expected = torch.rand(2).tolist()
    torch.manual_seed(3)
    loader = iter(ShardedDataLoader(Squares(10), 5, part_of(0, 2), 7))
    drawn = []
    for _ in range(2):
        next(loader)
        drawn.append(torch.rand(()).item())
    assert drawn == expected


def test_workers():
    """Two forked workers give the same samples as no workers."""
    options = [{"shuffle": True, "num_workers": number} for number in (0, 2)]
    loaders = [ShardedDataLoader(Squares(17), 5, part_of(1, 2), 7, **own) for own in options]
    for _ in range(2):
        torch.testing.assert_close(*(list(loader) for loader in loaders), rtol=0, atol=0)


class ShuffledStream(Stream):
    """Iterable dataset that shuffles, as its samples do, by all random streams."""

    def __iter__(self):
        order = np.random.permutation(self.num_samples).tolist()
        random.shuffle(order)
        for index in order:
            yield index, torch.rand(2)


def mixed_up(samples):
    """Collate samples with a weight for the batch, and an order of the part."""
    weight, order = np.random.beta(0.4, 0.4), torch.randperm(len(samples))
    return torch.tensor([weight] * len(samples)), default_collate(samples), order, random.random()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_draws(num_workers):
    """Draws of an iterable dataset and of a collate function follow from the seed; the script's streams stay alone."""

    def read(num_ranks, first=0, workers=num_workers):
        epochs = []
        loaders = [
            ShardedDataLoader(
                ShuffledStream(13), 5, part_of(rank, num_ranks), 7, collate_fn=mixed_up, num_workers=workers
            )
            for rank in range(num_ranks)
        ]
        for loader in loaders:
            loader.load_state_dict({"epoch": 0, "num_read": first, "seed": 7})
        for _ in range(2):
            batches = [[] for _ in range(3)]
            for loader in loaders:
                torch.rand(3), random.random(), np.random.rand()  # by the script
                before = torch.get_rng_state(), random.getstate(), np.random.get_state()[2]
                for number, (weight, (index, drawn), _, common) in enumerate(loader, loader.position.num_read):
                    batches[number] += zip(
                        weight.tolist(), index.tolist(), drawn.tolist(), [common] * len(index), strict=True
                    )
                assert torch.equal(torch.get_rng_state(), before[0])
                assert (random.getstate(), np.random.get_state()[2]) == before[1:]
            epochs.append(batches)
        return epochs

    expected = read(1, workers=0)
    assert read(1) == read(2) == read(3) == expected
    first, second = ([index for batch in epoch for _, index, *_ in batch] for epoch in expected)
    assert sorted(first) == sorted(second) == list(range(13))
    assert list(range(13)) != first != second
    assert len({weight for epoch in expected for batch in epoch for weight, *_ in batch}) == 6
    assert read(2, first=1)[0][1:] == expected[0][1:], "resumed"


def test_drop_last():
    loader = ShardedDataLoader(Squares(17), 5, part_of(1, 2), 7, drop_last=True)
    assert len(loader) == 3
    assert [len(index) for index, _ in loader] == [2, 2, 2]


@pytest.mark.parametrize("make", [Squares, Stream])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_resume(make, num_workers):
    """A loader resumes at any step with the rest of the epoch, then the next epochs."""

    def read(loader):
        return [part[0].tolist() if make is Squares else part.tolist() for part in loader]

    options = {"num_workers": num_workers} | ({"shuffle": True} if make is Squares else {})
    expected = ShardedDataLoader(make(17), 5, part_of(0, 2), 7, **options)
    epochs = [read(expected) for _ in range(3)]
    for num_read in range(5):
        first = ShardedDataLoader(make(17), 5, part_of(0, 2), 7, **options)
        assert read(first) == epochs[0]
        for _, part in zip(range(num_read), first, strict=False):
            state = first.state_dict()
            assert part is not None
        if num_read == 0:
            state = first.state_dict()
        resumed = ShardedDataLoader(make(17), 5, part_of(0, 2), 8, **options)  # the seed is part of the state
        resumed.load_state_dict(state)
        assert read(resumed) == epochs[1][num_read:]
        assert read(resumed) == epochs[2]


def test_left_early():
    """After an iteration that ended early, the next iteration is a new epoch."""
    loader = ShardedDataLoader(Squares(17), 5, part_of(0, 1), 7)
    next(iter(loader))
    assert loader.state_dict() == {"epoch": 0, "num_read": 1, "seed": 7, "checksum": 5}
    assert len(list(loader)) == 4
    assert loader.state_dict() == {"epoch": 2, "num_read": 0, "seed": 7, "checksum": 0}


@pytest.mark.parametrize("num_workers", [0, 1])
def test_iterable(num_workers):
    loaders = [ShardedDataLoader(Stream(12), 5, part_of(rank, 3), 7, num_workers=num_workers) for rank in range(3)]
    parts = [[part.tolist() for part in loader] for loader in loaders]
    assert parts == [[[0, 1], [5, 6], [10]], [[2, 3], [7, 8], [11]], [[4], [9], []]]
    with pytest.raises(TypeError, match="has no length"):
        len(loaders[0])


def test_wrong_arguments():
    for options, text in [
        ({"batch_size": 0}, "batch_size, .* must be an int of at least 1, not 0"),
        ({"batch_size": None}, "batch_size, .* must be an int of at least 1, not None"),
        ({"sampler": range(3), "shuffle": True}, "the sampler decides the order: pass no shuffle"),
        ({"batch_sampler": [[0]]}, "pass no batch_size, shuffle, sampler or drop_last"),
        ({"batch_size": None, "batch_sampler": [[0]], "drop_last": True}, "pass no batch_size, shuffle, sampler"),
        ({"sampler": DistributedSampler(range(3), 2, 0)}, "DistributedSampler gives each rank its own samples"),
        (
            {"batch_size": 1, "batch_sampler": BatchSampler(DistributedSampler(range(3), 2, 0), 2, False)},
            "leave the sampler out, and pass shuffle=True or False",
        ),
        ({"in_order": False}, "in_order=False would give each rank its parts of the batches in another order"),
    ]:
        with pytest.raises(ValueError, match=text):
            ShardedDataLoader(Squares(10), **{"batch_size": 5, "split": part_of(0, 1), "seed": 7, **options})
    for options in ({"shuffle": True}, {"sampler": range(3)}, {"batch_size": None, "batch_sampler": [[0]]}):
        with pytest.raises(ValueError, match="shuffle=True, sampler and batch_sampler need a dataset with an index"):
            ShardedDataLoader(Stream(10), **{"batch_size": 5, "split": part_of(0, 1), "seed": 7, **options})
    with pytest.raises(TypeError, match="which a generator does not allow: pass a list or a torch"):
        ShardedDataLoader(Squares(10), 5, part_of(0, 1), 7, sampler=(index for index in range(3)))


@pytest.mark.parametrize("net", [Net, NormNet])
@mixed_and_four
def test_training(world, net):
    """Compare with one process on whole batches; some ranks have no part of the last batch of an epoch."""
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
    """Dropout differs between ranks that read parts; other random numbers stay the same on all ranks."""
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


@on_ranks(1, 2, 3)
def test_loader_for_evaluation_only(world):
    """A loader that only `evaluate` reads leaves training on whole batches; a later iteration does not change that."""
    model, plain = nn.Linear(3, 2, dtype=F64), nn.Linear(3, 2, dtype=F64)
    trainer = create_distributed_trainer(model)
    plain.load_state_dict(model.state_dict())
    optimizer, plain_optimizer = sgd(model), sgd(plain)
    x, y = torch.randn(7, 3, dtype=F64), torch.randn(7, 2, dtype=F64)
    criterion = nn.MSELoss(reduction="sum")
    held_out = trainer.loader(TensorDataset(x, y), 4)
    trainer.evaluate(held_out, criterion)
    for _ in range(2):
        trainer.train_step(x, y, criterion, optimizer)
        plain_optimizer.zero_grad()
        criterion(plain(x), y).backward()
        plain_optimizer.step()
        trainer.evaluate(held_out, criterion)
        trainer.evaluate(trainer.loader(TensorDataset(x, y), 3), criterion)
        for _inputs, _targets in held_out:  # as a script does that evaluates by itself
            pass
    torch.testing.assert_close(model.weight, plain.weight, rtol=1e-12, atol=0)
    for part in held_out:
        with pytest.raises(ValueError, match="has trained on whole batches") as raised:
            trainer.train_step(*part, criterion, optimizer)
        same_message(world, raised)
    trainer.close()


@pytest.mark.parametrize("workers", [0, 1])
@on_ranks(1, 2)
def test_dataset_that_grows(world, workers):
    """An epoch has the samples that the dataset has at its begin, as with torch's DataLoader."""
    trainer = create_distributed_trainer(nn.Linear(1, 1))
    samples = list(range(6))
    loader = trainer.loader(samples, 4, shuffle=True, num_workers=workers)
    assert len(loader) == 2
    for epoch in range(2):
        seen = list(itertools.chain.from_iterable(world.gather([x for part in loader for x in part.tolist()])))
        assert sorted(seen) == list(range(6 + 5 * epoch))
        samples += range(6, 11)
        assert len(loader) == 3 + epoch
    trainer.close()


def test_seed():
    """The seed of torch decides the order."""
    orders = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        trainer = create_distributed_trainer(nn.Linear(1, 1))
        orders.append(torch.cat([part for part, _ in trainer.loader(Squares(20), 2, shuffle=True)]).tolist())
        trainer.close()
    assert orders[0] == orders[1] != orders[2]


def test_epochs():
    """The loop runs over all epochs, or over those that remain after the loader's state, the first from its middle."""
    trainer = create_distributed_trainer(nn.Linear(1, 1))
    loader = trainer.loader(Squares(6), 2, shuffle=True)
    seen = {epoch: [part.tolist() for part, _ in loader] for epoch in trainer.epochs(3)}
    assert list(seen) == [0, 1, 2]
    state = {"epoch": 1, "num_read": 2, "seed": loader.state_dict()["seed"]}
    resumed = trainer.loader(Squares(6), 2, shuffle=True)
    resumed.load_state_dict(state)
    rest = {epoch: [part.tolist() for part, _ in resumed] for epoch in trainer.epochs(3)}
    assert rest == {1: seen[1][2:], 2: seen[2]}
    assert list(trainer.epochs(2)) == [0, 1]  # the state was used up by the first loop
    for wrong in (-1, 2.0, True):
        with pytest.raises(ValueError, match="num_epochs must be an int of at least 0"):
            list(trainer.epochs(wrong))
    trainer.close()


class Captions(torch.utils.data.Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, index):
        return torch.full((2,), float(index)), f"caption {index}"


def test_read_again_with_lists():
    """When the ranks have changed, the lists of a batch are read again as its tensors are."""
    positions, sizes = DataPosition(), [2, 4]
    loader = ShardedDataLoader(Captions(), 4, lambda: lambda _: (0, sizes[0]), seed=0)
    positions.add(loader)
    x, captions = next(iter(loader))
    assert captions == ("caption 0", "caption 1")
    sizes.reverse()
    inputs, targets = positions.read_again({"x": x, "texts": captions, "scale": 2.0}, x)
    assert len(inputs["x"]) == len(targets) == 4
    assert inputs["texts"] == tuple(f"caption {index}" for index in range(4))
    assert inputs["scale"] == 2.0
    with pytest.raises(RankLostError, match=r"are not the same objects that trainer.loader returned"):
        positions.read_again(x.clone(), x)


class Faulty(Squares):
    """Dataset of which two samples cannot be read."""

    def __getitem__(self, index):
        if index in (4, 9):
            raise OSError(f"sample {index} is broken")
        return index


def read_on(loader):
    """Return the batches, and the exceptions in their place, until the loader has ended."""
    found, batches = [], iter(loader)
    while True:
        try:
            found.append(next(batches).tolist())
        except StopIteration:
            assert next(batches, None) is None
            return found
        except OSError as error:
            found.append(str(error).splitlines()[-1].rpartition(": ")[-1])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_continues_after_an_exception(num_workers):
    """As with torch, a batch that cannot be read raises, and the next one follows."""
    loader = ShardedDataLoader(Faulty(12), 3, part_of(0, 1), 7, num_workers=num_workers)
    expected = read_on(DataLoader(Faulty(12), 3, num_workers=num_workers))
    assert read_on(loader) == expected == [[0, 1, 2], "sample 4 is broken", [6, 7, 8], "sample 9 is broken"]
    assert loader.state_dict()["epoch"] == 1


class Moved(torch.utils.data.Dataset):
    """Dataset whose samples are moved by `offset`, and say which process has read them."""

    offset = 0

    def __len__(self):
        return 14

    def __getitem__(self, index):
        return index + self.offset, os.getpid()


def move(worker):
    get_worker_info().dataset.offset = 100 * (worker + 1)


def doubled(samples):
    return {"x": torch.tensor([2 * x for x, _ in samples])}, torch.tensor([pid for _, pid in samples])


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_options_of_torch(method):
    """Workers that stay, their start, prefetching, `drop_last` and `collate_fn` are torch's."""
    options = {"num_workers": 2, "persistent_workers": True, "prefetch_factor": 1, "worker_init_fn": move}
    options |= {"drop_last": True, "collate_fn": doubled, "multiprocessing_context": method, "timeout": 60}
    plain = DataLoader(Moved(), 4, **options)
    loaders = [ShardedDataLoader(Moved(), 4, part_of(rank, 3), 7, **options) for rank in range(3)]
    workers = [set() for _ in loaders]
    for _ in range(2):
        parts = list(zip(*loaders, strict=True))
        found = [torch.cat([x["x"] for x, _ in each]).tolist() for each in parts]
        assert found == [x["x"].tolist() for x, _ in plain]
        assert sorted(map(len, found)) == [4, 4, 4]
        for pids, (_, own) in itertools.chain.from_iterable(zip(workers, each, strict=True) for each in parts):
            pids.update(own.tolist())
    assert [len(pids) for pids in workers] == [2, 2, 2]
