# SPDX-License-Identifier: Apache-2.0
"""Find a checkpoint, verify it, and make a trainer continue from it; the same one on every rank."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..backend.gather import call_together, gather_json
from ..errors import CheckpointError
from .format import INDEX, Checkpoint, checkpoints_in
from .state import TrainingState

logger = logging.getLogger("distributed_trainer")


def load(folder: Path, objects: Mapping[str, Any], state: TrainingState, group: Any) -> int:
    """Continue from a checkpoint, or from the newest in a folder. Collective, blocks.

    Args:
        folder: Path of the checkpoint, or of the folder.
        objects: Objects to load, by name.
        state: State of the trainer.
        group: Process group of the ranks.

    Returns:
        The checkpoint's step.

    Raises:
        CheckpointError: There is no checkpoint, or it is damaged.
        ValueError: It is of another model, or has other objects. The same on every rank, and nothing has changed.
    """
    found = _find(folder, group)
    if not found:
        raise CheckpointError(f"there is no checkpoint in {folder}")
    return _load(_open(found[0], group), objects, state, group)


def resume(folder: Path, objects: Mapping[str, Any], state: TrainingState, group: Any) -> int | None:
    """Continue from the newest complete checkpoint in a folder. Collective, blocks.

    Args:
        folder: Path of the folder.
        objects: Objects to load, by name.
        state: State of the trainer.
        group: Process group of the ranks.

    Returns:
        The checkpoint's step; None if there is no checkpoint at all.

    Raises:
        CheckpointError: There are checkpoints, but all are damaged.
        ValueError: It is of another model, or has other objects. The same on every rank, and nothing has changed.
    """
    found = _find(folder, group)
    reasons = []
    for path in found:
        try:
            checkpoint = _open(path, group)
        except CheckpointError as error:
            reasons.append(str(error))
            if group.rank() == 0:
                logger.warning("%s Looking for an older one.", error)
            continue
        return _load(checkpoint, objects, state, group)
    if reasons:
        raise CheckpointError(f"none of the {len(reasons)} checkpoints in {folder} is whole: {reasons[0]}")
    if group.rank() == 0:
        print(f"distributed_trainer: no checkpoint in {folder} yet, so training starts at its beginning", flush=True)
    return None


def _find(folder: Path, group: Any) -> list[Path]:
    """Return the checkpoints that rank 0 sees, the newest first. Collective, blocks.

    Only rank 0 looks, since a shared file system may show different files to the ranks.
    """
    own: list[str] = []
    if group.rank() == 0:
        paths = [folder] if (folder / INDEX).exists() else checkpoints_in(folder)
        own = [os.fspath(path.absolute()) for path in paths]
    return [Path(text) for text in gather_json(group, own)[0]]


def _open(path: Path, group: Any) -> Checkpoint:
    """Read the index on every rank, and verify this rank's share of the files. Collective, blocks."""

    def read() -> Checkpoint:
        checkpoint = Checkpoint(path)
        checkpoint.verify(group.rank(), group.size())
        return checkpoint

    return call_together(group, read, CheckpointError)


def _load(checkpoint: Checkpoint, objects: Mapping[str, Any], state: TrainingState, group: Any) -> int:
    rank, num_ranks = group.rank(), group.size()
    call_together(group, lambda: state.check(checkpoint, objects), CheckpointError)
    # It is a barrier, too: ranks of a machine may share weights, and must not train before all have loaded them.
    call_together(group, lambda: state.load_state_dict(checkpoint, objects, rank, num_ranks), CheckpointError)
    step: int = checkpoint.content["step"]
    if rank == 0 and not state.has_position_of(checkpoint):
        print(
            f"distributed_trainer: loaded step {step}, but the position in the data is not restored: batches did not "
            f"come from trainer.loader",
            flush=True,
        )
    return step
