# SPDX-License-Identifier: Apache-2.0
"""Carry the saves that some rank asks for to all ranks, and make them on all at the same step.

1. `request` records a save on the rank that asks; a signal may also ask. `flags` is a byte that the ranks exchange with
   other data in each step anyway; `maybe_save` is called on all ranks with the union of these bytes.
2. If any rank asks, the ranks exchange their requests. Each rank copies its part of the state, before the step changes
   any weight.
3. A thread of each rank writes (writer.py). A rank whose thread fails says so by its flags, and all ranks raise.
4. At an orderly end of the trainer the ranks meet once more, in a group for this purpose, so that a save asked for in
   the script's last line is made: the other ranks are then at their end, too. A rank that meets has left the groups of
   the steps, so that a rank that still waits for it there gets an error.
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
from typing import Any, Protocol, TypeVar

from ..backend import job as jobs
from ..backend.gather import gather_bytes, gather_json, raise_together
from ..data.handshake import StepFlags
from ..errors import CheckpointError, DistributedTrainerError, MismatchError
from ..replica.replica import Replica
from .format import temporary_folder
from .state import MODEL, OwnPart, TrainingState, is_stateful
from .writer import BackgroundWrite

_Result = TypeVar("_Result")

logger = logging.getLogger("distributed_trainer")


class Ranks(Protocol):
    """The ranks that make a save: the part of a trainer's `Session` that is used here."""

    @property
    def groups(self) -> Any:
        """Process groups: `steps`, and `end` for the meeting at the end."""

    @property
    def replica(self) -> Replica | None:
        """This rank's replica; None if the script no longer holds the trainer."""


class Retrying(Protocol):
    """A trainer's recovery: the part that the meeting at the end uses, since ranks may be killed meanwhile."""

    @property
    def session(self) -> Ranks:
        """The present ranks."""

    def retry(self, call: Callable[[Any], _Result]) -> _Result:
        """Call a collective function with the present session, again if ranks are killed; return its result."""


@dataclass(frozen=True)
class Request:
    """A save that a rank asks for."""

    folder: Path
    keep: int
    objects: Mapping[str, Any]
    trainable_only: bool = False

    @classmethod
    def check(cls, folder: Any, keep: Any, objects: dict[str, Any], trainable_only: Any = False) -> Request:
        """Return the request for arguments of `DistributedTrainer.save`, or raise TypeError or ValueError. Local.

        A list of objects becomes an object for each position: `optimizer[0]`, `optimizer[1]`.
        """
        if not isinstance(folder, str | os.PathLike):
            raise TypeError(f"folder must be a path, not {folder!r}")
        if not isinstance(keep, int) or isinstance(keep, bool) or keep < 1:
            raise ValueError(f"keep must be an int of at least 1, the number of checkpoints to leave, not {keep!r}")
        if not isinstance(trainable_only, bool):
            raise TypeError(f"trainable_only must be True or False, not {trainable_only!r}")
        single: dict[str, Any] = {}
        for name, value in objects.items():
            if name == MODEL:
                raise ValueError("the model is saved by itself; leave model= out")
            is_list = isinstance(value, list | tuple) and not is_stateful(value)
            single |= {f"{name}[{number}]": one for number, one in enumerate(value)} if is_list else {name: value}
        for name, value in single.items():
            if not is_stateful(value):
                raise TypeError(f"{name} must have state_dict and load_state_dict, as optimizers do, not {value!r}")
        return cls(Path(folder).absolute(), keep, single, trainable_only)


