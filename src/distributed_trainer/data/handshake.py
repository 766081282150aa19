# SPDX-License-Identifier: Apache-2.0
"""Exchange at the start of a step: ranks compare their batches, or send their numbers of samples, and send flags."""

from __future__ import annotations

import enum
import functools
import itertools
import operator
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from ..backend.gather import gather_bytes, gather_objects, raise_alike
from ..errors import MismatchError
from ..options import TrainerOptions
from .balance import Balance
from .fingerprint import FINGERPRINT_BYTES, compare_fingerprints, fingerprint
from .loss_weight import Weighted, local_weight
from .model_loss import with_plain_number
from .partition import Given, LocalBatch, cut_batch, cut_part, cut_shards
from .samples import SampleRule
from .split import own_shards, part_bounds, shard_part

_Result = TypeVar("_Result")

_PART_HEADER = struct.Struct("<dd12sB")  # sent where ranks have parts: number of samples, weight, place, flags

_COUNT_HEADER = struct.Struct("<q12sB")  # sent where ranks have shards: number of samples, place, flags


class StepFlags(enum.IntFlag):
    """Flags that ranks send each other: in each step the first eight, in one byte."""

    ASKS_FOR_SAVE = 1
    SAVE_HAS_FAILED = 2
    HAS_LEFT = 4
    """The rank has ended, with or without an error, and takes part in no further step."""
    REPLACEMENT_WAITS = 8
    """A replacement process waits to be admitted."""
    REFUSES = 16
    """The rank has, or may have, a reason why no rank may begin the step. Then all ranks raise the same error."""
    MODEL_HAS_CHANGED = 32
    """Modules or parameters of the model were added, removed, replaced, moved, frozen or unfrozen."""
    GRADIENTS_ARE_HELD = 64
    """Something still refers to gradients of the last step, in memory that this step would write."""
    IS_IN_FORWARD = 128
    """The rank is in `forward` of a manual loop, and its model has changed."""
    ENDS_TRAINING = 256
    """The rank has called `close`, and compares its weights with the others' at the end. Not sent in a step."""
    ABOUT_SAVES = ASKS_FOR_SAVE | SAVE_HAS_FAILED | HAS_LEFT


