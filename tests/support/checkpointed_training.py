# SPDX-License-Identifier: Apache-2.0
"""Training whose checkpoint is kept in tests/checkpoint/fixture, to test that every later version can load it.

The fixture was written once, by the version that first had format 1, in the middle of the second epoch:

    mpirun -np 2 python tests/support/checkpointed_training.py tests/checkpoint/fixture
"""

import sys

import torch
from torch import nn
from torch.utils.data import TensorDataset

NUM_EPOCHS = 3
BATCH_SIZE = 5
SAVED_AFTER = 7  # steps; an epoch has 5


def make_training():
    """Return a model with buffers, its optimizer with state of several shapes, and a scheduler."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return model, optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)


def make_dataset():
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(23, 3, generator=generator, dtype=torch.float64)
    return TensorDataset(inputs, inputs.sum(1, keepdim=True).sin())


if __name__ == "__main__":
    from distributed_trainer import create_distributed_trainer

    model, optimizer, scheduler = make_training()
    with create_distributed_trainer(model) as trainer:
        loader = trainer.loader(make_dataset(), BATCH_SIZE)
        num_steps = 0
        for _ in trainer.epochs(NUM_EPOCHS):
            for inputs, targets in loader:
                if num_steps == SAVED_AFTER:
                    trainer.save(sys.argv[1], optimizer=optimizer, scheduler=scheduler)
                trainer.train_step(inputs, targets, nn.MSELoss(), optimizer)
                scheduler.step()
                num_steps += 1
