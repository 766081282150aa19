# SPDX-License-Identifier: Apache-2.0
"""A rank's share of one step: what of the batch it computes, in which pieces, and what each counts in the mean.

A step of k microbatches cuts the batch into k pieces, one after the other, and each piece over the ranks. So piece m
on N ranks holds the samples of piece m on one process, as BatchNorm's statistics require. Every rank has as many pieces
as every other; where one has no samples of a piece it gets a *ghost*, a stand-in with which it takes part in all that
the ranks do together, and which counts for nothing. Nothing here communicates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from .criterion import Weighted, local_weight, split_criterion
from .data import Split, batch_size, map_tensors, part_bounds, slice_batch, zero_sample


@dataclass(frozen=True)
class Piece:
    """What a rank runs forward and backward with, once."""

    inputs: Any
    targets: Any
    criterion: Callable[..., Any]
    weight: float
    """Of this piece."""
    is_ghost: bool


@dataclass(frozen=True)
class Share:
    """All pieces of a rank in one step."""

    pieces: list[Piece]
    total: float
    """The weight of the global batch."""
    source: int
    """First rank that has samples: its buffers become everybody's."""
    longest: int
    """Number of samples of the longest piece on any rank."""
    num_samples: int
    """Of this rank."""


def share_of_batch(
    inputs: Any,
    targets: Any,
    criterion: Callable[..., Any],
    num_samples: int,
    split: Split,
    microbatches: int,
) -> Share:
    """The share in a batch that every rank has.

    Args:
        inputs: Of the whole batch.
        targets: Likewise.
        criterion: Likewise; what depends on the sample is cut with it.
        num_samples: Of the batch, at least 1.
        split: Over the ranks; the same on every rank but for its own number.
        microbatches: How many; no more than there are samples are made.
    """
    pieces, num_own = [], 0
    num_pieces = min(microbatches, num_samples)
    for number in range(num_pieces):
        first, last = part_bounds(num_samples, number, num_pieces)
        start, stop = split(last - first)
        pieces.append(_piece(inputs, targets, criterion, first + start, first + stop, stand_in=first))
        num_own += stop - start
    longest = max(split.lengths(-(-num_samples // num_pieces)))
    return Share(pieces, local_weight(criterion, targets, num_samples), 0, longest, num_own)


def share_of_part(
    inputs: Any,
    targets: Any,
    criterion: Callable[..., Any],
    headers: Sequence[tuple[float, float]],
    rank: int,
    microbatches: int,
) -> Share:
    """The share of a rank that brings samples of its own.

    Args:
        inputs: This rank's.
        targets: Likewise.
        criterion: Likewise.
        headers: Number of samples and weight of each rank's part; some rank's is not empty.
        rank: This one. If its number of samples is 0, its inputs stand in for a part.
        microbatches: How many; no more than the longest part has samples are made.
    """
    num_samples = int(headers[rank][0])
    longest_part = int(max(samples for samples, _ in headers))
    num_pieces = min(microbatches, longest_part)
    if not batch_size({"inputs": inputs, "targets": targets}):
        inputs, targets = zero_sample((inputs, targets))
    pieces = []
    for number in range(num_pieces):
        start, stop = part_bounds(num_samples, number, num_pieces)
        pieces.append(_piece(inputs, targets, criterion, start, stop, stand_in=0))
    source = next(rank for rank, (samples, _) in enumerate(headers) if samples)
    total = sum(weight for _, weight in headers)
    return Share(pieces, total, source, -(-longest_part // num_pieces), num_samples)


def share_of_shards(
    inputs: Any, targets: Any, criterion: Callable[..., Any], shards: Sequence[tuple[int, int]], total: float
) -> Share:
    """The share of a rank that computes whole shards of a batch (`reproducible.py`).

    Args:
        inputs: Of the whole batch, or of this rank's part.
        targets: Likewise.
        criterion: Likewise.
        shards: Where in it each of this rank's shards begins and ends.
        total: The weight of the global batch.
    """
    pieces = [_piece(inputs, targets, criterion, start, stop, stand_in=start) for start, stop in shards if start < stop]
    # In memory of their own, since products may be rounded by where their factors begin.
    copies = [map_tensors(torch.clone, (piece.inputs, piece.targets)) for piece in pieces]
    pieces = [replace(piece, inputs=x, targets=y) for piece, (x, y) in zip(pieces, copies, strict=True)]
    lengths = [stop - start for start, stop in shards]
    return Share(pieces, total, 0, max(lengths), sum(lengths))


def stand_in(piece: Piece) -> Piece:
    """The first samples of a piece: two, since BatchNorm wants two values."""
    targets = slice_batch(piece.targets, 0, 2)
    criterion = split_criterion(piece.criterion, piece.targets, 0, 2)
    return replace(piece, inputs=slice_batch(piece.inputs, 0, 2), targets=targets, criterion=criterion, is_ghost=True)


def _piece(inputs: Any, targets: Any, criterion: Callable[..., Any], start: int, stop: int, stand_in: int) -> Piece:
    """Samples start to stop, or a ghost that holds sample `stand_in` where there are none or they have no weight."""
    is_ghost = start == stop
    if is_ghost:
        start, stop = stand_in, stand_in + 1
    piece = slice_batch((inputs, targets), start, stop)
    criterion = split_criterion(criterion, targets, start, stop)
    weight = 0.0 if is_ghost else local_weight(criterion, piece[1], stop - start)
    # Of a loss of torch's, a piece without weight is an exact 0; of any other it may be a mean over nothing.
    return Piece(*piece, criterion, weight, is_ghost or (weight == 0 and isinstance(criterion, Weighted)))