class Checkpointer:
    """Make the saves of a trainer. It outlives ranks. Making a Checkpointer is local.

    Args:
        state: State to save.
        groups: Process groups of the ranks (`Ranks.groups`).

    Attributes:
        groups: Process groups of the present ranks.
    """

    def __init__(self, state: TrainingState, groups: Any) -> None:
        self._state = weakref.ref(state)
        self.groups = groups
        self._request: Request | None = None
        self._on_signal: Request | None = None
        self._is_signalled = False
        self._has_left = False
        self._writing: BackgroundWrite | None = None

    @property
    def flags(self) -> int:
        """This rank's `StepFlags` about saves. Local."""
        return (
            (self._request is not None or self._is_signalled) * StepFlags.ASKS_FOR_SAVE
            | (self._writing is not None and self._writing.has_failed) * StepFlags.SAVE_HAS_FAILED
            | self._has_left * StepFlags.HAS_LEFT
        )

    def request(self, request: Request) -> None:
        """Ask for a save on this rank. Local.

        Raises:
            ValueError: An earlier request for another folder still waits for its step.
        """
        if self._request is not None and self._request.folder != request.folder:
            raise ValueError(
                f"the save to {self._request.folder} waits for the next step; ask for one to {request.folder} after it"
            )
        self._request = request

    def save_on_signal(self, request: Request) -> None:
        """Make SIGUSR1 ask for a save and the end of the job. Local; without effect outside of the main thread."""
        self._on_signal = request
        this = weakref.ref(self)
        previous = signal.getsignal(signal.SIGUSR1)

        def ask(number: int, frame: Any) -> None:
            checkpointer = this()
            if checkpointer is not None:
                checkpointer._is_signalled = True
            if callable(previous):
                previous(number, frame)

        try:
            signal.signal(signal.SIGUSR1, ask)
        except ValueError:
            logger.warning("SIGUSR1 will not save: resume was not called in the main thread")

    def continue_among(self, session: Ranks) -> None:
        """Meet with these ranks at the end, since others were killed. Local.

        A checkpoint that is not complete yet is given up; rank 0 warns.
        """
        self.groups = session.groups
        if self._writing is not None and not self._writing.give_up() and session.groups.steps.rank() == 0:
            logger.warning("a checkpoint was not made, since ranks were killed meanwhile; older ones are as they were.")
        self._writing = None

    def maybe_save(self, flags: int, session: Ranks) -> None:
        """Make the save that any rank asks for; called in each step. Collective if there are flags; blocks then.

        Args:
            flags: The `StepFlags` that any rank has.
            session: The ranks.

        Raises:
            CheckpointError: An earlier save has failed, or this one cannot begin.
            MismatchError: Ranks ask for saves to different folders.
            SystemExit: After the save, if a signal has asked.
        """
        if flags & StepFlags.ABOUT_SAVES:
            self._save_if_asked(flags, session, session.groups.steps)

    def finalize_at_exit(self, recovery: Retrying, meets: bool) -> None:
        """Make the end of the process call `finalize`, unless that was done before. Local.

        Args:
            recovery: Recovery of the trainer; the trainer may be deleted before the end.
            meets: Whether the ranks meet at the end of the process; else they meet only where `finalize` is called.
        """
        _at_exit.add(self, self._state(), recovery, meets)

    def finalize(self, recovery: Retrying, flags: int = 0) -> int:
        """Wait until the other ranks finalize, too, and make saves that any still asks for. Collective, blocks.

        Args:
            recovery: Recovery of the trainer.
            flags: More `StepFlags` of this rank.

        Returns:
            The `StepFlags` that every rank has; 0 if the ranks did not meet now.

        Raises:
            CheckpointError, MismatchError, SystemExit: See `maybe_save`. The same on every rank.
        """
        if _at_exit.waits_for(self):
            try:
                return self._finalize(recovery, flags)
            finally:
                _at_exit.remove(self)
        return 0

    def abandon(self) -> None:
        """End without waiting for the other ranks. Local.

        The end of the process takes part in the meeting, since other ranks may wait there.
        """
        self._has_left, self._request, self._is_signalled = True, None, False

    def wait_for_write(self) -> None:
        """Wait until this rank's files are on the disk. Local."""
        if self._writing is not None:
            self._writing.wait_for_part()
            self._writing.wait_for_all()

    def _finalize(self, recovery: Retrying, flags: int) -> int:
        own = self.flags | flags
        try:
            message = own.to_bytes(2, "little")
            gathered = recovery.retry(lambda session: gather_bytes(session.groups.end, message))
            rows = [int.from_bytes(row, "little") for row in gathered]
        except DistributedTrainerError as error:
            if self._writing is not None:
                self._writing.wait_for_part()
            if own & StepFlags.ASKS_FOR_SAVE:
                raise CheckpointError(f"the save asked for at the end could not be made: {error}") from error
            return 0
        finally:
            self._has_left = True
        flags, session = functools.reduce(operator.or_, rows), recovery.session
        if flags & StepFlags.HAS_LEFT and flags & StepFlags.ASKS_FOR_SAVE:
            self._finish_write(session.groups.end)
            left = ", ".join(str(rank) for rank, of_rank in enumerate(rows) if of_rank & StepFlags.HAS_LEFT)
            raise CheckpointError(
                f"the save asked for at the end was not made: rank(s) {left} left the trainer by an exception"
            )
        self._save_if_asked(flags, session, session.groups.end)
        self._finish_write(session.groups.end)
        return functools.reduce(operator.and_, rows)

    def _save_if_asked(self, flags: int, session: Ranks, group: Any) -> None:
        self._finish_write(group)
        if not flags & StepFlags.ASKS_FOR_SAVE:
            return
        request, by_signal = self._request, self._is_signalled
        own = request or (self._on_signal if by_signal else None)
        self._request, self._is_signalled = None, False
        state = self._state()
        message = {"is_signal": by_signal, "token": secrets.token_hex(4), "is_request": request is not None}
        if own is not None and state is not None:
            numbers = state.numbers_of(own.objects)
            message |= {"folder": os.fspath(own.folder), "keep": own.keep, "numbers": numbers, "step": state.num_steps}
            message |= {"trainable_only": own.trainable_only}
        rows = gather_json(group, message)
        writer, agreed = _agree_on_request(rows)
        objects = None if writer != group.rank() or own is None else own.objects
        self._start_write(session.replica, group, agreed, objects, rows[0]["token"])
        if any(row["is_signal"] for row in rows):
            self._finish_write(group)
            if group.rank() == 0:
                step, folder = agreed["step"], agreed["folder"]
                print(f"distributed_trainer: SIGUSR1: saved step {step} in {folder}, ending", flush=True)
            raise SystemExit(0)

    def _start_write(
        self, replica: Replica | None, group: Any, agreed: Any, objects: Mapping[str, Any] | None, token: str
    ) -> None:
        """Copy this rank's part and begin to write it. Collective, blocks."""
        folder, step, rank = Path(agreed["folder"]), agreed["step"], group.rank()
        temporary = temporary_folder(folder, step, token)
        part: OwnPart | None = None
        error: CheckpointError | None = None
        try:
            if rank == 0:
                temporary.mkdir(parents=True)
            state = self._state()
            if state is None or replica is None:
                raise CheckpointError(f"rank {rank} has deleted its trainer: call trainer.close() at the end")
            only = agreed["trainable_only"]
            part = state.snapshot(replica, agreed["numbers"], objects, rank, group.size(), only)
        except OSError as caught:
            error = CheckpointError(f"rank 0 on {socket.gethostname()} could not make {temporary}: {caught.strerror}")
        except Exception as caught:
            error = CheckpointError(str(caught))
        try:
            raise_together(group, error, CheckpointError)
            unseen = CheckpointError(
                f"rank {rank} on {socket.gethostname()} does not see {temporary}, which rank 0 has made. Save to a "
                f"folder that all machines share."
            )
            raise_together(group, None if temporary.is_dir() else unseen, CheckpointError)
        except CheckpointError:
            if rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        assert part is not None
        self._writing = BackgroundWrite(temporary, part, rank, group.size(), {"step": step}, agreed["keep"])

    def _finish_write(self, group: Any) -> None:
        """Wait for the last save. Collective if there is one, and blocks."""
        if self._writing is None:
            return
        writing, self._writing = self._writing, None
        try:
            for wait in (writing.wait_for_part, writing.wait_for_all if group.rank() == 0 else lambda: None):
                text = wait()
                raise_together(group, None if text is None else CheckpointError(text), CheckpointError)
        except CheckpointError as error:
            writing.abandon()
            raise CheckpointError(f"a checkpoint was not made: {error}. Older ones are as they were.") from None


