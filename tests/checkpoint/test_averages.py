# SPDX-License-Identifier: Apache-2.0
"""Averages of weights (EMA, and SWA with its scheduler) through checkpoints, compared with plain torch."""

import pytest
import torch
from one_process import assert_same
from ranks import on_ranks
from small_models import F64, regression_batch
from torch import nn
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn

from distributed_trainer import create_distributed_trainer


class Run:
    """Training whose weights are averaged after each step; with a trainer, or plain."""

    def __init__(self, kind, options):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 8, dtype=F64), nn.Tanh(), nn.Linear(8, 2, dtype=F64))
        self.trainer = None if options is None else create_distributed_trainer(self.model, **options)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.02)
        average = {"multi_avg_fn": get_ema_multi_avg_fn(0.9)} if kind == "ema" else {}
        self.average = AveragedModel(self.model, **average)
        self.schedule = SWALR(self.optimizer, swa_lr=0.005, anneal_epochs=3)
        self.objects = {"optimizer": self.optimizer, "average": self.average, "schedule": self.schedule}

    def train(self, numbers):
        for number in numbers:
            x, y = regression_batch(9, number, inputs=6, outputs=2)
            if self.trainer is None:
                self.optimizer.zero_grad()
                nn.functional.mse_loss(self.model(x), y).backward()
                self.optimizer.step()
            else:
                self.trainer.train_step(x, y, nn.MSELoss(), self.optimizer)
            self.average.update_parameters(self.model)
            self.schedule.step()


@pytest.mark.parametrize("kind", ["ema", "swa"])
@pytest.mark.parametrize("options", [{}, {"shard": "optimizer"}], ids=["plain", "sharded"])
@on_ranks(1, 2, 3)
def test_resume(world, tmp_path, options, kind):
    folder = world.comm.bcast(tmp_path)
    run = Run(kind, options)
    run.train(range(4))
    if world.rank == world.size - 1:
        run.trainer.save(folder, **run.objects)
    run.trainer.close()
    run = Run(kind, options)
    assert run.trainer.resume(folder, **run.objects) == 4
    run.train(range(4, 8))

    plain = Run(kind, None)
    plain.train(range(8))
    assert_same(run.model, plain.model, rtol=1e-10)
    assert_same(run.average, plain.average, rtol=1e-10)
    run.trainer.close()
