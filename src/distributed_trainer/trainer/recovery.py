# SPDX-License-Identifier: Apache-2.0
"""Continue steps when ranks are killed, under `distributed-trainer run --elastic`.

1. A rank's death fails the collectives of the other ranks, now or later (engine/runtime/recovery.cpp). So each of them
   gets an error in its step, or at the start of its next step.
2. The surviving ranks make new groups, and exchange how many steps have passed the commit point on each. It is the
   same number on all ranks, or one less on some.
3. A rank with one less has all gradients of that step, since they are summed before the commit point. It only lacks the
   sums of the loss: another rank sends them, and it finishes the step.
4. If no rank has passed the commit point of the step, every rank goes back to the start of its step: only buffers and
   random states have changed. All ranks then repeat it with the batch divided again, so that every sample counts once.
   To need no more memory than before, each rank computes its larger part in several pieces. This is not done if the
   model has buffers, since forward may change them once per piece (statistics of BatchNorm, averages, counts).
5. Rank 0 starts a process to replace each killed rank (replacement.py).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from ..backend import job as jobs
from ..backend.gather import gather_objects
from ..checkpoint.checkpointer import Checkpointer
from ..checkpoint.state import TrainingState
from ..data.handshake import StepFlags
from ..data.position import DataPosition
from ..errors import DistributedTrainerError, LaunchError
from ..replica.model_state import StepSnapshot
from .membership import Groups, Membership
from .replacement import Replacement
from .session import Session
from .step import ReplacementWaits

_Result = TypeVar("_Result")
StepResult = tuple[list[float], Any]
"""Sums of the loss's terms over all ranks, and the loss's structure."""

logger = logging.getLogger("distributed_trainer")

_ENDS_JOB = "--elastic: a killed rank ends the job, which may then be started again, since %s."


@dataclass(frozen=True)
class StepAttempt:
    """A step that may be repeated among other ranks."""

    inputs: Any
    targets: Any
    compute: Callable[[Session, Any, Any], StepResult]
    """Called with the session, inputs and targets: computes the step up to the summed gradients."""
    update: Callable[[Session, bool], object]
    """Make the optimizer's step; with True as second argument, without calling the other ranks."""

    def run(self, session: Session) -> StepResult:
        """Make the step, once. Collective, blocks."""
        result = self.compute(session, self.inputs, self.targets)
        self.update(session, False)
        return result


class NoRecovery:
    """A trainer's session if a killed rank ends the job.

    Attributes:
        session: The trainer's ranks.
        flags: `StepFlags` of this rank.
        is_waiting: Whether this process waits to replace a killed rank: never.
    """

    flags = 0
    is_waiting = False

    def __init__(self, session: Session) -> None:
        self.session = session

    def run(self, attempt: StepAttempt) -> StepResult:
        """Make a step. Collective, blocks."""
        return attempt.run(self.session)

    def retry(self, call: Callable[[Session], _Result]) -> _Result:
        """Call a collective function with the present session, and return its result. Collective, blocks."""
        return call(self.session)

    def allow_replacement(self, objects: Mapping[str, Any]) -> None:
        """Ignore the objects: no process replaces a killed rank."""

    def disable(self, reason: str | None = None) -> None:
        """Do nothing: a killed rank ends the job anyway."""

    def end(self) -> None:
        """Do nothing when the trainer is closed."""


