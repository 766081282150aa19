# SPDX-License-Identifier: Apache-2.0
"""A session: all that belongs to one set of ranks, such as this rank's replica, and the ranks' agreement in each step.

When ranks are killed, or a process is admitted, a new session replaces the present one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ..data.handshake import StepHandshake
from ..options import TrainerOptions
from ..replica.replica import Progress, Replica
from ..replica.reproducible import ReproducibleReplica
from .auto_microbatch import AutoMicrobatch
from .membership import Groups


@dataclass(frozen=True, kw_only=True)
class Session:
    """A trainer's objects among one set of ranks: process groups, replica, handshake."""

    model: nn.Module
    device: torch.device
    options: TrainerOptions
    progress: Progress
    groups: Groups
    rank: int
    """This process's number among the ranks. (Asking a group in each step would take microseconds.)"""
    world_size: int
    """Number of ranks."""
    local_rank: int
    """This process's number on its machine."""
    replica: Replica
    handshake: StepHandshake
    auto_microbatch: AutoMicrobatch
    first_world_size: int
    """Number of ranks at the start of the training."""
    num_pieces: int = 1
    """Number of pieces in which each microbatch is computed, so that none is longer than among the first ranks."""

    @classmethod
    def start(
        cls,
        model: nn.Module,
        device: torch.device,
        options: TrainerOptions,
        progress: Progress,
        groups: Groups,
        local_rank: int,
    ) -> Session:
        """Build the first session of a training: models and random states are aligned. Collective, blocks.

        Args:
            model: The user's model, on `device`.
            device: Where this rank computes.
            options: Options of the trainer, the same on every rank.
            progress: Counts of the training; they outlive the session.
            groups: Process groups of the ranks.
            local_rank: This rank's number on its machine.
        """
        kind = Replica if options.reproducible is None else ReproducibleReplica
        return cls(
            model=model,
            device=device,
            options=options,
            progress=progress,
            groups=groups,
            rank=groups.steps.rank(),
            world_size=groups.steps.size(),
            local_rank=local_rank,
            replica=kind(model, (groups.gradients, groups.steps), device, options, progress),
            handshake=StepHandshake(groups.steps, options),
            auto_microbatch=AutoMicrobatch(model, groups.steps, device),
            first_world_size=groups.steps.size(),
        )

    def rebuild(self, groups: Groups, local_rank: int, source: int, first_world_size: int | None = None) -> Session:
        """Build the session of other ranks, and close this session's replica. Collective over the other ranks, blocks.

        The ranks' models are equal already, except for buffers.

        Args:
            groups: Process groups of the new ranks.
            local_rank: This rank's number on its machine.
            source: Rank that has the buffers of the last step.
            first_world_size: Number of ranks at the start of the training; None for this session's number.
        """
        self.replica.close()
        pair = groups.gradients, groups.steps
        replica = type(self.replica)(self.model, pair, self.device, self.options, self.progress, aligns=False)
        replica.share_buffers(source)
        first_world_size = first_world_size or self.first_world_size
        # Forward may change buffers once per piece; with reproducible= a microbatch is a shard, and stays whole.
        is_cut = self.options.reproducible is None and not any(True for _ in self.model.buffers())
        is_cut = is_cut and not self.progress.makes_script_calls  # a call would see one piece at a time
        num_microbatches = self.auto_microbatch.num_microbatches
        return Session(
            model=self.model,
            device=self.device,
            options=self.options,
            progress=self.progress,
            groups=groups,
            rank=groups.steps.rank(),
            world_size=groups.steps.size(),
            local_rank=local_rank,
            replica=replica,
            handshake=StepHandshake(groups.steps, self.options),
            auto_microbatch=AutoMicrobatch(self.model, groups.steps, self.device, num_microbatches),
            first_world_size=first_world_size,
            num_pieces=-(-first_world_size // groups.steps.size()) if is_cut else 1,
        )
