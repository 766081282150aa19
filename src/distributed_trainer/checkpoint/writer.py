# SPDX-License-Identifier: Apache-2.0
"""Write a checkpoint while training continues.

Rank 0 knows that the other ranks have written their files when it sees them in the folder.
"""

from __future__ import annotations

import os
import shutil
import socket
import threading
from pathlib import Path
from typing import Any

from .format import commit, rank_file, write_part
from .state import OwnPart

_LOOK_SECONDS = 0.02  # interval at which rank 0 looks for the other ranks' files


class BackgroundWrite:
    """A thread that writes this rank's part of a checkpoint; on rank 0 it then completes the checkpoint from all parts.

    The thread writes `_part_error` and `_commit_error`, each before it sets the event after which the main thread reads
    it.

    Args:
        temporary: Folder to write to.
        part: This rank's part.
        rank: This rank's number.
        num_ranks: Number of ranks.
        content: Content of checkpoint.json as far as it is known.
        keep: Number of checkpoints to leave.
    """

    def __init__(self, temporary: Path, part: OwnPart, rank: int, num_ranks: int, content: Any, keep: int) -> None:
        self._temporary, self._rank, self._num_ranks = temporary, rank, num_ranks
        self._part: OwnPart | None = part  # used by the thread, which then frees its memory
        self._part_error: str | None = None
        self._commit_error: str | None = None
        self._part_is_written, self._is_over, self._is_abandoned = (threading.Event() for _ in range(3))
        threading.Thread(target=self._run, args=(content, keep), name="dtrain-checkpoint", daemon=True).start()

    @property
    def has_failed(self) -> bool:
        """Whether writing has failed on this rank so far. Local."""
        return self._part_error is not None or self._commit_error is not None

    def wait_for_part(self) -> str | None:
        """Wait until this rank's files are on the disk; return the error's text, or None. Local."""
        self._part_is_written.wait()
        return self._part_error

    def wait_for_all(self) -> str | None:
        """Wait until the checkpoint is complete; return the error's text, or None. Local, for rank 0."""
        self._is_over.wait()
        return self._commit_error

    def abandon(self) -> None:
        """Remove the files that were written. Local, called when no rank writes any more."""
        self._is_abandoned.set()
        self._is_over.wait()
        if self._rank == 0:
            shutil.rmtree(self._temporary, ignore_errors=True)  # the next save would remove it, too

    def give_up(self) -> bool:
        """Make the thread end soon, without waiting for other ranks; return whether it was done already. Local."""
        self._is_abandoned.set()
        return self._is_over.is_set() and not self.has_failed

    def _run(self, content: Any, keep: int) -> None:
        part, self._part = self._part, None
        assert part is not None
        try:
            write_part(self._temporary, self._rank, part.files, part.tensors, part.states, part.own)
        except Exception as error:
            self._part_error = self._describe(error)
        del part  # frees its memory
        self._part_is_written.set()
        try:
            if self._rank == 0 and self._part_error is None and self._others_have_written():
                commit(self._temporary, self._num_ranks, content, keep)
        except Exception as error:
            self._commit_error = self._describe(error)
        self._is_over.set()

    def _others_have_written(self) -> bool:
        """Wait for the other ranks' files; return False if the write is abandoned."""
        for rank in range(self._num_ranks):
            while not (self._temporary / rank_file(rank)).exists():
                if self._is_abandoned.wait(_LOOK_SECONDS):
                    return False
        return True

    def _describe(self, error: Exception) -> str:
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        place = f"rank {self._rank} on {socket.gethostname()}"
        return f"{place} could not write to {os.fspath(self._temporary)}: {text}"
