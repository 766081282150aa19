# SPDX-License-Identifier: Apache-2.0
"""Saves that some rank has asked for, carried to all ranks and made by all at the same step.

1. `request` notes one on the asking rank, and a signal may. `flags` is a byte that goes with what ranks tell each other
   in each step anyway; `take_part` is called on all of them with what these bytes say together.
2. If one asks, ranks tell each other what for. Each copies its part of the state, before the step changes any weight.
3. A thread of each rank writes (writing.py). A rank whose thread fails says so by its flags, and all raise.
4. At an orderly end of the trainer the ranks meet once more, in a group of their own, so that a save asked for in the
   last line is made: the others are then at their end, too. A rank that meets has left the groups of the steps, so that
   one that still waits for it there gets an error.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import logging
import operator
import os
import secrets
import shutil
import signal
import socket
import sys
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import job as jobs
from .backend import gather_bytes, gather_json
from .checkpoint import temporary_folder
from .errors import CheckpointError, DistributedTrainerError, MismatchError
from .training_state import OwnPart, TrainingState
from .writing import BackgroundWrite

logger = logging.getLogger("distributed_trainer")

_ASKS, _HAS_FAILED, _HAS_LEFT = 1, 2, 4


@dataclass(frozen=True)
class Request:
    """What is asked for, on the asking rank."""

    folder: Path
    keep: int
    objects: Mapping[str, Any]


class Saving:
    """Takes part in saves. Making it is local.

    Args:
        state: What is saved.
        group: Of the steps.
        meeting_group: Another of the same ranks, for the end.
        meets_at_exit: Whether the end of the process is an end to meet at; else only `meet` is.
    """

    def __init__(self, state: TrainingState, group: Any, meeting_group: Any, meets_at_exit: bool) -> None:
        self._state = weakref.ref(state)
        self._group, self._meeting_group = group, meeting_group
        self._rank, self._num_ranks = group.rank(), group.size()
        self._request: Request | None = None
        self._armed: Request | None = None
        self._is_signalled = False
        self._has_left = False
        self._writing: BackgroundWrite | None = None
        self.repeat: Callable[[Callable[[], Any]], Any] | None = None  # of the trainer, where ranks may be killed
        self.meets_at_exit = meets_at_exit
        _at_exit.add(self, state)

    @property
    def flags(self) -> int:
        """What this rank has to tell the others, in a byte. Local."""
        asks = self._request is not None or self._is_signalled
        has_failed = self._writing is not None and self._writing.has_failed
        return asks * _ASKS | has_failed * _HAS_FAILED | self._has_left * _HAS_LEFT

    def request(self, request: Request) -> None:
        """Notes that this rank asks for a save. Local.

        Raises:
            ValueError: One to another folder has not been made yet.
        """
        if self._request is not None and self._request.folder != request.folder:
            raise ValueError(
                f"the save to {self._request.folder} waits for the next step; ask for one to {request.folder} after it"
            )
        self._request = request

    def arm(self, request: Request) -> None:
        """Has SIGUSR1 ask for a save and the end of the job. Local; of no effect outside of the main thread."""
        self._armed = request
        this = weakref.ref(self)
        previous = signal.getsignal(signal.SIGUSR1)

        def note(number: int, frame: Any) -> None:
            saving = this()
            if saving is not None:
                saving._is_signalled = True
            if callable(previous):
                previous(number, frame)

        try:
            signal.signal(signal.SIGUSR1, note)
        except ValueError:
            logger.warning("SIGUSR1 asks for no save: resume was not called in the main thread")

    def rejoin(self, group: Any, meeting_group: Any) -> None:
        """Goes on among other ranks, when some were killed. Local.

        A checkpoint that was not whole by then is given up.
        """
        self._group, self._meeting_group = group, meeting_group
        self._rank, self._num_ranks = group.rank(), group.size()
        if self._writing is not None and not self._writing.give_up() and self._rank == 0:
            logger.warning("a checkpoint was not made, since ranks were killed meanwhile; older ones are as they were.")
        self._writing = None

    def take_part(self, flags: int) -> None:
        """To be called in each step with all ranks' flags together. Collective if there are any, and blocks then.

        Raises:
            CheckpointError: An earlier save has failed, or this one cannot begin.
            MismatchError: Ranks ask for saves to different folders.
            SystemExit: After the save, if a signal has asked.
        """
        if flags:
            self._take_part(flags, self._group)

    def meet(self) -> None:
        """Waits for the other ranks' end, and makes saves that any still asks for. Collective, blocks.

        Raises:
            CheckpointError, MismatchError, SystemExit: As `take_part`. The same on every rank.
        """
        if _at_exit.waits_for(self):
            try:
                self._meet()
            finally:
                _at_exit.remove(self)

    def _meet(self) -> None:
        own = self.flags
        try:
            rows = self._flags_of_all(own) if self.repeat is None else self.repeat(lambda: self._flags_of_all(own))
        except DistributedTrainerError as error:
            if self._writing is not None:
                self._writing.wait_for_part()
            if own & _ASKS:
                raise CheckpointError(f"the save asked for at the end could not be made: {error}") from error
            return
        finally:
            self._has_left = True
        flags = functools.reduce(operator.or_, rows)
        if flags & _HAS_LEFT and flags & _ASKS:
            self._settle(self._meeting_group)
            gone = ", ".join(str(rank) for rank, of_rank in enumerate(rows) if of_rank & _HAS_LEFT)
            raise CheckpointError(
                f"the save asked for at the end was not made: rank(s) {gone} left the trainer by an exception"
            )
        self._take_part(flags, self._meeting_group)
        self._settle(self._meeting_group)

    def _flags_of_all(self, own: int) -> list[int]:
        return [row[0] for row in gather_bytes(self._meeting_group, bytes([own]))]

    def leave(self) -> None:
        """Ends without a meeting, which others may wait for: takes part in that when the process ends. Local."""
        self._has_left, self._request, self._is_signalled = True, None, False

    def _take_part(self, flags: int, group: Any) -> None:
        self._settle(group)
        if not flags & _ASKS:
            return
        request, by_signal = self._request, self._is_signalled
        own = request or (self._armed if by_signal else None)
        self._request, self._is_signalled = None, False
        state = self._state()
        message = {"is_signal": by_signal, "token": secrets.token_hex(4), "is_request": request is not None}
        if own is not None and state is not None:
            numbers = state.numbers_of(own.objects)
            message |= {"folder": os.fspath(own.folder), "keep": own.keep, "numbers": numbers, "step": state.num_steps}
        rows = gather_json(group, message)
        writer, agreed = _agree_on_request(rows)
        objects = None if writer != self._rank or own is None else own.objects
        self._save(group, agreed, writer, objects, rows[0]["token"])
        if any(row["is_signal"] for row in rows):
            self._settle(group)
            if self._rank == 0:
                step, folder = agreed["step"], agreed["folder"]
                print(f"distributed_trainer: SIGUSR1: saved step {step} in {folder}, ending", flush=True)
            raise SystemExit(0)

    def _save(self, group: Any, agreed: Any, writer: int, objects: Mapping[str, Any] | None, token: str) -> None:
        """Copies this rank's part and begins to write it."""
        folder, step = Path(agreed["folder"]), agreed["step"]
        temporary = temporary_folder(folder, step, token)
        part: OwnPart | None = None
        error: str | None = None
        try:
            if self._rank == 0:
                temporary.mkdir(parents=True)
            if (state := self._state()) is None:
                raise CheckpointError(f"rank {self._rank} has let go of its trainer: call trainer.close() at the end")
            part = state.take(agreed["numbers"], objects, self._rank, self._num_ranks)
        except OSError as caught:
            error = f"rank 0 on {socket.gethostname()} could not make {temporary}: {caught.strerror}"
        except Exception as caught:
            error = str(caught)
        try:
            self._agree(group, error)
            is_seen = temporary.is_dir()
            place = f"rank {self._rank} on {socket.gethostname()}"
            unseen = (
                f"{place} does not see {temporary}, which rank 0 has made. Save to a folder that all machines share."
            )
            self._agree(group, None if is_seen else unseen)
        except CheckpointError:
            if self._rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        assert part is not None
        self._writing = BackgroundWrite(temporary, part, self._rank, self._num_ranks, {"step": step}, agreed["keep"])

    def _settle(self, group: Any) -> None:
        """Waits for the last save. Collective if there is one, and blocks."""
        if self._writing is None:
            return
        writing, self._writing = self._writing, None
        try:
            self._agree(group, writing.wait_for_part())
            self._agree(group, writing.wait_for_all() if self._rank == 0 else None)
        except CheckpointError as error:
            writing.abandon()
            raise CheckpointError(f"a checkpoint was not made: {error}. Older ones are as they were.") from None

    def _agree(self, group: Any, error: str | None) -> None:
        """Raises the lowest rank's error on all. Collective, blocks."""
        for text in gather_json(group, error):
            if text is not None:
                raise CheckpointError(text)


