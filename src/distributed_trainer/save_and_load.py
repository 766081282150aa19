# SPDX-License-Identifier: Apache-2.0
"""What a trainer has for checkpoints: save, load and resume."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from . import restoring
from .places import noted
from .saving import Request, Saving
from .training_state import MODEL, TrainingState


class SaveAndLoad:
    """Those methods of `DistributedTrainer`, which has the rest."""

    _group: Any
    _saving: Saving
    _state: TrainingState
    _check_open: Callable[[], None]
    _resumed_objects: Mapping[str, Any] | None = None
    """What `resume` was given."""
    _is_waiting: bool
    _take_place: Callable[[Mapping[str, Any]], int]

    def save(self, folder: str | os.PathLike[str], *, keep: int = 2, **objects: Any) -> None:
        """Asks for a checkpoint in `folder`. Local, returns at once; one rank is enough, and all may ask.

        The other ranks learn of it in the next `train_step` or `backward`. There each rank copies its part of the state
        as it is before that step, and a thread writes it while training goes on (docs/reliability.md). If there is no
        such step, it is made when all ranks have come to `close`, or to the end of the process. What goes wrong is
        raised on every rank, in the step or later.

            trainer.save("checkpoints", optimizer=optimizer, scheduler=scheduler)

        Args:
            folder: On a file system that all machines share. A checkpoint is a folder in it, `step-00001234`, which is
                there once it is whole.
            keep: How many checkpoints are left there, the newest ones.
            objects: What is saved beside the model, the random states, the count of steps and the positions of
                `trainer.loader`s: optimizers, schedulers, GradScalers, whatever has `state_dict` and `load_state_dict`.
                Of what is no optimizer of this trainer, the asking rank's state is written (the lowest's).

        Raises:
            TypeError, ValueError: An argument is not what is described here.
        """
        self._check_open()
        self._saving.request(_request(folder, keep, objects))

    @noted
    def load(self, folder: str | os.PathLike[str], **objects: Any) -> int:
        """Goes on from a checkpoint, of any number of ranks. Collective, blocks.

        Args:
            folder: Of the checkpoint, or that of `save`, of which it takes the newest.
            objects: By the names of `save`.

        Returns:
            The number of steps that were made.

        Raises:
            TypeError: An argument is not what is described here.
            ValueError: The checkpoint is of another model, or of other objects. The same on every rank, as the next;
                nothing has changed.
            CheckpointError: There is no checkpoint, or it is damaged.
        """
        self._check_open()
        _check_objects(objects)
        return restoring.load(Path(folder).absolute(), objects, self._state, self._group)

    @noted
    def resume(self, folder: str | os.PathLike[str], *, keep: int = 2, **objects: Any) -> int | None:
        """Goes on from the newest whole checkpoint in `folder`, if there is one. Collective, blocks.

        From now on the signal SIGUSR1, to any rank, means: save there in the next step, then end the job with exit
        code 0. Slurm sends it with `#SBATCH --signal=USR1@120`, 120 s before the time is over.

        Args:
            folder: As of `save`.
            keep: As of `save`, for the signal.
            objects: As of `save`.

        Returns:
            The number of steps that were made; None if there is no checkpoint.

        Raises:
            TypeError, ValueError, CheckpointError: As `load`; the last if there are checkpoints, but none is whole.
        """
        self._check_open()
        request = _request(folder, keep, objects)
        self._resumed_objects = objects
        if self._is_waiting:
            step = self._take_place(objects)
            self._saving.arm(request)
            return step
        step = restoring.resume(request.folder, objects, self._state, self._group)
        self._saving.arm(request)
        return step


def _request(folder: str | os.PathLike[str], keep: int, objects: dict[str, Any]) -> Request:
    if not isinstance(folder, str | os.PathLike):
        raise TypeError(f"folder must be a path, not {folder!r}")
    if not isinstance(keep, int) or isinstance(keep, bool) or keep < 1:
        raise ValueError(f"keep must be an int of at least 1, the number of checkpoints to leave, not {keep!r}")
    _check_objects(objects)
    return Request(Path(folder).absolute(), keep, objects)


def _check_objects(objects: dict[str, Any]) -> None:
    for name, value in objects.items():
        if name == MODEL:
            raise ValueError("the model is saved by itself; leave model= out")
        if not (hasattr(value, "state_dict") and hasattr(value, "load_state_dict")):
            raise TypeError(f"{name} must have state_dict and load_state_dict, as optimizers do, not {value!r}")
