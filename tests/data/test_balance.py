# SPDX-License-Identifier: Apache-2.0
"""Tests of balance_speed: parts are in proportion to the ranks' speeds, and the mean stays exact."""

import itertools
import time

import pytest
import torch
from internals import shares_of
from one_process import accumulated_step, assert_same
from ranks import on_ranks
from small_models import F64, NormNet, Squares, batch, sgd
from torch import nn

from distributed_trainer import create_distributed_trainer
from distributed_trainer.data.balance import NUM_MEASURED, better_shares
from distributed_trainer.data.split import Split

LOSS = nn.CrossEntropyLoss()


@pytest.mark.parametrize("shares", [None, (0.5, 0.25, 0.25), (0.7, 0.3, 0.0), (1 / 3, 1 / 3, 1 / 3)])
@pytest.mark.parametrize("num_samples", [0, 1, 2, 3, 4, 7, 100, 10007])
def test_split(num_samples, shares):
    """Parts are consecutive; each is within a sample of its share, and no part is empty unless samples are too few."""
    bounds = [Split(rank, 3, shares)(num_samples) for rank in range(3)]
    assert bounds[0][0] == 0
    assert bounds[-1][1] == num_samples
    assert all(left[1] == right[0] for left, right in itertools.pairwise(bounds))
    lengths = [stop - start for start, stop in bounds]
    assert lengths == Split(0, 3, shares).lengths(num_samples)
    assert min(lengths) >= min(1, num_samples // 3)
    for length, share in zip(lengths, shares or [1 / 3] * 3, strict=True):
        assert abs(length - num_samples * share) <= 2


def test_better_shares():
    assert better_shares(None, [1.0, 1.0]) is None
    assert better_shares(None, [1.0, 1.1]) is None  # the gain would be 2.4 %
    assert better_shares(None, [1.0, 2.0]) == pytest.approx([2 / 3, 1 / 3])
    assert better_shares((2 / 3, 1 / 3), [1.0, 2.1]) is None
    assert better_shares((2 / 3, 1 / 3), [1.0, 1.0]) == pytest.approx([0.5, 0.5])
    assert better_shares(None, [1.0, 2.0, 4.0]) == pytest.approx([4 / 7, 2 / 7, 1 / 7])


def test_fixed_costs():
    """With a fixed cost of each step, the split changes several times, until all ranks take the same time."""
    fixed, seconds, num_samples = 30.0, [1.0, 2.0], 90
    shares = None
    for _ in range(20):
        lengths = Split(0, 2, shares).lengths(num_samples)
        times = [fixed + each * length for each, length in zip(seconds, lengths, strict=True)]
        better = better_shares(shares, [t / length for t, length in zip(times, lengths, strict=True)])
        shares = better or shares
    assert better is None
    best = 90.0  # both ranks then take 60 + fixed = 2 * 30 + fixed
    assert max(times) < 1.06 * best


class Slow(NormNet):
    """Sleep for each sample, so that the speed of a rank is known."""

    def __init__(self, seconds):
        super().__init__(F64)
        self.seconds = seconds

    def forward(self, x):
        time.sleep(self.seconds * len(x))
        return super().forward(x)


@pytest.mark.parametrize("microbatches", [1, 2])
@on_ranks(1, 2, (3, 2))
@pytest.mark.slow
def test_training(world, microbatches):
    """Weights are those of one process for every split; the slow rank gets less; waits in BatchNorm are not counted."""
    slow = world.size - 1
    model = Slow(0.004 if world.rank == slow else 0.001)
    reference = NormNet(F64)
    trainer = create_distributed_trainer(model, balance_speed=True)
    optimizer, plain_optimizer = sgd(model), sgd(reference)
    for step in range(NUM_MEASURED + 3):
        tensors = batch(12 * world.size, F64, step)
        trainer.train_step(*tensors, LOSS, optimizer, microbatches=microbatches)
        accumulated_step(reference, tensors, microbatches, len, LOSS, plain_optimizer)
    assert_same(model, reference, 1e-9)
    shares = shares_of(trainer)
    assert len(set(world.gather(shares))) == 1
    if world.size > 1:
        assert shares.index(min(shares)) == slow
        assert shares[slow] < 0.6 / world.size
        x = torch.arange(1000)
        assert torch.equal(torch.cat(world.gather(trainer.split(x))), x)
        assert abs(len(trainer.split(x)) - 1000 * shares[world.rank]) <= 1
    trainer.close()


@on_ranks(2, 3)
@pytest.mark.slow
def test_loader(world):
    """Parts change when an epoch begins, on all ranks at once, in spite of reading ahead; each sample is read once."""
    model = nn.Linear(1, 1)
    model.register_forward_hook(lambda *_: time.sleep(0.02 if world.rank == 0 else 0.001))
    trainer = create_distributed_trainer(model, balance_speed=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    loader = trainer.loader(Squares(60), 6, num_workers=1)
    lengths = []
    for _ in range(3):
        parts = []
        for part, _ in loader:
            parts.append(part)
            inputs = part.reshape(len(part), -1)[:, :1].float()
            trainer.train_step(inputs, inputs, nn.MSELoss(), optimizer)
        lengths.append([len(part) for part in parts])
        together = [torch.cat(pieces) for pieces in zip(*world.gather(parts), strict=True)]
        assert torch.cat(together).flatten().tolist() == list(range(60))
    assert all(len(set(row)) == 1 for row in lengths)
    assert (lengths[-1][0] < 6 / world.size) == (world.rank == 0)
    trainer.close()


@pytest.mark.parametrize("options", [{"split_batches": False}, {"reproducible": 8}], ids=str)
def test_refused(options):
    with pytest.raises(ValueError, match="balance"):
        create_distributed_trainer(nn.Linear(1, 1), balance_speed=True, **options)
    with pytest.raises(TypeError, match="balance_speed must be True or False, not 'fast'"):
        create_distributed_trainer(nn.Linear(1, 1), balance_speed="fast")
