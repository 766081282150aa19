# SPDX-License-Identifier: Apache-2.0
"""Train a PyTorch model on many GPUs, cores and machines over MPI, with the result of one process.

    import torch
    from distributed_trainer import create_distributed_trainer

    model = torch.nn.Linear(8, 2)
    trainer = create_distributed_trainer(model, num_gpus=2)  # 2 ranks on this machine; CPU processes without a GPU
    batches = [(torch.randn(16, 8), torch.randint(2, (16,))) for _ in range(10)]  # the same on every rank
    optimizer = torch.optim.Adam(model.parameters())
    criterion = torch.nn.CrossEntropyLoss()
    for inputs, targets in batches:  # each rank computes its part of the batch
        loss = trainer.train_step(inputs, targets, criterion, optimizer)
        if trainer.is_main:
            print(f"loss {loss:.4f}")
    trainer.close()

Start the script with `python train.py`, which starts `num_gpus` ranks, or with a launcher, whose number counts instead:
`mpirun -np 4 python train.py` or `distributed-trainer run -np 4 train.py`.

Words that the docstrings use:

- Rank: one of the processes that train together, and its number, from 0.
- Global batch: the samples of all ranks in one step. Each rank computes its part of them.
- Collective: every rank makes the call, in the same order as its other collective calls. A collective call that blocks
  waits for the other ranks. A local call exchanges nothing with them.

Names:

- `create_distributed_trainer` makes the trainer; all options are its arguments.
- `DistributedTrainer` has the methods: `train_step`, or `forward`, `backward` and `step` for manual loops; `loader`,
  `evaluate`, `save`, `resume`, `summary` and more.
- `MeanLoss` is what a criterion returns if it knows the denominator of its mean.
- `common_random` makes a model's random decisions the same on every rank.
- `PowerSGD` is an option for slow networks.
- `DistributedTrainerError` is the base class of this package's errors. A mistake in an argument is a TypeError or
  ValueError.

All modules and packages inside are internal. Pages such as docs/training.md are in the project's repository.
"""

import os
import sys

from .errors import (
    CheckpointError,
    DistributedTrainerError,
    LaunchError,
    MismatchError,
    MPINotFoundError,
    RankLostError,
)

__all__ = [
    "CheckpointError",
    "DistributedTrainer",
    "DistributedTrainerError",
    "LaunchError",
    "MPINotFoundError",
    "MeanLoss",
    "MismatchError",
    "PowerSGD",
    "RankLostError",
    "common_random",
    "create_distributed_trainer",
]

__version__ = "0.1.0"


def _is_command() -> bool:
    """Return whether this process is `distributed-trainer` or `python -m distributed_trainer`."""
    program, words = getattr(sys, "argv", [""])[0], sys.orig_argv
    # Python sets argv[0] to "-m" while it looks for the module.
    is_module = program == "-m" and "-m" in words and words[words.index("-m") + 1] == __name__
    return is_module or os.path.basename(program) == "distributed-trainer"


if not _is_command():  # the command starts mpirun, and need not wait for torch: importing it takes a second or more
    from .backend.register import register
    from .data.loss_weight import MeanLoss
    from .options import PowerSGD
    from .replica.streams import common_random
    from .trainer.create import create_distributed_trainer
    from .trainer.trainer import DistributedTrainer

    register()
    del register
