# SPDX-License-Identifier: Apache-2.0
"""Tests of trainer.loader with iterable datasets: several workers, and streams of which each rank has a share."""

import itertools
import random

import numpy as np
import pytest
import torch
from one_process import accumulated_step, assert_same
from ranks import on_ranks, same_message
from small_models import F64, sgd
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from distributed_trainer import create_distributed_trainer
from distributed_trainer.data.loader import ShardedDataLoader
from distributed_trainer.data.split import Split


class Shards(IterableDataset):
    """Samples in files, of which each rank and each worker reads some; in another order in each epoch."""

    epoch = 0

    def __init__(self, files, fails_at=None, draws=False):
        self.files, self.fails_at, self.draws = files, fails_at, draws

    def shard(self, num_shards, index):
        return Shards(self.files[index::num_shards], self.fails_at, self.draws)

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        info = get_worker_info()
        files = self.files if info is None else self.files[info.id :: info.num_workers]
        for file in files[self.epoch % 2 :] + files[: self.epoch % 2]:
            for sample in file:
                if sample == self.fails_at:
                    raise OSError(f"sample {sample} is broken")
                yield (sample, torch.rand(()) + random.random() + np.random.rand()) if self.draws else sample


def files_of(*sizes):
    numbers = itertools.count()
    return [list(itertools.islice(numbers, size)) for size in sizes]


