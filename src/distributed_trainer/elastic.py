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
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from . import job as jobs
from .agreement import Agreement
from .backend import gather_objects
from .errors import DistributedTrainerError
from .memory import FittingPieces, StepState
from .options import TrainerOptions
from .positions import Positions
from .replica import Replica
from .reporting import Reporter
from .saving import Saving

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
    _reporter: Reporter
    _positions: Positions
    _first_world_size: int
    _join: Callable[..., None]
    _is_elastic = False
    """Set by `_begin_elastic`."""
    _last_repeat: tuple[int, Any] = (0, None)
    """Calls of `_repeat` that are done on this rank, and what the last has given."""

    def _begin_elastic(self) -> str | None:
        """Has steps survive deaths from now on, or returns why that cannot be. Local, the same on every rank."""
        options = self._options
        obstacles = {
            "with shard_optimizer a killed rank takes its part of the optimizer's state along": options.shard_optimizer,
            "with compression a killed rank takes along what it has not sent yet": options.compression is not None,
            "with split_batches=False a killed rank takes its samples along": not options.split_batches,
            "the script has several trainers": len(_trainers) > 0,
        }
        for reason, is_there in obstacles.items():
            if is_there:
                for other in _trainers:
                    other._is_elastic = False
                return reason
        _trainers.add(self)
        self._is_elastic, self._saving.repeat = True, self._repeat
        return None

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
        if not self._agreement.takes_whole_batches and self._positions.is_outdated(inputs, targets):
            inputs, targets = self._positions.read_again(inputs, targets)  # ranks were killed in another call
        while True:
            begun, start = self._replica.progress, StepState(self.model, self.device)
            try:
                result = compute(inputs, targets)
                update(False)
                return result
            except DistributedTrainerError as error:
                if not self._membership.has_lost_rank(error):
                    raise
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
            logger.warning(
                "%d of %d ranks were killed: training goes on with %d, %s step %d.",
                *(size_before - self.world_size, size_before, self.world_size),
                *(("after", newest) if result is not None or start is None else ("repeating", newest + 1)),
            )
        if failure is not None:
            raise failure
        return result

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
        self._agreement = Agreement(group, self._options, lambda: self._saving.flags)
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
