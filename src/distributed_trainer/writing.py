# SPDX-License-Identifier: Apache-2.0
"""Writes a checkpoint while training goes on. Ranks learn of each other's files by seeing them in the folder."""

from __future__ import annotations

import os
import shutil
import socket
import threading
from pathlib import Path
from typing import Any

from .checkpoint import commit, rank_file, write_part
from .training_state import OwnPart

_LOOK_SECONDS = 0.02  # how often rank 0 looks whether the others' files are there


class BackgroundWrite:
    """A thread that writes this rank's part of a checkpoint; on rank 0 it then makes the whole of all parts.

    The thread writes `_part_error` and `_commit_error`, each before the event by which the main thread reads it.
    """

    def __init__(self, temporary: Path, part: OwnPart, rank: int, num_ranks: int, content: Any, keep: int) -> None:
        self._temporary, self._rank, self._num_ranks = temporary, rank, num_ranks
        self._part: OwnPart | None = part  # of the thread, which lets go of its memory
        self._part_error: str | None = None
        self._commit_error: str | None = None
        self._part_is_written, self._is_over, self._is_abandoned = (threading.Event() for _ in range(3))
        threading.Thread(target=self._run, args=(content, keep), name="dtrain-checkpoint", daemon=True).start()

    @property
    def has_failed(self) -> bool:
        """Whether it has failed on this rank, so far. Local."""
        return self._part_error is not None or self._commit_error is not None

    def wait_for_part(self) -> str | None:
        """Waits until this rank's files are on the disk; returns what went wrong. Local."""
        self._part_is_written.wait()
        return self._part_error

    def wait_for_all(self) -> str | None:
        """Waits until the checkpoint is whole; returns what went wrong. Local; of use on rank 0."""
        self._is_over.wait()
        return self._commit_error

    def abandon(self) -> None:
        """Removes what was written. Local, once no rank writes any more."""
        self._is_abandoned.set()
        self._is_over.wait()
        if self._rank == 0:
            shutil.rmtree(self._temporary, ignore_errors=True)  # another save would remove it, too

    def give_up(self) -> bool:
        """Has the thread end soon, whatever the others do; returns whether it was through. Local."""
        self._is_abandoned.set()
        return self._is_over.is_set() and not self.has_failed

    def _run(self, content: Any, keep: int) -> None:
        part, self._part = self._part, None
        assert part is not None
        try:
            write_part(self._temporary, self._rank, part.files, part.tensors, part.states, part.own)
        except Exception as error:
            self._part_error = self._describe(error)
        del part  # its memory
        self._part_is_written.set()
        try:
            if self._rank == 0 and self._part_error is None and self._others_have_written():
                commit(self._temporary, self._num_ranks, content, keep)
        except Exception as error:
            self._commit_error = self._describe(error)
        self._is_over.set()

    def _others_have_written(self) -> bool:
        """Waits for them; False if that is of no use any more."""
        for rank in range(self._num_ranks):
            while not (self._temporary / rank_file(rank)).exists():
                if self._is_abandoned.wait(_LOOK_SECONDS):
                    return False
        return True

    def _describe(self, error: Exception) -> str:
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        place = f"rank {self._rank} on {socket.gethostname()}"
        return f"{place} could not write to {os.fspath(self._temporary)}: {text}"