class ElasticRecovery:
    """A trainer's session, which continues with the surviving ranks when others are killed.

    Args:
        session: The first ranks.
        membership: Place of this rank in the job.
        checkpointer: Makes the trainer's saves.
        position: Position in the data.
        replacement: Starts and admits replacements.

    Attributes:
        session: The present ranks.
    """

    def __init__(
        self,
        session: Session,
        membership: Membership,
        checkpointer: Checkpointer,
        position: DataPosition,
        replacement: Replacement,
    ) -> None:
        self.session = session
        self._membership, self._checkpointer, self._position = membership, checkpointer, position
        self._replacement = replacement
        self._is_on = True
        self._last_retry: tuple[int, Any] = (0, None)  # number of finished calls of `retry`, and the result of the last

    @property
    def flags(self) -> int:
        """`StepFlags` of this rank. Local."""
        return StepFlags.REPLACEMENT_WAITS if self._is_on and self._replacement.is_ready else 0

    @property
    def is_waiting(self) -> bool:
        """Whether this process waits to replace a killed rank. Local."""
        return self._replacement.is_waiting

    def disable(self, reason: str | None = None) -> None:
        """Let a killed rank end the job from now on. Local, on every rank. Rank 0 logs a `reason`, if there is one."""
        if self._is_on and reason is not None and self.session.rank == 0:
            logger.warning(_ENDS_JOB, reason)
        self._is_on = False

    def end(self) -> None:
        """Leave the job's list of recoveries when the trainer is closed. Local."""
        self._membership.job.recoveries.discard(self)

    def allow_replacement(self, objects: Mapping[str, Any]) -> None:
        """Allow processes to replace killed ranks; they receive the state of these objects. Local."""
        self._replacement.objects = objects

    def take_place(self, objects: Mapping[str, Any]) -> int:
        """Wait until this process is admitted, and load the state; return the number of steps made. Blocks.

        Raises:
            SystemExit: The process is no longer needed.
        """
        self.session, num_retries, step = self._replacement.take_place(self.session, objects)
        self._checkpointer.continue_among(self.session)
        self._last_retry = num_retries, None
        return step

    def run(self, attempt: StepAttempt) -> StepResult:
        """Make a step, and continue if ranks are killed meanwhile. Collective, blocks."""
        if not self._is_on:
            return attempt.run(self.session)
        if self.is_waiting:
            raise ValueError(
                "this process takes the place of a killed one and needs its state: call trainer.resume before the "
                "first step"
            )
        if self._position.is_outdated(attempt.inputs, attempt.targets):
            attempt = self._read_again(attempt)  # ranks were killed outside of a step
        while True:
            session = self.session
            begun, start = session.progress.counts, StepSnapshot(session.model, session.device)
            self._replacement.start_if_needed(session)
            try:
                return attempt.run(session)
            except ReplacementWaits:
                start.restore()
                admitted = self._admit()
            except DistributedTrainerError as error:
                if not self._membership.has_lost_rank(error):
                    raise
                admitted = False
            if not admitted:
                result = self.recover(begun, start, attempt)
                if result is not None:
                    return result
            attempt = self._read_again(attempt)

    def retry(self, call: Callable[[Session], _Result]) -> _Result:
        """Call a collective function with the present session; call it again if ranks are killed. Collective, blocks.

        Args:
            call: Function of the session; it must not change anything before its end.

        Returns:
            The result of `call`; the same on every rank.
        """
        number = self._last_retry[0] + 1
        while self._last_retry[0] < number:
            try:
                self._last_retry = number, call(self.session)
            except DistributedTrainerError as error:
                if not self._is_on or not self._membership.has_lost_rank(error):
                    raise
                self.recover(self.session.progress.counts, None, None)
        result: _Result = self._last_retry[1]
        return result

    def recover(
        self, begun: tuple[int, int], start: StepSnapshot | None, attempt: StepAttempt | None
    ) -> StepResult | None:
        """Continue with the surviving ranks; finish this rank's step if any rank has passed its commit point.

        Collective over the surviving ranks, blocks.

        Args:
            begun: `Progress.counts` when the step began.
            start: Snapshot to restore; None if this rank is between steps.
            attempt: The step; None if this rank is between steps.

        Returns:
            Result of the step if it is finished; None if it is to be repeated.
        """
        membership, before, result, failure = self._membership, self.session, None, None
        replica, progress = before.replica, before.progress
        while True:
            try:
                membership.recover()
                groups = membership.create_groups()
                own = progress.num_commits
                about = own, replica.buffers_synced, progress.committed, self._last_retry, progress.makes_script_calls
                rows = gather_objects(groups.steps, about)
                progress.makes_script_calls = any(row[4] for row in rows)
                # A call that has returned on some rank is finished: that rank will not repeat it.
                self._last_retry = max((row[3] for row in rows), key=lambda retry: retry[0])
                newest = max(count for count, *_ in rows)
                ahead = [rank for rank, (count, *_) in enumerate(rows) if count == newest]
                if result is None and newest > begun[1]:
                    result = replica.finish_after_failure(None if own == newest else rows[ahead[0]][2])
                    if attempt is not None and progress.num_steps == begun[0]:
                        try:
                            attempt.update(before, True)
                        except FloatingPointError as error:  # raised below, when all ranks have recovered
                            failure = error
                elif result is None and start is not None:
                    start.restore()
                synced = [rank for rank in ahead if rows[rank][1]]
                self._rebuild(groups, (synced or ahead)[0])
                break
            except DistributedTrainerError as error:  # another rank has died
                if not membership.has_lost_rank(error):
                    raise
        if membership.job.rank == 0:
            num_killed = before.world_size - self.session.world_size
            who = f"{num_killed} of {before.world_size} ranks were" if num_killed else "a new process was"
            where = ("after", newest) if result is not None or start is None else ("repeating", newest + 1)
            logger.warning("%s killed: training continues with %d, %s step %d.", who, self.session.world_size, *where)
        if failure is not None:
            raise failure
        return result

    def _rebuild(self, groups: Groups, source: int) -> None:
        """Continue among the ranks of these groups. Collective, blocks."""
        self.session = self.session.rebuild(groups, self._membership.job.local_rank, source)
        self._checkpointer.continue_among(self.session)
        self._position.read_ahead_again()

    def _admit(self) -> bool:
        """Continue with one more process; return False if a rank was killed meanwhile. Collective over all, blocks."""
        try:
            groups = self._replacement.admit(self.session, self._last_retry[0])
            self._rebuild(groups, 0)
            self._replacement.allow_tries()
        except DistributedTrainerError as error:
            if not self._membership.has_lost_rank(error):
                raise
            return False
        if self.session.rank == 0:
            what = "a new process has taken the place of a killed one: training continues with %d ranks at step %d."
            logger.warning(what, self.session.world_size, self.session.progress.num_steps + 1)
        return True

    def _read_again(self, attempt: StepAttempt) -> StepAttempt:
        """Return the step with this rank's part of the batch among the present ranks."""
        if not self._position.takes_parts:
            return attempt
        inputs, targets = self._position.read_again(attempt.inputs, attempt.targets)
        return StepAttempt(inputs, targets, attempt.compute, attempt.update)


