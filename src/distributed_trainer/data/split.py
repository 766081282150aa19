# SPDX-License-Identifier: Apache-2.0
"""Cut a batch into the ranks' parts, and into shards. Nothing here communicates.

A *shard* is a piece of a batch that is the same for any number of ranks (`reproducible=`). A rank computes one or more.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass


def part_bounds(num_samples: int, rank: int, world_size: int) -> tuple[int, int]:
    """Return the rank's first sample, and one past its last. Parts are contiguous and differ by at most one sample.

    The first ranks get the longer parts, so with fewer samples than ranks the last ranks have no samples.
    """
    share, num_longer = divmod(num_samples, world_size)
    start = rank * share + min(rank, num_longer)
    return start, start + share + (rank < num_longer)


@dataclass(frozen=True)
class Split:
    """Split of a batch into contiguous parts, in the order of the ranks. Calling it returns this rank's part."""

    rank: int
    """This rank's number."""
    num_ranks: int
    """Number of ranks."""
    shares: tuple[float, ...] | None = None
    """Share of each rank, with sum 1; None for parts that differ by at most one sample."""

    def __call__(self, num_samples: int) -> tuple[int, int]:
        """Return this rank's first sample, and one past its last."""
        if self.shares is None:
            return part_bounds(num_samples, self.rank, self.num_ranks)
        lengths = self.lengths(num_samples)
        start = sum(lengths[: self.rank])
        return start, start + lengths[self.rank]

    def lengths(self, num_samples: int) -> list[int]:
        """Return the number of samples of each rank: at least one, if there are enough samples."""
        if self.shares is None:
            bounds = [part_bounds(num_samples, rank, self.num_ranks) for rank in range(self.num_ranks)]
            return [stop - start for start, stop in bounds]
        edges = [0, *(round(num_samples * total) for total in itertools.accumulate(self.shares[:-1])), num_samples]
        lengths = [stop - start for start, stop in itertools.pairwise(edges)]
        for rank in range(self.num_ranks):
            if lengths[rank] == 0 and max(lengths) > 1:
                lengths[lengths.index(max(lengths))] -= 1
                lengths[rank] = 1
        return lengths


def own_shards(num_shards: int, rank: int, world_size: int) -> range:
    """Return the shards that a rank computes: consecutive shards, whose number differs by at most one between ranks."""
    return range(*part_bounds(num_shards, rank, world_size))


def shard_part(num_samples: int, num_shards: int, rank: int, world_size: int) -> tuple[int, int]:
    """Return the first sample of a rank's shards, and one past their last sample."""
    shards = own_shards(num_shards, rank, world_size)
    if not shards:
        return 0, 0
    return part_bounds(num_samples, shards[0], num_shards)[0], part_bounds(num_samples, shards[-1], num_shards)[1]
