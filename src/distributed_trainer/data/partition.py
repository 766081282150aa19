# SPDX-License-Identifier: Apache-2.0
"""A rank's local batch: its samples of the global batch, cut into microbatches, and each microbatch's weight.

A step with k microbatches cuts the batch into k consecutive pieces, and splits each piece over the ranks. So microbatch
m on N ranks holds the samples of microbatch m in one process, as BatchNorm's statistics require. Every rank has the
same number of microbatches. A rank without samples of a microbatch gets a *dummy*: with it the rank takes part in all
collectives, and the dummy counts for nothing. Nothing here communicates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .batch import map_tensors, tensors
from .loss_weight import Weighted, criterion_name, local_weight, split_criterion
from .samples import SampleRule
from .split import Split, part_bounds


class Given(NamedTuple):
    """Samples that a rank passes to a step: a batch that every rank has, or a part of its own."""

    inputs: Any
    targets: Any
    criterion: Callable[..., Any]
    rule: SampleRule
    """Rule by which they are cut."""

    @property
    def roots(self) -> dict[str, Any]:
        """Inputs and targets by name."""
        return {"inputs": self.inputs, "targets": self.targets}

    def part(self, num_samples: int, start: int, stop: int) -> Given:
        """Return samples start to stop of `num_samples`, with the criterion for them."""
        inputs, targets = self.rule.part(self.roots, num_samples, start, stop)
        criterion = split_criterion(self.criterion, self.targets, start, stop, self.rule.batch_dim)
        if self.rule.split is not None and criterion is not self.criterion and stop - start < num_samples:
            raise ValueError(
                f"{criterion_name(criterion)} has a weight for each target, which split= does not cut: pass the "
                f"weights with the targets, to a criterion of your own"
            )
        return Given(inputs, targets, criterion, self.rule)

    def dummy(self, num_samples: int = 1) -> Given:
        """Return the first samples, for a dummy: at most `num_samples`, or all if they cannot be cut."""
        inputs, targets, number = self.rule.dummy(self.inputs, self.targets, num_samples)
        criterion = self.criterion
        if number:
            criterion = split_criterion(criterion, self.targets, 0, number, self.rule.batch_dim)
        return Given(inputs, targets, criterion, self.rule)


@dataclass(frozen=True)
class Microbatch:
    """Samples with which a rank runs forward and backward once."""

    given: Given
    weight: float
    """Weight of this microbatch in the mean."""
    is_dummy: bool
    """Whether its samples count for nothing."""
    num_samples: int
    """Number of its samples that count: 0 for a dummy, 1 if it is not known."""

    @property
    def inputs(self) -> Any:
        """Inputs of the model."""
        return self.given.inputs

    @property
    def targets(self) -> Any:
        """Targets of the criterion."""
        return self.given.targets

    @property
    def criterion(self) -> Callable[..., Any]:
        """Loss of these samples."""
        return self.given.criterion

    def without_criterion(self) -> Microbatch:
        """Return the microbatch with the sum of the outputs as loss."""
        return replace(self, given=self.given._replace(criterion=_sum_of_outputs))


@dataclass(frozen=True)
class LocalBatch:
    """All microbatches of a rank in one step."""

    microbatches: list[Microbatch]
    total: float
    """Weight of the global batch."""
    source: int
    """First rank that has samples; its buffers are copied to all ranks."""
    longest: int
    """Number of samples of the longest microbatch on any rank."""
    num_samples: int
    """Number of this rank's samples; 1 if it has samples, but their number is not known."""
    global_samples: int
    """Sum of `num_samples` over all ranks."""


