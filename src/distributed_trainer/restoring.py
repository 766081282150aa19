# SPDX-License-Identifier: Apache-2.0
"""Finds a checkpoint, looks whether it is whole, and has a trainer go on from it; the same on every rank."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .backend import gather_json
from .checkpoint import INDEX, Checkpoint, checkpoints_in
from .errors import CheckpointError
from .training_state import TrainingState

logger = logging.getLogger("distributed_trainer")


def load(folder: Path, objects: Mapping[str, Any], state: TrainingState, group: Any) -> int:
    """Goes on from a checkpoint, or from the newest in a folder. Collective, blocks.

    Returns:
        Its step.

    Raises:
        CheckpointError: There is none, or it is not whole.
        ValueError: It is of another model, or of other objects. The same on every rank, and nothing has changed.
    """
    found = _find(folder, group)
    if not found:
        raise CheckpointError(f"there is no checkpoint in {folder}")
    return _load(_open(found[0], group), objects, state, group)


def resume(folder: Path, objects: Mapping[str, Any], state: TrainingState, group: Any) -> int | None:
    """Goes on from the newest whole checkpoint in a folder; returns None if there is none at all. Collective, blocks.

    Raises:
        CheckpointError: None of them is whole.
        ValueError: As `load`.
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
    return None


def _find(folder: Path, group: Any) -> list[Path]:
    """What rank 0 sees there, the newest first: ranks that look by themselves may see different things."""
    own: list[str] = []
    if group.rank() == 0:
        paths = [folder] if (folder / INDEX).exists() else checkpoints_in(folder)
        own = [os.fspath(path.absolute()) for path in paths]
    return [Path(text) for text in gather_json(group, own)[0]]


def _open(path: Path, group: Any) -> Checkpoint:
    """Reads the index on every rank; each then looks whether some of the files are as they were written."""
    checkpoint: Checkpoint | None = None

    def look() -> None:
        nonlocal checkpoint
        checkpoint = Checkpoint(path)
        checkpoint.verify(group.rank(), group.size())

    _together(look, group)
    assert checkpoint is not None
    return checkpoint


def _load(checkpoint: Checkpoint, objects: Mapping[str, Any], state: TrainingState, group: Any) -> int:
    rank, num_ranks = group.rank(), group.size()
    _together(lambda: state.check(checkpoint, objects), group)
    # The end of it is a barrier, too: ranks of a machine may share weights, which none may train on before.
    _together(lambda: state.put_back(checkpoint, objects, rank, num_ranks), group)
    step = checkpoint.content["step"]
    if rank == 0 and not state.has_position_of(checkpoint):
        print(
            f"distributed_trainer: loaded step {step}, but the position in the data is not restored: batches did not "
            f"come from trainer.loader",
            flush=True,
        )
    return step


def _together(call: Callable[[], None], group: Any) -> None:
    """Calls something local on every rank, and raises the lowest rank's error on all. Collective, blocks."""
    own = None
    try:
        call()
    except ValueError as error:
        own = ["value", str(error)]
    except Exception as error:
        text = str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
        own = ["checkpoint", text]
    for found in gather_json(group, own):
        if found is not None:
            raise (ValueError if found[0] == "value" else CheckpointError)(found[1])
