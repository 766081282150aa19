# SPDX-License-Identifier: Apache-2.0
"""Errors of a run. A mistake in the caller's arguments is a ValueError or a TypeError instead."""


class DistributedTrainerError(RuntimeError):
    """Base class of the errors that this package defines.

    A mistake in an argument is a TypeError or ValueError instead. Methods name the other errors that they raise, such
    as FloatingPointError and OSError.

    Attributes:
        is_for_rank_0: For this package's own use: whether all ranks raise the same error, so that only rank 0 prints
            it.
    """

    is_for_rank_0 = False


class MPINotFoundError(DistributedTrainerError):
    """Raised if MPI is not found, or is not one for which this package was built. The message says what to install."""


class LaunchError(DistributedTrainerError):
    """Raised if the processes were not started as one MPI job, or not as the script needs (more than GPUs)."""


class MismatchError(DistributedTrainerError):
    """Raised if ranks differ in what must be the same: options, model, batch, weights, versions, order of calls."""


class RankLostError(DistributedTrainerError):
    """Raised if a rank was killed, and training cannot continue without it. The same on every rank."""


class RankTraceback(Exception):
    """Cause of an exception that came from another rank: the number of that rank, and its traceback as text."""


class CheckpointError(DistributedTrainerError):
    """Raised if a checkpoint cannot be written, or cannot be read later. The same on every rank."""
