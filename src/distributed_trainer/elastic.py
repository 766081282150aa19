# SPDX-License-Identifier: Apache-2.0
"""Steps that go on when ranks are killed, under `distributed-trainer run --elastic`.

1. The death of a rank fails all that the others have called together, or will (engine/runtime/recovery.cpp), so each of
   them leaves its step, or begins its next, with an error.
2. Those that live make new groups, and tell each other how many steps have passed the commit point on each. It is the
   same number, or one less.
3. A rank with one less has all gradients of that step, since they come before the commit point. It is told what it did
   not learn, the sums of the loss, and finishes the step.
4. A rank in a step that nobody has brought so far goes back to its start: only buffers and random states have changed.
   All then repeat it with the batch divided anew, so that every sample counts once. To need no more memory than before,
   each computes its larger part in several pieces. Not if the model has buffers, which forward may change once a piece:
   BatchNorm's statistics, those that average or count.
5. Rank 0 starts a process in the place of each that was killed. It runs the script until `resume`, where it waits. The
   next step begins with its admission: it gets the state from rank 0, as if from a checkpoint of that moment.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from . import handover, launch
from . import job as jobs
from .agreement import Agreement
from .backend import gather_objects
from .computation import REPLACEMENT_WAITS, ReplacementWaits
from .errors import DistributedTrainerError
from .memory import FittingPieces, StepState
from .options import TrainerOptions
from .positions import Positions
from .replica import Replica
from .reporting import Reporter
from .saving import Saving
from .training_state import TrainingState

_MOST_TRIES = 4  # to start a process, one after the other; at the last it is said that there will be none

logger = logging.getLogger("distributed_trainer")


class Membership:
    """A trainer's place in a job that may lose ranks.

    Attributes:
        job: Of the ranks that live.
    """

    def __init__(self, job: jobs.Job, wire_dtype: str | None) -> None:
        self.job = job
        self._wire_dtype = wire_dtype

    def create_groups(self) -> tuple[Any, Any, Any]:
        """Those of a trainer: of gradients, of steps, of the end. Collective, blocks."""
        return self.job.create_group(wire_dtype=self._wire_dtype), self.job.create_group(), self.job.create_group()

    def counters(self) -> dict[str, int]:
        """What this rank's engine has done. Local."""
        return self.job.engine.counters()

    def has_lost_rank(self, error: DistributedTrainerError) -> bool:
        """Whether an error came from a rank's death. Local."""
        return type(error) is DistributedTrainerError and self.job.engine.has_lost_rank(1.0)

    def recover(self) -> None:
        """Goes on with the ranks that live. Collective over them, blocks."""
        self.job = jobs.recover(self.job)

    def admit(self) -> None:
        """Goes on with the ranks and a replacement that is ready. Collective over all, blocks."""
        self.job = jobs.admit(self.job)

    def join(self) -> bool:
        """In a replacement: likewise; False if it is not needed any more. Blocks."""
        job = jobs.join(self.job)
        self.job = job or self.job
        return job is not None


