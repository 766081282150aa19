# SPDX-License-Identifier: Apache-2.0
"""Errors of a run. A caller's own mistake is a ValueError or a TypeError instead."""


class DistributedTrainerError(RuntimeError):
    """Base class of all errors that this package raises for a run."""

    is_for_rank_0 = False
    """Whether all ranks raise the same, so that rank 0 alone is to print it."""


class MPINotFoundError(DistributedTrainerError):
    """No usable MPI library, or no engine module built for the one that was found."""


class LaunchError(DistributedTrainerError):
    """The processes were not started as one MPI job, or not as the script asks for."""


class MismatchError(DistributedTrainerError):
    """Ranks disagree on something that must be the same on all of them: model, batch or collective."""


class RankLostError(DistributedTrainerError):
    """A rank was killed, and training cannot go on without it. The same on every rank."""


class CheckpointError(DistributedTrainerError):
    """A checkpoint cannot be written, or what was written cannot be read. The same on every rank."""
