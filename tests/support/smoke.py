# SPDX-License-Identifier: Apache-2.0
"""Training step on NUM_RANKS ranks, compared with the same step in one process. Usage: smoke.py NUM_RANKS."""

import sys

import torch
from torch import nn

from distributed_trainer import create_distributed_trainer

num_ranks = int(sys.argv[1])
torch.manual_seed(0)
model = nn.Linear(4, 3)
inputs, targets = torch.randn(7, 4), torch.randint(3, (7,))
expected = nn.functional.cross_entropy(model(inputs), targets).detach()

trainer = create_distributed_trainer(model, num_gpus=num_ranks)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
loss = trainer.train_step(inputs=inputs, targets=targets, criterion=nn.CrossEntropyLoss(), optimizer=optimizer)
assert trainer.world_size == num_ranks
torch.testing.assert_close(loss, expected)
if trainer.is_main:
    print(f"smoke test passed on {num_ranks} ranks")