class Elastic:
    """What `DistributedTrainer`, which has the rest, does for it."""

    model: nn.Module
    device: torch.device
    world_size: int
    _options: TrainerOptions
    _membership: Membership | None
    _replica: Replica
    _agreement: Agreement
    _fitting: FittingPieces
    _saving: Saving
    _state: TrainingState
    _resumed_objects: Mapping[str, Any] | None
    _reporter: Reporter
    _positions: Positions
    _first_world_size: int
    _join: Callable[..., None]
    _is_elastic = False
    """Set by `_begin_elastic`."""
    _num_tries_left = _MOST_TRIES
    _last_repeat: tuple[int, Any] = (0, None)
    """Calls of `_repeat` that are done on this rank, and what the last has given."""

    def _begin_elastic(self) -> None:
        """Has steps survive deaths from now on, or says why that cannot be. Local, the same on every rank."""
        options, membership = self._options, self._membership
        reason = "the trainer's ranks are those of a process group of the script's"
        if membership is not None:
            reason = membership.job.obstacle_to_elastic
        obstacles = {
            "with shard_optimizer a killed rank takes its part of the optimizer's state along": options.shard_optimizer,
            "with compression a killed rank takes along what it has not sent yet": options.compression is not None,
            "NCCL does not give up what a killed rank has begun": self.device.type != "cpu",
            "with split_batches=False a killed rank takes its samples along": not options.split_batches,
            "the script has several trainers": len(_trainers) > 0,
        }
        reason = reason or next((text for text, is_there in obstacles.items() if is_there), None)
        if reason is None:
            _trainers.add(self)
            self._is_elastic, self._saving.repeat = True, self._repeat
            return
        for other in _trainers:
            other._is_elastic = False
        if self.rank == 0:
            logger.warning("--elastic: a killed rank ends the job, which may then be started again, since %s.", reason)

    def _end_elastic(self) -> None:
        """Leaves other trainers of the script alone. Local."""
        _trainers.discard(self)

    def _survive(
        self,
        inputs: Any,
        targets: Any,
        compute: Callable[[Any, Any], tuple[list[float], Any]],
        update: Callable[[bool], object],
    ) -> tuple[list[float], Any]:
        """Computes a step and updates the weights, and goes on where ranks are killed meanwhile. Collective, blocks.

        Args:
            inputs: Of the batch, or this rank's part.
            targets: Likewise.
            compute: Gives the loss's sums and its structure; the gradients are then summed.
            update: Has the optimizer step; with True, without the other ranks.

        Returns:
            What `compute` gives.
        """
        if not self._is_elastic:
            result = compute(inputs, targets)
            update(False)
            return result
        assert self._membership is not None
        if self._is_waiting:
            raise ValueError(
                "this process takes the place of a killed one and needs its state: call trainer.resume before the "
                "first step"
            )
        if not self._agreement.takes_whole_batches and self._positions.is_outdated(inputs, targets):
            inputs, targets = self._positions.read_again(inputs, targets)  # ranks were killed in another call
        while True:
            begun, start = self._replica.progress, StepState(self.model, self.device)
            self._start_replacement()
            try:
                result = compute(inputs, targets)
                update(False)
                return result
            except ReplacementWaits:
                start.restore()
                admits = True
            except DistributedTrainerError as error:
                if not self._membership.has_lost_rank(error):
                    raise
                admits = False
            if not (admits and self._admit()):
                concluded = self._go_on(begun, start, update)
                if concluded is not None:
                    return concluded
            if not self._agreement.takes_whole_batches:
                inputs, targets = self._positions.read_again(inputs, targets)

    def _repeat(self, call: Callable[[], Any]) -> Any:
        """Returns what a collective call does that changes nothing before its end, called again where ranks are killed.

        Collective, blocks. The same is returned on every rank.
        """
        number = self._last_repeat[0] + 1
        while self._last_repeat[0] < number:
            try:
                self._last_repeat = number, call()
            except DistributedTrainerError as error:
                if not self._is_elastic or not self._membership.has_lost_rank(error):
                    raise
                self._go_on(self._replica.progress, None, None)
        return self._last_repeat[1]

    def _go_on(
        self, begun: tuple[int, int], start: StepState | None, update: Callable[[bool], object] | None
    ) -> tuple[list[float], Any] | None:
        """Has this rank finish its step, if any has passed its commit point, and go on with those that live.

        Collective over these, blocks.

        Args:
            begun: The replica's progress when the step began.
            start: What to go back to; None if this rank is between steps.
            update: As of `_survive`; None likewise.

        Returns:
            What `compute` would have given, if the step is done; None if it is to be repeated.
        """
        assert self._membership is not None
        size_before, result, failure = self.world_size, None, None
        while True:
            try:
                self._membership.recover()
                groups = self._membership.create_groups()
                own = self._replica.num_sums
                own_row = own, self._replica.is_settled, self._replica.outcome, self._last_repeat
                rows = gather_objects(groups[1], own_row)
                # A call that some rank has from all is done: that rank will not make it again.
                self._last_repeat = max((row[3] for row in rows), key=lambda repeat: repeat[0])
                newest = max(count for count, *_ in rows)
                ahead = [rank for rank, (count, *_) in enumerate(rows) if count == newest]
                if result is None and newest > begun[1]:
                    result = self._replica.conclude(None if own == newest else rows[ahead[0]][2])
                    if update is not None and self._replica.num_steps == begun[0]:
                        try:
                            update(True)
                        except FloatingPointError as error:  # on all ranks, once they are together again
                            failure = error
                elif result is None and start is not None:
                    start.restore()
                settled = [rank for rank in ahead if rows[rank][1]]
                self._rejoin(groups, (settled or ahead)[0])
                break
            except DistributedTrainerError as error:  # another one has died
                if not self._membership.has_lost_rank(error):
                    raise
        if self._membership.job.rank == 0:
            num_killed = size_before - self.world_size
            what = f"{num_killed} of {size_before} ranks were killed" if num_killed else "a new process was killed"
            where = ("after", newest) if result is not None or start is None else ("repeating", newest + 1)
            logger.warning("%s: training goes on with %d, %s step %d.", what, self.world_size, *where)
        if failure is not None:
            raise failure
        return result

    def _flags(self) -> int:
        """What this rank has to tell the others in each step, in a byte. Local."""
        waits = self._is_elastic and self._membership.job.engine.has_ready_replacement()
        return self._saving.flags | waits * REPLACEMENT_WAITS

    def _start_replacement(self) -> None:
        """Starts a process in the place of a killed one, on rank 0, if the script knows how to go on. Local.

        That is: it gives its objects to `resume`, and its loops are those of `epochs` and `loader`.
        """
        engine = self._membership.job.engine
        can_go_on = self._resumed_objects is not None and self._positions.lead
        if engine.rank != 0 or self.world_size == self._first_world_size or not can_go_on or not self._num_tries_left:
            return
        if not engine.has_replacement():
            self._num_tries_left -= 1
            if not self._num_tries_left:
                logger.warning("no process could be started in the place of a killed one; training goes on without.")
                return
            redirection = launch.redirection(os.environ.get(launch.LOG_DIRECTORY), "new-$$")
            command, *arguments = [*redirection, sys.executable, *sys.orig_argv[1:]]
            engine.start_replacement(command, arguments, launch.START_DIRECTORY)

    @property
    def _is_waiting(self) -> bool:
        """Whether this process is to take a killed one's place, and has not yet."""
        return self._membership is not None and self._membership.job.is_replacement

    def _admit(self) -> bool:
        """Goes on with a process more, which gets its state from rank 0; False if a rank was killed meanwhile.

        Collective over all ranks, blocks.
        """
        try:
            self._membership.admit()
            groups = self._membership.create_groups()
            are_new = gather_objects(groups[1], False)
            if groups[1].rank() == 0:
                about = {
                    "first_world_size": self._first_world_size,
                    "threads": torch.get_num_threads(),
                    "num_repeats": self._last_repeat[0],
                }
                for rank in (rank for rank, is_new in enumerate(are_new) if is_new):
                    handover.give(self._state, self._resumed_objects, about, groups[1], rank)
            self._rejoin(groups, 0)
        except DistributedTrainerError as error:
            if not self._membership.has_lost_rank(error):
                raise
            return False
        self._num_tries_left = _MOST_TRIES
        if self.rank == 0:
            what = "a new process has taken the place of a killed one: training goes on with %d ranks at step %d."
            logger.warning(what, self.world_size, self._replica.num_steps + 1)
        return True

    def _take_place(self, objects: Mapping[str, Any]) -> int:
        """In a new process: waits until it is admitted, and gets its state. Returns the number of steps made. Blocks.

        Raises:
            SystemExit: It is not needed any more.
        """
        try:
            if not self._membership.join():
                raise SystemExit(0)
            groups = self._membership.create_groups()
            if all(gather_objects(groups[1], True)):
                raise DistributedTrainerError("all ranks that had the training's state were killed")
            received = handover.take(groups[1], 0)
            self._first_world_size = received.about["first_world_size"]
            self._last_repeat = received.about["num_repeats"], None
            torch.set_num_threads(received.about["threads"])
            self._state.check(received, objects)
            self._state.put_back(received, objects, groups[1].rank(), groups[1].size())
            self._rejoin(groups, 0)
        except Exception:
            # As if it had been killed: so the others go on without it.
            traceback.print_exc()
            sys.stderr.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return received.content["step"]

    def _rejoin(self, groups: tuple[Any, Any, Any], source: int) -> None:
        """Makes anew what this rank does together with the others. Collective, blocks.

        Args:
            groups: Of a trainer.
            source: Rank that has the buffers of the last step.
        """
        assert self._membership is not None
        kind, group = type(self._replica), groups[1]
        replica = kind(self.model, groups[:2], self.device, self._options, earlier=self._replica)
        replica.share_buffers(source)
        self._fitting = FittingPieces(self.model, group, self.device, self._fitting.num_pieces)
        takes_whole_batches = self._agreement.takes_whole_batches
        self._agreement = Agreement(group, self._options, self._flags)
        self._agreement.takes_whole_batches = takes_whole_batches
        self._saving.rejoin(group, groups[2])
        self._reporter.rejoin(group)
        self._positions.read_ahead_anew()
        self._join(groups, self._membership.job.local_rank, replica)

    def _num_pieces(self) -> int:
        """In how many pieces a part is computed so that none is longer than those of the first ranks."""
        if self._options.reproducible is not None or any(True for _ in self.model.buffers()):
            return 1
        return -(-self._first_world_size // self.world_size)


_trainers: weakref.WeakSet[Elastic] = weakref.WeakSet()