FILES = files_of(3, 7, 2, 0, 5)


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("drop_last", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_workers(persistent, drop_last):
    """Two workers give the batches of torch's DataLoader with two, in each epoch, and on any number of ranks."""
    options = {"num_workers": 2, "persistent_workers": persistent, "drop_last": drop_last}
    epochs = []
    for epoch in range(2):
        data = Shards(FILES)
        data.set_epoch(epoch)
        epochs.append([part.tolist() for part in DataLoader(data, 3, num_workers=2, drop_last=drop_last)])
    loaders = [ShardedDataLoader(Shards(FILES), 3, lambda rank=rank: Split(rank, 2), 7, **options) for rank in range(2)]
    for epoch in epochs:
        found = [torch.cat(parts).tolist() for parts in zip(*loaders, strict=True)]
        assert found == epoch


def test_resume_with_workers():
    """Two workers that end at different times continue at any batch; draws are those of an uninterrupted run."""

    def make(num_workers=2):
        return ShardedDataLoader(
            Shards(FILES, draws=True), 3, lambda: Split(1, 2), 7, num_workers=num_workers, persistent_workers=True
        )

    loader = make()
    states, parts = [], []
    for part in loader:
        parts.append(part)
        states.append(loader.state_dict())
    assert states[0] == {"epoch": 0, "num_read": 1, "seed": 7, "checksum": 0, "num_workers": 2}
    following = list(loader)
    resumed = make()
    for number in (1, len(parts) - 1):
        resumed.load_state_dict(states[number - 1])
        torch.testing.assert_close(list(resumed), parts[number:], rtol=0, atol=0)
    torch.testing.assert_close(list(resumed), following, rtol=0, atol=0)
    other = make(1)
    other.load_state_dict(states[0])
    for _ in range(2):
        with pytest.raises(ValueError, match="in the middle of epoch 0 with num_workers=2, but now has one reader"):
            list(other)


def is_read_by(rank, world_size, num_workers):
    """Return the samples that a rank reads, in their order in the first epoch, where workers take turns."""
    files = FILES[rank::world_size]
    return [list(itertools.chain(*files[worker::num_workers])) for worker in range(num_workers)]


X, Y = torch.randn(2, 17, 2, dtype=F64, generator=torch.Generator().manual_seed(3))


class Opaque:
    """Batch that the trainer cannot cut."""

    def __init__(self, index, x, y):
        self.index, self.x, self.y = index, x, y


def as_tensors(samples):
    return torch.tensor(samples), X[samples], Y[samples]


def as_opaque(samples):
    return Opaque(*as_tensors(samples))


class Model(nn.Linear):
    def forward(self, part):
        return super().forward(getattr(part, "x", part))


def loss_of(outputs, targets):
    return (outputs - getattr(targets, "y", targets)).square().mean()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("collate", [as_tensors, as_opaque])
@on_ranks(1, 2, 3)
def test_sharded(world, workers, collate):
    """Ranks read their samples only; each counts once, in steps with the exact mean."""
    model, plain = Model(2, 2, dtype=F64), Model(2, 2, dtype=F64)
    trainer = create_distributed_trainer(model, split_batches=False)
    plain.load_state_dict(model.state_dict())
    optimizer, plain_optimizer = sgd(model), sgd(plain)
    loader = trainer.loader(Shards(FILES), 7, stream="sharded", num_workers=workers, collate_fn=collate)
    own = is_read_by(world.rank, world.size, max(workers, 1))
    for epoch in range(2):
        seen = []
        for part in loader:
            index, x, y = part if collate is as_tensors else (part.index, part, part)
            seen.append(world.gather([] if loader.is_stand_in else index.tolist()))
            weight = None if collate is as_tensors else float(len(index))
            loss = trainer.train_step(x, y, loss_of, optimizer, weight=weight)
            everyone = list(itertools.chain(*seen[-1]))
            expected, _ = accumulated_step(plain, (X[everyone], Y[everyone]), 1, len, loss_of, plain_optimizer)
            torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
        assert sorted(itertools.chain(*itertools.chain(*seen))) == list(range(17))
        assert [len(indices) for indices in seen[0]] == Split(0, world.size).lengths(7)
        of_rank = list(itertools.chain(*(parts[world.rank] for parts in seen)))
        assert sorted(of_rank) == sorted(itertools.chain(*own))
        assert of_rank == own[0] or epoch or workers
    assert_same(model, plain, 1e-9)
    with pytest.raises(TypeError, match="of all ranks together, has no length"):
        len(loader)
    trainer.close()


@pytest.mark.parametrize("workers", [0, 2])
@on_ranks(1, 2, 3)
def test_resume_sharded(world, workers):
    """A sharded stream continues at any batch, also after the end of a rank's share, on as many ranks."""
    trainer = create_distributed_trainer(nn.Linear(1, 1))
    options = {"stream": "sharded", "num_workers": workers, "persistent_workers": workers > 0}
    loader, resumed = (trainer.loader(Shards(FILES, draws=True), 7, **options) for _ in range(2))
    states, parts = [], []
    for part in loader:
        parts.append(part)
        states.append(loader.state_dict())
    following = list(loader)
    for number, state in enumerate(states, 1):
        resumed.load_state_dict(state)
        torch.testing.assert_close(list(resumed), parts[number:], rtol=0, atol=0)
    torch.testing.assert_close(list(resumed), following, rtol=0, atol=0)
    resumed.load_state_dict(states[0] | {"num_ranks": 4})
    with pytest.raises(ValueError, match=rf"with num_ranks=4.* but now has num_ranks={world.size}"):
        next(iter(resumed))
    trainer.close()


@on_ranks(1, 2, 3)
def test_stream_function(world):
    """`stream` may be a function, which is told the rank and the number of ranks."""
    trainer = create_distributed_trainer(nn.Linear(1, 1))
    loader = trainer.loader(Shards(FILES), 3, stream=lambda data, rank, size: Shards(data.files[rank::size]))
    seen = itertools.chain(*world.gather([index for part in loader for index in part.tolist()]))
    assert sorted(seen) == list(range(17))
    trainer.close()


@on_ranks(2, 3)
def test_broken_sample(world):
    """If one rank cannot read a sample, every rank gets the error; all may continue."""
    trainer = create_distributed_trainer(nn.Linear(1, 1))
    batches = iter(trainer.loader(Shards(FILES, fails_at=7), 6, stream="sharded"))
    errors, seen = [], []
    while True:
        try:
            seen += next(batches).tolist()
        except OSError as error:
            errors.append(str(error))
        except StopIteration:
            break
    assert errors == ["sample 7 is broken"]
    assert set(range(3)) < set(itertools.chain(*world.gather(seen)))
    trainer.close()


@on_ranks(2, 3)
def test_rank_without_samples(world):
    """A rank whose share is empty is the same error on every rank, before any step."""
    trainer = create_distributed_trainer(nn.Linear(1, 1))
    loader = trainer.loader(Shards(files_of(*[4] * (world.size - 1), 0)), 4, stream="sharded")
    with pytest.raises(ValueError, match=f"the loader of rank {world.size - 1} is empty") as raised:
        next(iter(loader))
    same_message(world, raised)
    assert list(trainer.loader(Shards(files_of(*[0] * world.size)), 4, stream="sharded")) == []
    trainer.close()


@pytest.mark.parametrize("is_wrapped", [False, True])
@on_ranks(1, 2, 3)
def test_evaluate_sharded(world, is_wrapped):
    """`evaluate` counts every sample once; an exception on one rank is raised on every rank."""
    model = nn.Linear(2, 2, dtype=F64)
    trainer = create_distributed_trainer(model)
    loader = trainer.loader(Shards(FILES), 7, stream="sharded", collate_fn=as_tensors)

    def pairs():
        return ((x, y) for _, x, y in loader)

    own = trainer.loader(Shards(FILES), 7, stream="sharded", collate_fn=lambda samples: (X[samples], Y[samples]))
    result = trainer.evaluate(pairs() if is_wrapped else own, nn.MSELoss())
    expected = nn.functional.mse_loss(model(X), Y).item()
    assert result["loss"] == pytest.approx(expected, rel=1e-12)

    def fails(outputs, targets):
        if world.rank == world.size - 1:
            raise KeyError("no such class")
        return nn.functional.mse_loss(outputs, targets)

    with pytest.raises(KeyError, match="no such class"):
        trainer.evaluate(pairs() if is_wrapped else own, fails)
    trainer.close()


@on_ranks(1, 2)
def test_wrong_streams(world):
    class NoShards(IterableDataset):
        def __iter__(self):
            yield 1

    trainer = create_distributed_trainer(nn.Linear(1, 1))
    for dataset, options, error, text in [
        ([1, 2], {}, ValueError, "stream= is for iterable datasets"),
        (NoShards(), {}, TypeError, r"calls dataset.shard\(num_shards=, index=\), which NoShards does not have"),
        (Shards(FILES), {"stream": "split"}, ValueError, "stream must be None, \"sharded\" or a function, not 'split'"),
        (Shards(FILES), {"stream": lambda *_: [1]}, TypeError, "must be an IterableDataset, not list"),
        (Shards(FILES), {"batch_size": world.size - 1}, ValueError, "batch_size"),
        (Shards(FILES), {"stream": lambda data, rank, size: [data, [1]][rank == size - 1]}, TypeError, "not list"),
    ]:
        with pytest.raises(error, match=text):
            trainer.loader(dataset, **{"batch_size": 4, "stream": "sharded", **options})
    trainer.close()
    for name, options in [("reproducible", {"reproducible": 4}), ("balance_speed", {"balance_speed": True})]:
        trainer = create_distributed_trainer(nn.Linear(1, 1), **options)
        with pytest.raises(ValueError, match=f"stream= does not go with .*{name}"):
            trainer.loader(Shards(FILES), 4, stream="sharded")
        trainer.close()
