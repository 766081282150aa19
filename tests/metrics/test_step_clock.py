# SPDX-License-Identifier: Apache-2.0
"""trainer.summary: where the time goes, and for which rank the others wait; tests slow one rank down."""

import time

import numpy as np
import pytest
import torch
from internals import gradients_of
from ranks import on_ranks, one_node
from small_models import F64, batch
from torch import nn

from distributed_trainer import create_distributed_trainer
from distributed_trainer.metrics.step_clock import PHASES, StepClock, summarise

DELAY = 0.05
NUM_STEPS = 8


class Sleeps(nn.Module):
    """Layer that sleeps in forward or backward if `phase` names it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(32, 4, dtype=F64)
        self.phase = ""

    def forward(self, x):
        if self.phase == "forward":
            time.sleep(DELAY)
        output = self.linear(x.flatten(1))
        if self.phase == "backward" and output.requires_grad:
            output.register_hook(lambda gradient: time.sleep(DELAY))
        return output


class SleepySGD(torch.optim.SGD):
    is_slow = False

    def step(self, closure=None):
        if self.is_slow:
            time.sleep(DELAY)
        return super().step(closure)


def train(world, phase, culprit):
    model = Sleeps()
    trainer = create_distributed_trainer(model)
    optimizer = SleepySGD(model.parameters(), lr=0.1)
    if world.rank == culprit:
        model.phase, optimizer.is_slow = phase, phase == "optimizer"
        if phase == "network":
            finish = gradients_of(trainer).finish

            def slow_finish(numbers):
                time.sleep(DELAY)
                return finish(numbers)

            gradients_of(trainer).finish = slow_finish
    for step in range(NUM_STEPS):
        if world.rank == culprit and phase == "data":
            time.sleep(DELAY)
        trainer.train_step(*batch(12, F64, step), nn.CrossEntropyLoss(), optimizer)
    summary = trainer.summary()
    trainer.close()
    assert len(set(world.gather(str(summary)))) == 1
    return summary


@pytest.mark.parametrize("phase", ["data", "forward", "backward", "optimizer"])
@on_ranks(2, 3)
def test_slow_rank(world, phase):
    """The summary names the slow rank and its slow phase, and shows the others' waiting."""
    culprit = world.size - 1
    summary = train(world, phase, culprit)
    assert (summary.slowest_rank, summary.slowest_phase) == (culprit, phase)
    assert summary.slowest_share > 0.5
    assert 0.9 * DELAY < summary.slowest_excess_seconds < 3 * DELAY  # by medians, which a single stall does not change
    assert summary.waiting_seconds > 0.7 * DELAY * (world.size - 1) / world.size
    assert summary.exchange_seconds < summary.waiting_seconds
    text = str(summary)
    assert f"rank {culprit} in " in text
    assert f"its {phase} took" in text


@on_ranks(2, 3)
def test_slow_network(world):
    """A slow exchange counts as the exchange's own time, since every rank waits for it."""
    summary = train(world, "network", 0)
    assert summary.exchange_seconds > 0.9 * DELAY
    assert summary.slowest_excess_seconds < DELAY / 2


@one_node
def test_sums(world):
    """Phases add up to the whole time, samples are those of the global batch, and a single rank waits for none."""
    model = Sleeps()
    trainer = create_distributed_trainer(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert trainer.summary().num_measured == 0
    assert "0 steps" in str(trainer.summary())
    trainer.train_step(*batch(12, F64), nn.CrossEntropyLoss(), optimizer)
    start = time.perf_counter()
    for _ in range(20):
        trainer.train_step(*batch(12, F64), nn.CrossEntropyLoss(), optimizer)
    elapsed = (time.perf_counter() - start) / 20
    summary = trainer.summary()
    assert (summary.num_steps, summary.num_measured) == (21, 20)
    assert tuple(summary.seconds) == PHASES
    assert sum(summary.seconds.values()) == pytest.approx(elapsed, rel=0.3)
    assert summary.samples_per_second == pytest.approx(12 / elapsed, rel=0.3)
    assert (summary.slowest_rank is None) == (world.size == 1)
    assert summary.mebibytes == {}
    trainer.close()


@on_ranks(1, 2)
def test_evaluation_is_no_data(world):
    trainer = create_distributed_trainer(model := Sleeps())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        trainer.train_step(*batch(12, F64), nn.CrossEntropyLoss(), optimizer)
        trainer.evaluate([batch(12, F64)], None, {"slow": lambda outputs, y: time.sleep(DELAY) or outputs.sum()})
    assert trainer.summary().seconds["data"] < DELAY / 2
    trainer.close()


@on_ranks((2, 1), (3, 2))
def test_bytes(world):
    """Bytes between machines: over all ranks as many are received as sent."""
    model = Sleeps()
    trainer = create_distributed_trainer(model)
    for step in range(5):
        trainer.train_step(*batch(12, F64, step), nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.1))
    summary = trainer.summary()
    assert summary.mebibytes["sent"] == pytest.approx(summary.mebibytes["received"], rel=0.5)
    assert summary.mebibytes["sent"] > 5 * sum(p.nbytes for p in model.parameters()) / 2**20
    assert "between machines:" in str(summary)
    trainer.close()


@on_ranks(1)
def test_last_steps(world):
    """The clock keeps a bounded number of steps."""
    clock = StepClock()
    for step in range(1005):
        clock.start()
        clock.end(step)
    assert clock.rows().shape == (1000, len(PHASES) + 1)
    assert np.array_equal(clock.rows()[:, -1], np.arange(5, 1005))
    assert summarise(clock, {}, world.group()).num_steps == 1005