class StepHandshake:
    """Agree with the other ranks on each batch, and return this rank's part.

    Attributes:
        balance: Split of whole batches over the ranks.
        rule: Rule by which batches are counted and cut.

    Args:
        group: Process group of the ranks.
        options: Options of the trainer, the same on every rank.
    """

    def __init__(self, group: Any, options: TrainerOptions) -> None:
        self._group, self._rank, self._size = group, group.rank(), group.size()
        self._num_shards = options.reproducible
        self.balance = Balance(group, is_on=options.balance_speed)
        self.rule = SampleRule(options.batch_dim, options.split)

    def local_batch(
        self,
        inputs: Any,
        targets: Any,
        criterion: Callable[..., Any],
        counts: Callable[[], bool],
        num_microbatches: int,
        is_whole: bool,
        place: int,
        flags: int,
        refusal: Exception | None = None,
    ) -> tuple[LocalBatch, int]:
        """Return this rank's microbatches of the next batch. Collective, blocks, unless there is one rank.

        Args:
            inputs: Inputs of the global batch, or of this rank's part.
            targets: Targets of the same samples.
            criterion: Loss of the same samples.
            counts: Function that returns whether these samples count, if they are a part. If not, they serve as a
                dummy. It is local, and may raise an error.
            num_microbatches: Number of microbatches to make.
            is_whole: Every rank passes the same batch. False: each rank passes its own samples.
            place: `DataPosition.place_of` of a part.
            flags: This rank's `StepFlags`.
            refusal: Another reason why no rank may begin the step; None if this rank has none.

        Returns:
            This rank's microbatches, and the union of all ranks' flags.

        Raises:
            TypeError, ValueError: A rank's batch cannot be counted or cut, there are no samples, or all have weight 0.
                The same on every rank.
            Exception: A rank has passed a `refusal`. The same on every rank.
            MismatchError: The ranks' batches differ. The same on every rank.
        """
        given = Given(with_plain_number(inputs), targets, criterion, self.rule)
        if is_whole:
            batch, flags = self._of_whole(given, num_microbatches, flags, refusal)
        elif self._num_shards is not None:
            batch, flags = self._shards_of_part(given, counts, place, flags, refusal)
        else:
            batch, flags = self._of_part(given, counts, num_microbatches, place, flags, refusal)
        if batch.total == 0 and isinstance(criterion, Weighted):
            raise ValueError(
                "weight= is 0 for all samples of the batch, so its mean is not defined; skip the batch on every rank"
            )
        return batch, flags

    def part_of(self, inputs: Any, targets: Any, refusal: Exception | None = None) -> tuple[Any, Any, int]:
        """Return this rank's part of a batch that every rank has, and its number of samples. Collective, blocks.

        Without samples the part is the batch. With a `refusal` every rank raises it.

        Raises:
            TypeError, ValueError: The batch cannot be counted or cut. The same on every rank.
            MismatchError: The ranks' batches differ. The same on every rank.
        """
        inputs = with_plain_number(inputs)
        roots = {"inputs": inputs, "targets": targets}

        def cut() -> tuple[Any, Any, int]:
            num_samples = self.rule.count(roots)
            start, stop = self.balance.split(num_samples)
            if start == stop:
                return inputs, targets, 0
            own_inputs, own_targets = self.rule.part(roots, num_samples, start, stop)
            return own_inputs, own_targets, stop - start

        part, error = _attempt(cut, refusal)
        self._compare(roots, 0, error, is_step=False)
        return part

    def _of_whole(
        self, given: Given, num_microbatches: int, flags: int, refusal: Exception | None
    ) -> tuple[LocalBatch, int]:
        """Return this rank's part of a batch that every rank has, and all ranks' flags. Collective, blocks."""

        def cut() -> LocalBatch:
            num_samples = given.rule.count(given.roots)
            if num_samples == 0:
                raise ValueError("the batch has no samples; skip it on every rank")
            if self._num_shards is None:
                return cut_batch(given, num_samples, self.balance.split, num_microbatches)
            shards = own_shards(self._num_shards, self._rank, self._size)
            bounds = [part_bounds(num_samples, shard, self._num_shards) for shard in shards]
            total = local_weight(given.criterion, given.targets, num_samples)
            return cut_shards(given, num_samples, bounds, total, num_samples)

        batch, error = _attempt(cut, refusal)
        return batch, self._compare(given.roots, flags, error)

    def _of_part(
        self,
        given: Given,
        counts: Callable[[], bool],
        num_microbatches: int,
        place: int,
        flags: int,
        refusal: Exception | None,
    ) -> tuple[LocalBatch, int]:
        """Return the microbatches of this rank's own part, and all ranks' flags. Collective, blocks."""

        def measure() -> tuple[int, float]:
            if not counts():
                return 0, 0.0
            if num_microbatches > 1:
                num_samples: int | None = given.rule.count(given.roots)
            else:
                num_samples = given.rule.count_uncut(given.inputs, given.targets)
            weight = local_weight(given.criterion, given.targets, num_samples) if num_samples != 0 else 0.0
            return 1 if num_samples is None else num_samples, weight

        measured, error = _attempt(measure, refusal)
        header = _PART_HEADER.pack(*(measured or (0, 0.0)), place.to_bytes(12, "little"), _flags(flags, error))
        rows = gather_bytes(self._group, header)
        unpacked = [_PART_HEADER.unpack(row) for row in rows]
        headers, places = [row[:2] for row in unpacked], [row[2] for row in unpacked]
        flags = self._union(rows, error)
        _check_places(places)
        if not any(samples for samples, _ in headers):
            raise ValueError("no rank has a sample for this step; end the loop on every rank, as trainer.batches does")
        if num_microbatches == 1:  # nothing is cut
            return cut_part(given, headers, self._rank, num_microbatches), flags
        batch, error = _attempt(lambda: cut_part(given, headers, self._rank, num_microbatches))
        self._union(gather_bytes(self._group, bytes([_flags(0, error)])), error)
        return batch, flags

    def _shards_of_part(
        self, given: Given, counts: Callable[[], bool], place: int, flags: int, refusal: Exception | None
    ) -> tuple[LocalBatch, int]:
        """Return the shards of this rank's own part, and all ranks' flags. Collective, blocks."""
        num_shards = self._num_shards
        assert num_shards is not None
        own, error = _attempt(lambda: given.rule.count(given.roots) if counts() else 0, refusal)
        rows = gather_bytes(
            self._group, _COUNT_HEADER.pack(own or 0, place.to_bytes(12, "little"), _flags(flags, error))
        )
        flags = self._union(rows, error)
        counted = [_COUNT_HEADER.unpack(row)[0] for row in rows]
        _check_places([_COUNT_HEADER.unpack(row)[1] for row in rows])
        for rank, count in enumerate(counted):
            start, stop = shard_part(sum(counted), num_shards, rank, self._size)
            if count != stop - start:
                raise ValueError(
                    f"rank {rank} has {count} of the {sum(counted)} samples, but its shards hold {stop - start}: with "
                    f"reproducible= pass what trainer.loader gives, and drop no samples in collate_fn"
                )
        first, _ = shard_part(sum(counted), num_shards, self._rank, self._size)
        shards = own_shards(num_shards, self._rank, self._size)
        bounds = [part_bounds(sum(counted), shard, num_shards) for shard in shards]
        bounds = [(start - first, stop - first) for start, stop in bounds]
        batch, error = _attempt(lambda: cut_shards(given, own or 0, bounds, 0.0, sum(counted)))
        self._raise_together(error)
        weights = gather_objects(self._group, [microbatch.weight for microbatch in batch.microbatches])
        return replace(batch, total=sum(itertools.chain.from_iterable(weights))), flags

    def has_batch(self, has_batch: bool, has_any: bool, error: Exception | None = None) -> bool:
        """Return whether any rank has a batch. Collective, blocks.

        Args:
            has_batch: Whether this rank has a batch now.
            has_any: Whether this rank has, or has had, any batch of the loop.
            error: Why this rank's batch cannot be read; None if it can.

        Raises:
            Exception: A rank has passed an `error`. The same on every rank.
            ValueError: Some rank has had no batch at all while another rank has one. The same on every rank.
        """
        rows = gather_bytes(self._group, bytes([has_batch, has_any, error is not None]))
        if any(row[2] for row in rows):
            self._raise_together(error)
        if any(row[0] for row in rows):
            for rank, row in enumerate(rows):
                if not row[1]:
                    raise ValueError(
                        f"the loader of rank {rank} is empty, so the rank has no batch from which to make a dummy. "
                        f"Give every rank at least one batch."
                    )
        return any(row[0] for row in rows)

    def compare(self, batches: Sequence[tuple[bytes, Mapping[str, Any]]]) -> None:
        """Compare batches that every rank should have, as many on each rank. Collective, blocks.

        Args:
            batches: For each of this rank's batches its fingerprint, and its trees by name.

        Raises:
            MismatchError: The ranks' batches differ. The same on every rank.
        """
        rows = gather_bytes(self._group, b"".join(own for own, _ in batches))
        for number, (_, roots) in enumerate(batches):
            start = number * FINGERPRINT_BYTES
            of_ranks = [row[start : start + FINGERPRINT_BYTES] for row in rows]
            difference = compare_fingerprints(of_ranks, roots, read_devices=True)
            if difference is not None:
                raise MismatchError(difference)

    def _compare(self, roots: dict[str, Any], flags: int, error: Exception | None, is_step: bool = True) -> int:
        """Compare the ranks' batches; return the union of all ranks' flags. Collective, blocks.

        Args:
            roots: This rank's batch.
            flags: This rank's `StepFlags`.
            error: Why this rank cannot use its batch, or None.
            is_step: Whether this is a step's batch. If not, the message has another length, so that a rank in
                `evaluate` does not continue with one in `train_step`.
        """
        if self._size == 1:
            self._raise_together(error)
            return flags
        # Reading tensors on a device waits for it, but the last step has already waited for its loss.
        own = bytes(FINGERPRINT_BYTES) if error is not None else fingerprint(roots, read_devices=True)
        rows = gather_bytes(self._group, own + bytes(not is_step) + bytes([_flags(flags, error)]))
        flags = self._union(rows, error)
        difference = compare_fingerprints([row[:FINGERPRINT_BYTES] for row in rows], roots, read_devices=True)
        if difference is not None:
            raise MismatchError(difference)
        return flags

    def _union(self, rows: list[bytes], error: Exception | None) -> int:
        """Return the union of all ranks' flags, the last byte of each row; raise if a rank refuses its batch."""
        flags = functools.reduce(operator.or_, (row[-1] for row in rows))
        if flags & StepFlags.REFUSES:
            self._raise_together(error)
        return flags

    def _raise_together(self, error: Exception | None) -> None:
        """Raise the error of the lowest rank that has one, on every rank. Collective, blocks, unless it is alone."""
        if self._size > 1:
            raise_alike(self._group, error)
        if error is not None:
            raise error