def _agree_on_request(rows: list[Any]) -> tuple[int, Any]:
    """Return which rank's request is made, and the request; the same on every rank.

    This rank also writes the objects that are not the same on every rank.

    Args:
        rows: The ranks' messages.

    Raises:
        CheckpointError: No rank that asks still has its trainer.
        MismatchError: Ranks ask for saves to different folders.
    """
    asking = [rank for rank, row in enumerate(rows) if row["is_request"] and "folder" in row]
    asking = asking or [rank for rank, row in enumerate(rows) if "folder" in row]
    if not asking:
        raise CheckpointError("a rank asks for a save but has deleted its trainer: call trainer.close() at the end")
    first = rows[asking[0]]
    for rank in asking:
        if rows[rank]["folder"] != first["folder"]:
            raise MismatchError(
                f"rank {asking[0]} saves to {first['folder']}, rank {rank} to {rows[rank]['folder']}, in the same "
                f"step. Save to one folder."
            )
    return asking[0], first


@dataclass(frozen=True)
class _Open:
    """A trainer whose ranks have not met at its end."""

    checkpointer: Checkpointer
    recovery: weakref.ref[Retrying]
    meets: bool


@dataclass(frozen=True)
class _Deleted:
    """`Ranks` and `Retrying` of a trainer that the script has deleted, for the meeting with the other ranks."""

    groups: Any
    replica: None = None

    @property
    def session(self) -> Any:
        return self

    def retry(self, call: Callable[[Any], _Result]) -> _Result:
        return call(self)