def cut_batch(whole: Given, num_samples: int, split: Split, num_microbatches: int) -> LocalBatch:
    """Return this rank's part of a batch that every rank has.

    Args:
        whole: The batch.
        num_samples: Number of samples in the batch, at least 1.
        split: Split of each microbatch over the ranks; the same on every rank except for its `rank`.
        num_microbatches: Number of microbatches; there are at most as many as samples.
    """
    microbatches, num_own = [], 0
    number = min(num_microbatches, num_samples)
    for index in range(number):
        first, last = part_bounds(num_samples, index, number)
        start, stop = split(last - first)
        microbatches.append(_microbatch(whole, num_samples, first + start, first + stop, dummy=first))
        num_own += stop - start
    longest = max(split.lengths(-(-num_samples // number)))
    total = local_weight(whole.criterion, whole.targets, num_samples)
    return LocalBatch(microbatches, total, 0, longest, num_own, num_samples)


def cut_part(part: Given, headers: Sequence[tuple[float, float]], rank: int, num_microbatches: int) -> LocalBatch:
    """Return the microbatches of this rank's part, where each rank passes its own part. One microbatch is not cut.

    Args:
        part: The part. If its number of samples is 0, its first sample serves as a dummy.
        headers: Number of samples and weight of each rank's part; at least one part has samples.
        rank: This rank's number.
        num_microbatches: Number of microbatches; there are at most as many as samples in the longest part.
    """
    num_samples, weight = int(headers[rank][0]), headers[rank][1]
    longest_part = int(max(samples for samples, _ in headers))
    number = min(num_microbatches, longest_part)
    if num_samples == 0:
        microbatches = [Microbatch(part.dummy(), 0.0, is_dummy=True, num_samples=0)] * number
    elif num_microbatches == 1:
        microbatches = [_counted(part, num_samples, weight)]
    else:
        bounds = [part_bounds(num_samples, index, number) for index in range(number)]
        microbatches = [_microbatch(part, num_samples, start, stop, dummy=0) for start, stop in bounds]
    source = next(rank for rank, (samples, _) in enumerate(headers) if samples)
    global_samples, total = (sum(column) for column in zip(*headers, strict=True))
    return LocalBatch(microbatches, total, source, -(-longest_part // number), num_samples, int(global_samples))


def cut_shards(
    given: Given, num_samples: int, shards: Sequence[tuple[int, int]], total: float, global_samples: int
) -> LocalBatch:
    """Return the shards of a batch that this rank computes (`gradients/deterministic.py`), a microbatch each.

    Args:
        given: The whole batch, or this rank's part.
        num_samples: Number of its samples.
        shards: First and one past the last sample of each of this rank's shards.
        total: Weight of the global batch.
        global_samples: Number of samples of the global batch.
    """
    cut = [_microbatch(given, num_samples, start, stop, dummy=start) for start, stop in shards if start < stop]
    # Copied to new memory, since the address of a factor may change how a product is rounded.
    copies = [map_tensors(torch.clone, (microbatch.inputs, microbatch.targets)) for microbatch in cut]
    microbatches = [
        replace(microbatch, given=microbatch.given._replace(inputs=x, targets=y))
        for microbatch, (x, y) in zip(cut, copies, strict=True)
    ]
    lengths = [stop - start for start, stop in shards]
    return LocalBatch(microbatches, total, 0, max(lengths), sum(lengths), global_samples)


def _sum_of_outputs(outputs: Any, _targets: Any) -> Tensor:
    sums = [output.sum() for output in tensors(outputs) if output.is_floating_point()]
    return torch.stack([one.double() for one in sums]).sum()


def dummies_of(microbatch: Microbatch) -> Iterator[Microbatch]:
    """Yield dummies from the first two samples of a microbatch, then from its last two: BatchNorm needs two values."""
    given, num_samples = microbatch.given, microbatch.num_samples
    yield replace(microbatch, given=given.dummy(2), is_dummy=True, num_samples=0)
    if num_samples > 2:
        last = given.part(num_samples, num_samples - 2, num_samples)
        yield replace(microbatch, given=last, is_dummy=True, num_samples=0)


def _microbatch(given: Given, num_samples: int, start: int, stop: int, dummy: int) -> Microbatch:
    """Return a microbatch of samples start to stop, or a dummy: a copy of sample `dummy`, if there are no samples."""
    if start == stop:
        return Microbatch(given.part(num_samples, dummy, dummy + 1), 0.0, is_dummy=True, num_samples=0)
    part = given.part(num_samples, start, stop)
    return _counted(part, stop - start, local_weight(part.criterion, part.targets, stop - start))


def _counted(part: Given, num_samples: int, weight: float) -> Microbatch:
    """Return a microbatch with this weight. It is a dummy if the user has passed the number 0 as weight.

    Samples to which a function gives weight 0 still count in the statistics of BatchNorm, and `local_loss` makes their
    loss an exact 0.
    """
    is_dummy = weight == 0 and isinstance(part.criterion, Weighted) and not callable(part.criterion.weight)
    return Microbatch(part, weight, is_dummy, 0 if is_dummy else num_samples)
