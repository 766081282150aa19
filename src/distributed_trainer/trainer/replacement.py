# SPDX-License-Identifier: Apache-2.0
"""Processes that replace killed ranks.

Rank 0 starts one for each rank that was killed. The process runs the script until `resume`, where it waits. The next
step begins with its admission: it receives the state from rank 0, as if from a checkpoint of that moment.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback
from collections.abc import Mapping
from typing import Any

import torch

from ..backend.gather import gather_objects
from ..checkpoint import transfer
from ..checkpoint.state import TrainingState
from ..data.position import DataPosition
from ..errors import DistributedTrainerError, MismatchError
from ..launch import relaunch
from .membership import Groups, Membership
from .session import Session

_MOST_TRIES = 4  # attempts to start a process; in place of the last one a warning says that there will be none

logger = logging.getLogger("distributed_trainer")


class Replacement:
    """Start and admit processes that replace killed ranks; in such a process, wait to be admitted.

    Args:
        membership: Place of this process in the job.
        state: State of the training, sent or received.
        position: Position in the data.

    Attributes:
        objects: Objects that the script passed to `resume`; None before. Without them no process could continue.
    """

    def __init__(self, membership: Membership, state: TrainingState, position: DataPosition) -> None:
        self._membership, self._state, self._position = membership, state, position
        self.objects: Mapping[str, Any] | None = None
        self._num_tries_left = _MOST_TRIES

    @property
    def is_waiting(self) -> bool:
        """Whether this process waits to replace a killed rank. Local."""
        return self._membership.job.is_replacement

    @property
    def is_ready(self) -> bool:
        """Whether a process waits to be admitted, as far as this rank knows. Local."""
        return self._membership.job.engine.has_ready_replacement()

    def start_if_needed(self, session: Session) -> None:
        """Start a process to replace a killed rank, on rank 0, if the script can continue there. Local.

        It can continue if the script passes its objects to `resume`, and its loops are those of `epochs` and `loader`.
        """
        engine = self._membership.job.engine
        can_continue = self.objects is not None and self._position.leads
        is_short = session.world_size < session.first_world_size
        if session.rank != 0 or not is_short or not can_continue or not self._num_tries_left:
            return
        if engine.has_replacement():
            return
        self._num_tries_left -= 1
        if not self._num_tries_left:
            logger.warning("no process could be started in the place of a killed one; training continues without one.")
            return
        redirection = relaunch.redirection(os.environ.get(relaunch.LOG_DIRECTORY), "new-$$")
        words: list[str] = [*redirection, sys.executable, *sys.orig_argv[1:]]
        engine.start_replacement(words[0], words[1:], relaunch.START_DIRECTORY)

    def allow_tries(self) -> None:
        """Allow as many attempts as at first for the next process, since this one has continued. Local."""
        self._num_tries_left = _MOST_TRIES

    def admit(self, session: Session, num_retries: int) -> Groups:
        """Let the waiting process join; rank 0 sends it the state. Collective over all ranks, blocks.

        Args:
            session: The ranks before.
            num_retries: Number of finished calls of `ElasticRecovery.retry`.

        Returns:
            Process groups of all ranks, the new process included.
        """
        self._membership.admit()
        groups = self._membership.create_groups()
        are_new = gather_objects(groups.steps, False)
        if groups.steps.rank() == 0:
            about = {
                "first_world_size": session.first_world_size,
                "threads": torch.get_num_threads(),
                "options": repr(session.options),
                "num_retries": num_retries,
                "makes_script_calls": session.progress.makes_script_calls,
            }
            for rank in (rank for rank, is_new in enumerate(are_new) if is_new):
                transfer.send_state(self._state, session.replica, self.objects or {}, about, groups.steps, rank)
        return groups

    def take_place(self, session: Session, objects: Mapping[str, Any]) -> tuple[Session, int, int]:
        """Wait until this process is admitted, and load the state. Blocks.

        Args:
            session: This process, alone.
            objects: Objects that the script passed to `resume`.

        Returns:
            The session of all ranks, the number of finished calls of `ElasticRecovery.retry`, and the number of steps
            made.

        Raises:
            SystemExit: The process is no longer needed.
        """
        try:
            if not self._membership.join():
                raise SystemExit(0)
            groups = self._membership.create_groups()
            if all(gather_objects(groups.steps, True)):
                raise DistributedTrainerError("all ranks that had the training's state were killed")
            received = transfer.receive_state(groups.steps, 0)
            if (own := repr(session.options)) != (others := received.about["options"]):
                raise MismatchError(f"the surviving ranks have {others}, the process that replaces one has {own}")
            torch.set_num_threads(received.about["threads"])
            self._state.check(received, objects)
            self._state.load_state_dict(received, objects, groups.steps.rank(), groups.steps.size())
            session.progress.makes_script_calls = received.about["makes_script_calls"]
            local_rank, first_world_size = self._membership.job.local_rank, received.about["first_world_size"]
            session = session.rebuild(groups, local_rank, 0, first_world_size)
            self._position.read_ahead_again()
        except Exception:
            # End as if killed, so that the other ranks continue without this process.
            traceback.print_exc()
            sys.stderr.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return session, received.about["num_retries"], received.content["step"]
