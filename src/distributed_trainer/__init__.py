# SPDX-License-Identifier: Apache-2.0
"""Trains a PyTorch model on many GPUs, cores and machines over MPI, with the answer of one process."""

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
    "MismatchError",
    "RankLostError",
    "create_distributed_trainer",
]


def _is_command() -> bool:
    """Whether this process is `distributed-trainer` or `python -m distributed_trainer`."""
    program, words = getattr(sys, "argv", [""])[0], sys.orig_argv
    # Python sets the first to "-m" as long as it looks for the module.
    is_module = program == "-m" and "-m" in words and words[words.index("-m") + 1] == __name__
    return is_module or os.path.basename(program) == "distributed-trainer"


if not _is_command():  # that becomes mpirun, and need not wait for torch, which takes a second or more
    from .create import create_distributed_trainer
    from .job import register
    from .trainer import DistributedTrainer

    register()
    del register