class _AtExit:
    """The trainers whose ranks have not met at their end, in the order in which they were made."""

    def __init__(self) -> None:
        self._open: list[_Open] = []
        self._is_registered = False
        # Keeps the last trainer's objects: the script may have deleted them, and other ranks may still ask for a save.
        self._last: tuple[Retrying, TrainingState | None] | None = None

    def add(self, checkpointer: Checkpointer, state: TrainingState | None, recovery: Retrying, meets: bool) -> None:
        if not self._is_registered:
            self._is_registered = True
            atexit.register(self._run, os.getpid())  # registered after the job's exit function, so called before it
        self._open.append(_Open(checkpointer, weakref.ref(recovery), meets))
        self._last = recovery, state

    def waits_for(self, checkpointer: Checkpointer) -> bool:
        """Return whether a checkpointer has not met yet."""
        return any(one.checkpointer is checkpointer for one in self._open)

    def remove(self, checkpointer: Checkpointer) -> None:
        """Forget a checkpointer that has met, and release its trainer."""
        one = next(one for one in self._open if one.checkpointer is checkpointer)
        self._open.remove(one)
        if self._last is not None and one.recovery() is self._last[0]:
            self._last = None

    def _run(self, pid: int) -> None:
        if os.getpid() != pid:
            return
        ends = [(one, one.recovery() or _Deleted(one.checkpointer.groups)) for one in self._open]
        jobs.leave_groups([recovery.session.groups.end for one, recovery in ends if one.meets])
        by_exception = getattr(sys, "last_value", None) is not None  # on this rank only; else the job is over
        try:
            for one, recovery in ends:
                checkpointer = one.checkpointer
                if by_exception:
                    checkpointer.abandon()
                if one.meets:
                    with contextlib.suppress(SystemExit):
                        _finalize_at_exit(checkpointer, recovery)
                    continue
                checkpointer.wait_for_write()
                if checkpointer.flags & StepFlags.ASKS_FOR_SAVE:
                    raise CheckpointError(
                        "the save asked for at the end was not made: call trainer.close() on all ranks"
                    )
        except Exception as error:
            sys.excepthook(type(error), error, error.__traceback__)  # this ends the job if there are other ranks
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)


def _finalize_at_exit(checkpointer: Checkpointer, recovery: Retrying) -> None:
    """Call `finalize`, and compare the weights of ranks that have all trained by themselves. Collective, blocks."""
    replica = recovery.session.replica
    compares = replica is not None and replica.has_unsummed_step
    if checkpointer.finalize(recovery, compares * StepFlags.ENDS_TRAINING) & StepFlags.ENDS_TRAINING:
        recovery.retry(lambda session: session.replica.divergence.check_at_end(session.groups.end))


_at_exit = _AtExit()