def _agree_on_request(rows: list[Any]) -> tuple[int, Any]:
    """Which rank writes what only the asking ones have, and what it asks for; the same on every rank."""
    asking = [rank for rank, row in enumerate(rows) if row["is_request"] and "folder" in row]
    asking = asking or [rank for rank, row in enumerate(rows) if "folder" in row]
    if not asking:
        raise CheckpointError("a rank asks for a save but has let go of its trainer: call trainer.close() at the end")
    first = rows[asking[0]]
    for rank in asking:
        if rows[rank]["folder"] != first["folder"]:
            raise MismatchError(
                f"rank {asking[0]} saves to {first['folder']}, rank {rank} to {rows[rank]['folder']}, in the same "
                f"step. Save to one folder."
            )
    return asking[0], first


class _AtExit:
    """The trainers that have not met at their end, in the order in which they were made."""

    def __init__(self) -> None:
        self._open: list[Saving] = []
        self._is_registered = False
        # Of the last trainer: functions that have returned may have let go of it, as other ranks may ask for a save.
        self._last_state: TrainingState | None = None

    def add(self, saving: Saving, state: TrainingState) -> None:
        if not self._is_registered:
            self._is_registered = True
            atexit.register(self._run, os.getpid())  # after the job's own, so it is called before it
        self._open.append(saving)
        self._last_state = state

    def waits_for(self, saving: Saving) -> bool:
        """Whether it has not met yet."""
        return saving in self._open

    def remove(self, saving: Saving) -> None:
        """Notes that it has met, and lets go of its state."""
        self._open.remove(saving)
        if saving._state() is self._last_state:
            self._last_state = None

    def _run(self, pid: int) -> None:
        if os.getpid() != pid:
            return
        jobs.leave_groups([saving._meeting_group for saving in self._open if saving.meets_at_exit])
        by_exception = getattr(sys, "last_value", None) is not None  # of one rank alone: else the job is over
        try:
            for saving in list(self._open):
                if by_exception:
                    saving.leave()
                if saving.meets_at_exit:
                    with contextlib.suppress(SystemExit):
                        saving.meet()
                    continue
                if saving._writing is not None:
                    saving._writing.wait_for_part()
                    saving._writing.wait_for_all()
                if saving.flags & _ASKS:
                    raise CheckpointError(
                        "the save asked for at the end was not made: call trainer.close() on all ranks"
                    )
        except Exception as error:
            sys.excepthook(type(error), error, error.__traceback__)  # ends the job if there are other ranks
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)


_at_exit = _AtExit()
