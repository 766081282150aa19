# SPDX-License-Identifier: Apache-2.0
"""Trains a PyTorch model on many GPUs, cores and machines over MPI, with the answer of one process."""

from .create import create_distributed_trainer
from .errors import DistributedTrainerError, LaunchError, MismatchError, MPINotFoundError
from .job import register
from .trainer import DistributedTrainer

__all__ = [
    "DistributedTrainer",
    "DistributedTrainerError",
    "LaunchError",
    "MPINotFoundError",
    "MismatchError",
    "create_distributed_trainer",
]

register()
del register