def choose_recovery(
    session: Session,
    membership: Membership | None,
    checkpointer: Checkpointer,
    position: DataPosition,
    state: TrainingState,
) -> NoRecovery | ElasticRecovery:
    """Return the recovery that continues steps under --elastic, or warn why that is not possible. Local, on every rank.

    Returns:
        ElasticRecovery if killed ranks can be survived, else NoRecovery.

    Raises:
        LaunchError: This process was started as a replacement, but the trainer cannot use it.
    """
    if not jobs.wants_elastic():
        return NoRecovery(session)
    options = session.options
    others = jobs.recoveries()
    obstacles = {
        'with shard="optimizer" a killed rank\'s part of the state is lost': options.shards_optimizer,
        "with PowerSGD the gradients that a killed rank has kept back are lost": options.power_sgd is not None,
        "NCCL does not cancel operations that a killed rank has begun": session.device.type != "cpu",
        "with split_batches=False a killed rank's samples are lost": not options.split_batches,
        "the script has several trainers": bool(others),
    }
    reason: str | None = "the trainer uses a process group that the script has made"
    if membership is not None:
        found = (text for text, is_there in obstacles.items() if is_there)
        reason = membership.job.obstacle_to_elastic or next(found, None)
    if reason is None:
        assert membership is not None
        recovery = ElasticRecovery(
            session, membership, checkpointer, position, Replacement(membership, state, position)
        )
        membership.job.recoveries.add(recovery)
        return recovery
    for other in others:
        other.disable()
    if membership is not None and membership.job.is_replacement:
        raise LaunchError(f"this process was started to replace a killed rank, but cannot continue there: {reason}")
    if session.rank == 0:
        logger.warning(_ENDS_JOB, reason)
    return NoRecovery(session)
