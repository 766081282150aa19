# SPDX-License-Identifier: Apache-2.0
"""A trainer's place in a job: its process groups, made again when ranks are killed or join."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..backend import job as jobs
from ..errors import DistributedTrainerError


@dataclass(frozen=True)
class Groups:
    """Process groups of a trainer's ranks. In each one, all ranks call collectives in the same order."""

    gradients: Any
    """Group for gradients, in the order in which they become ready."""
    steps: Any
    """Group for calls within a step."""
    end: Any
    """Group for the meeting at the end."""


class Membership:
    """A trainer's place in a job that may lose ranks.

    Args:
        job: The job of the present ranks.
        wire_dtype: Type in which sums of float32 gradients travel between machines; None for float32.

    Attributes:
        job: The job of the present ranks.
    """

    def __init__(self, job: jobs.Job, wire_dtype: str | None) -> None:
        self.job = job
        self._wire_dtype = wire_dtype

    def create_groups(self) -> Groups:
        """Create the process groups of a trainer. Collective, blocks."""
        create = self.job.create_group
        return Groups(gradients=create(wire_dtype=self._wire_dtype), steps=create(), end=create())

    def counters(self) -> dict[str, int]:
        """Return the counts of this rank's engine, such as bytes sent. Local."""
        return self.job.engine.counters()

    def has_lost_rank(self, error: DistributedTrainerError) -> bool:
        """Return whether an error came from a rank's death. Local.

        It may wait up to a second until the death is reported.
        """
        return type(error) is DistributedTrainerError and self.job.engine.has_lost_rank(1.0)

    def recover(self) -> None:
        """Continue with the surviving ranks. Collective over them, blocks."""
        self.job = jobs.recover(self.job)

    def admit(self) -> None:
        """Continue with the ranks and a replacement that is ready. Collective over all, blocks."""
        self.job = jobs.admit(self.job)

    def join(self) -> bool:
        """Continue with the ranks, in a replacement; return False if it is no longer needed. Blocks."""
        job = jobs.join(self.job)
        self.job = job or self.job
        return job is not None