def _attempt(
    call: Callable[[], _Result], refusal: Exception | None = None
) -> tuple[_Result, None] | tuple[Any, Exception]:
    """Return the result of a call and None, or None and the error that it raised; no call if there is a `refusal`."""
    if refusal is not None:
        return None, refusal
    try:
        return call(), None
    except Exception as error:
        return None, error


def _check_places(rows: Sequence[bytes]) -> None:
    """Raise MismatchError if the ranks have parts of different batches of `trainer.loader`. Local.

    Args:
        rows: `DataPosition.place_of` of each rank, in 12 bytes.
    """
    places = {rank: place for rank, row in enumerate(rows) if (place := int.from_bytes(row, "little"))}
    if len(set(places.values())) == 1 or not places:
        return
    numbers = {rank: (place >> 32 & 0xFFFFFFFF, place & 0xFFFFFFFF) for rank, place in places.items()}
    if len(set(numbers.values())) > 1:
        listed = ", ".join(
            f"rank {rank} has batch {number} of epoch {epoch}" for rank, (epoch, number) in numbers.items()
        )
        raise MismatchError(
            f"the ranks' parts are of different batches of trainer.loader: {listed}. A rank has skipped one that "
            f"others have not, such as by `continue` after a look at its own part. Skip a batch on all ranks or on "
            f"none; drop samples in the dataset or in collate_fn."
        )
    (first, place), *others = places.items()
    rank = next(rank for rank, other in others if other != place)
    epoch, number = numbers[first]
    raise different_samples(f"batch {number} of epoch {epoch}", first, rank)


def different_samples(batch: str, rank: int, other: int) -> MismatchError:
    """Return the error that a batch of `trainer.loader` has different samples on two ranks. Local."""
    return MismatchError(
        f"the samples of {batch} of trainer.loader on rank {rank} are not those on rank {other}: the ranks' samplers "
        f"draw different indices, or their datasets differ in length. A sampler may draw from random, NumPy and torch, "
        f"from a generator that it holds in an attribute, and by the epoch given to its set_epoch; not from other "
        f"sources, nor from the order of a set, which differ between processes."
    )


def _flags(flags: int, error: Exception | None) -> int:
    return flags if error is None else flags | StepFlags.REFUSES
