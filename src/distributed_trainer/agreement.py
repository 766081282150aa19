# SPDX-License-Identifier: Apache-2.0
"""What ranks tell each other of their batches: that they are the same, or how many samples each has."""

from __future__ import annotations

import functools
import itertools
import operator
import struct
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from .backend import gather_bytes, gather_objects
from .balance import Balance
from .criterion import Weighted, local_weight
from .data import compare_fingerprints, fingerprint, part_bounds
from .errors import MismatchError
from .options import TrainerOptions
from .reproducible import own_shards, shard_part
from .share import Share, share_of_batch, share_of_part, share_of_shards

_PART_HEADER = struct.Struct("<ddB")  # of ranks with parts: number of samples, weight, flags

_COUNT_HEADER = struct.Struct("<qB")  # of those with shards: number of samples, flags


class Agreement:
    """Agrees with the other ranks on each batch, and gives this rank its share.

    Attributes:
        takes_whole_batches: Every rank passes the same batch; else each its own samples.
        balance: How whole batches are split over the ranks.
        is_out_of_data: What this rank passes stands in for samples that it has not, and counts for nothing.
        flags: What any rank has carried in the last step.

    Args:
        group: The ranks.
        options: The same on every rank.
        own_flags: Gives a byte for the other ranks, which goes with what they are told in each step.
    """

    def __init__(self, group: Any, options: TrainerOptions, own_flags: Callable[[], int] = int) -> None:
        self._own_flags = own_flags
        self.flags = 0
        self._group, self._rank, self._size = group, group.rank(), group.size()
        self._num_shards = options.reproducible
        self.takes_whole_batches = options.split_batches
        self.is_out_of_data = False
        self.balance = Balance(group, is_on=options.balance == "speed")

    def share(
        self, inputs: Any, targets: Any, criterion: Callable[..., Any], num_samples: int, microbatches: int
    ) -> Share:
        """Cuts the batch, or weighs this rank's own part. Collective unless there is one rank."""
        if self.takes_whole_batches and num_samples == 0:
            raise ValueError("the batch has no samples; skip it on every rank")
        if self._num_shards is not None:
            share = self._reproducible_share(inputs, targets, criterion, num_samples)
        elif self.takes_whole_batches:
            share = share_of_batch(inputs, targets, criterion, num_samples, self.balance.split, microbatches)
            self._check_step({"inputs": inputs, "targets": targets})
        else:
            if self.is_out_of_data:
                num_samples = 0
            weight = local_weight(criterion, targets, num_samples) if num_samples else 0.0
            rows = gather_bytes(self._group, _PART_HEADER.pack(num_samples, weight, self._own_flags()))
            headers = [_PART_HEADER.unpack(row)[:2] for row in rows]
            self._take_flags(rows)
            if not any(samples for samples, _ in headers):
                raise ValueError(
                    "no rank has a sample for this step; end the loop on every rank, as trainer.batches does"
                )
            share = share_of_part(inputs, targets, criterion, headers, self._rank, microbatches)
        if share.total == 0 and isinstance(criterion, Weighted):
            raise ValueError("weight= is 0 for all of the batch, so its mean is over nothing; skip it on every rank")
        return share

    def check_same(self, roots: dict[str, Any]) -> None:
        """Raises MismatchError, the same on every rank, if the ranks' batches differ. Collective."""
        self._compare(roots, b"")

    def _check_step(self, roots: dict[str, Any]) -> None:
        self._take_flags(self._compare(roots, bytes([self._own_flags()])))

    def _compare(self, roots: dict[str, Any], flags: bytes) -> list[bytes]:
        """Compares the ranks' batches; the flags of each rank go with that."""
        if self._size == 1:
            return [flags]
        # Reading a device waits for it, but the last step has already done so for its loss.
        own = fingerprint(roots, read_devices=True)
        rows = gather_bytes(self._group, own + flags)
        difference = compare_fingerprints([row[: len(own)] for row in rows], roots, read_devices=True)
        if difference is not None:
            raise MismatchError(difference)
        return rows

    def _take_flags(self, rows: list[bytes]) -> None:
        self.flags = functools.reduce(operator.or_, (row[-1] for row in rows))

    def has_batch(self, has_batch: bool, has_any: bool) -> bool:
        """Whether any rank has a batch; ValueError where one has had none at all. Collective."""
        rows = gather_bytes(self._group, bytes([has_batch, has_any]))
        if any(row[0] for row in rows):
            for rank, row in enumerate(rows):
                if not row[1]:
                    raise ValueError(
                        f"the loader of rank {rank} is empty, so it has nothing to take part with. Give every rank at "
                        f"least one batch."
                    )
        return any(row[0] for row in rows)

    def _reproducible_share(self, inputs: Any, targets: Any, criterion: Callable[..., Any], num_samples: int) -> Share:
        """The shards of a batch that this rank computes. Collective unless there is one rank."""
        num_shards = self._num_shards
        shards = own_shards(num_shards, self._rank, self._size)
        if self.takes_whole_batches:
            bounds = [part_bounds(num_samples, shard, num_shards) for shard in shards]
            share = share_of_shards(inputs, targets, criterion, bounds, local_weight(criterion, targets, num_samples))
            self._check_step({"inputs": inputs, "targets": targets})
            return share
        rows = gather_bytes(self._group, _COUNT_HEADER.pack(num_samples, self._own_flags()))
        counts = [_COUNT_HEADER.unpack(row)[0] for row in rows]
        self._take_flags(rows)
        for rank, count in enumerate(counts):
            start, stop = shard_part(sum(counts), num_shards, rank, self._size)
            if count != stop - start:
                raise ValueError(
                    f"rank {rank} has {count} of the {sum(counts)} samples, but its shards hold {stop - start}: with "
                    f"reproducible= pass what trainer.loader gives"
                )
        first, _ = shard_part(sum(counts), num_shards, self._rank, self._size)
        bounds = [part_bounds(sum(counts), shard, num_shards) for shard in shards]
        share = share_of_shards(inputs, targets, criterion, [(a - first, b - first) for a, b in bounds], 0.0)
        weights = gather_objects(self._group, [piece.weight for piece in share.pieces])
        return replace(share, total=sum(itertools.chain.from_iterable(weights)))
