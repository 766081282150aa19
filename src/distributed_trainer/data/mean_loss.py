# SPDX-License-Identifier: Apache-2.0
"""Losses whose denominators are known only after forward: those of `MeanLoss`, and those that a model computes.

The mean over a batch is the sum of the parts' totals over the sum of their counts. So the ranks exchange their counts
between forward and backward of each microbatch, and each rank divides by the sum before its backward. A rank whose
forward has raised says so in place of it (`replica/script_calls.py`), since it cannot know what the criterion would
have returned. So ranks make the exchange for every criterion whose mean is not known from the targets.

With several microbatches the sum of the counts is known only before the last backward. Earlier microbatches divide by
an estimate, and what they have added up on this rank is multiplied by `LossCounts.correction` before the last backward.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..errors import MismatchError

_CALL = "the exchange of the loss's counts"


class Kind(enum.IntEnum):
    """Definition of a summand's mean over the batch."""

    PLAIN = 0
    """Mean with the weight of the part: its samples, or what `weight=` gives."""
    MEAN = 1
    """`MeanLoss`."""
    MODEL = 2
    """Mean of torch that the model has computed (`model_loss.py`)."""
    SUM = 3
    """Sum of torch that the model has divided by a number from the batch, `num_items_in_batch`."""


@dataclass(frozen=True)
class Summand:
    """Summand of a term of the loss, on this rank's part."""

    kind: int
    term: int
    """Number of the term."""
    value: Tensor | None
    """Mean over the part. For MEAN it is the total; so it is for MODEL with a `count` of 0. None for other ranks'."""
    count: float
    """Number of what the mean is over, on this part."""
    factor: float = 1.0
    """Coefficient of the value in the term, for MODEL; for SUM the number by which the model has divided."""

    @property
    def multiplier(self) -> float:
        """Factor by which the value becomes this part's total of the mean. Local."""
        if self.kind == Kind.MODEL:
            return self.factor * (self.count or 1.0)
        return self.count if self.kind == Kind.PLAIN else 1.0

    def over(self, count: float) -> Tensor:
        """Return this part's share of the mean over a batch with this count; NaN for the mean over nothing. Local."""
        assert self.value is not None
        if self.kind == Kind.SUM:
            return self.value
        if self.kind == Kind.MEAN:
            # The total of a part without items may be NaN, as a mean over nothing times 0 is.
            return self.value / count if self.count or not count else torch.zeros_like(self.value.detach())
        return self.value * (self.multiplier / count if count else math.nan)


class _Row(NamedTuple):
    """Message of a rank that has samples."""

    rank: int
    num_terms: int
    summands: list[Summand]

    @property
    def layout(self) -> tuple[Any, ...]:
        return self.num_terms, *((summand.kind, summand.term) for summand in self.summands)


def _as_kind(summand: Summand, kind: int) -> Summand:
    """Return a summand of this kind: a SUM may have turned out to be the mean over the rank's part. Local."""
    return summand if summand.kind == kind else replace(summand, kind=kind, factor=1.0)


class Calls(Protocol):
    """The part of `ScriptCalls` that is used here."""

    @property
    def num_ranks(self) -> int:
        """Number of ranks."""

    def exchange(self, call: str, value: Any) -> list[tuple[Any, bool]]:
        """Return each rank's value, and whether its samples count. Collective, blocks."""


class LossCounts:
    """Counts of a step's means, over all ranks and microbatches.

    Args:
        calls: Calls between the ranks in forward.
        num_microbatches: Number of microbatches, the same on every rank.

    Attributes:
        is_exchanged: Whether the ranks have exchanged the counts of the present microbatch.
        sees_parts: Whether a loss is that of a part of the batch.
        correction: Factor for the gradients and losses of all microbatches but the last; known before its backward.
        has_plain: Whether a term of the last microbatch was weighted by the weight of its part.
        has_model: Whether a term of the last microbatch has a mean that the model has computed.
    """

    def __init__(self, calls: Calls, num_microbatches: int) -> None:
        self._calls, self._num_microbatches = calls, num_microbatches
        self.sees_parts = calls.num_ranks > 1 or num_microbatches > 1
        self._number = 0
        self.is_exchanged = False
        self._kinds: list[int] | None = None  # in the first microbatch with a loss
        self._sums: list[float] = []  # over all ranks and the microbatches so far
        self._estimates: list[float] = []
        self.correction = 1.0
        self.has_plain, self.has_model = True, False

    def begin(self) -> None:
        """Begin a microbatch. Local."""
        self.is_exchanged = False
        self._number += 1

    def scale(
        self, terms: list[Tensor], summands: list[Summand], is_dummy: bool, weight: float, total: float
    ) -> list[Tensor]:
        """Return this part's share of each term of the global loss. Collective, blocks; local once it was exchanged.

        Args:
            terms: Terms of the loss of this part, as the criterion returns them.
            summands: Summands of these terms.
            is_dummy: Whether this rank's samples count for nothing.
            weight: Weight of this part.
            total: Weight of the batch.

        Raises:
            Exception: A rank has failed. The same on every rank.
            MismatchError: Ranks return `MeanLoss` in different terms. The same on every rank.
            ValueError: `num_items_in_batch` is not that of the batch, or several means of a step in microbatches do not
                have counts in proportion. The same on every rank.
        """
        by_weight = terms if is_dummy or weight == total else [term * (weight / total) for term in terms]
        if self.is_exchanged:
            return by_weight  # the loss of a dummy after a failure, which is not used
        rows = self._gather(summands, len(terms))
        if not rows:
            return by_weight
        kinds = self._agree(rows)
        if self._kinds is None:
            self._kinds = kinds
        elif self._kinds != kinds:
            raise ValueError(
                "the model computes its loss in other ways in some microbatches than in others, so the counts of its "
                "means are not known. Return MeanLoss(total, count), pass weight=, or use microbatches=1."
            )
        self.has_plain = Kind.PLAIN in kinds
        self.has_model = Kind.MODEL in kinds or Kind.SUM in kinds
        if set(kinds) == {Kind.PLAIN}:
            return by_weight
        counts = self._add(rows, kinds)
        if is_dummy:
            return by_weight
        scaled: dict[int, Tensor] = {}
        for kind, summand, count in zip(kinds, summands, counts, strict=True):
            share = _as_kind(summand, kind).over(count)
            scaled[summand.term] = scaled[summand.term] + share if summand.term in scaled else share
        return list(scaled.values())

    def check_weight(self, summands: list[Summand], weight: float) -> None:
        """Compare `weight=` with the counts of the means that the model has computed. Collective, blocks.

        Args:
            summands: Summands of the loss; none for a dummy.
            weight: Weight of this part.

        Raises:
            Exception: A rank has failed. The same on every rank.
            ValueError: The parts' weights are not in proportion to the counts. The same on every rank.
        """
        if self.is_exchanged:
            return
        counted = [one for one in summands if one.kind == Kind.MODEL]
        rows = self._gather([Summand(Kind.PLAIN, 0, None, weight), *counted], 1)
        known = [(row.rank, row.summands) for row in rows]
        if len({len(of) for _, of in known}) > 1:
            return
        columns = list(zip(*([one.count for one in of] for _, of in known), strict=True))
        for (rank, _), (own, *counts) in zip(known, zip(*columns, strict=True), strict=True):
            whole, *totals = map(sum, columns)
            for count, total in zip(counts, totals, strict=True):
                if not math.isclose(count * whole, own * total, rel_tol=1e-6):
                    raise ValueError(
                        f"weight= gives {own:g} of {whole:g} for the part of rank {rank}, but there the loss that the "
                        f"model computes is a mean over {count:g} of {total:g} targets. Leave weight= out: the "
                        f"trainer counts these targets. (A language model shifts its labels by one: they are "
                        f"lambda labels: (labels[:, 1:] != -100).sum().)"
                    )

    def _gather(self, summands: list[Summand], num_terms: int) -> list[_Row]:
        """Exchange the counts of the ranks' means; return those of ranks with samples. Collective, blocks."""
        self.is_exchanged = True
        own = num_terms, [(int(one.kind), one.term, one.count, one.factor) for one in summands]
        return [
            _Row(rank, of_terms, [Summand(kind, term, None, *numbers) for kind, term, *numbers in of])
            for rank, ((of_terms, of), counts) in enumerate(self._calls.exchange(_CALL, own))
            if counts
        ]

    def _agree(self, rows: list[_Row]) -> list[int]:
        """Return the kind of each summand, the same on every rank. Local.

        Means that the model has computed in different ways on different ranks count by the weight of the part.
        """
        plain: list[int] = [Kind.PLAIN]
        first = rows[0]
        if any(row.layout != first.layout for row in rows):
            places = [{one.term for one in row.summands if one.kind == Kind.MEAN} for row in rows]
            if any(places):
                texts = {f"in {len(of)} of {row.num_terms} term(s)": of for row, of in zip(rows, places, strict=True)}
                raise MismatchError(
                    f"the criterion returns MeanLoss {' and '.join(sorted(texts))}, on different ranks. Return it in "
                    f"the same terms on every rank; for a part without targets MeanLoss(0 * outputs.sum(), 0)."
                )
            return plain  # such as a constant, on a rank that has no labels
        kinds = [summand.kind for summand in first.summands]
        for index, kind in enumerate(kinds):
            column = [row.summands[index] for row in rows]
            same = all(math.isclose(one.factor, column[0].factor, rel_tol=1e-4) for one in column)
            counted = [one for one in column if one.count]
            if kind == Kind.MODEL and not same:
                return plain
            if kind == Kind.SUM and (len(counted) > 1 or not same):
                if all(one.count == one.factor for one in counted):
                    kinds[index] = Kind.MODEL  # each rank has the number of its own part
                elif not same:
                    numbers = " and ".join(sorted({f"{one.factor:g}" for one in column}))
                    raise ValueError(
                        f"num_items_in_batch is {numbers} on different ranks: pass the number of the whole batch, the "
                        f"same on every rank, or leave it out"
                    )
        return kinds

    def _add(self, rows: list[_Row], kinds: list[int]) -> list[float]:
        """Add the counts of a microbatch; return by which count each of its summands is to be divided. Local."""
        columns = zip(*([one.count for one in row.summands] for row in rows), strict=True)
        counts = [sum(column) for column in columns]
        self._sums = [a + b for a, b in zip(self._sums, counts, strict=True)] if self._sums else counts
        if self._number < self._num_microbatches:
            if not self._estimates:
                self._estimates = [float(count * self._num_microbatches or self._num_microbatches) for count in counts]
            return self._estimates
        for kind, one, count in zip(kinds, rows[0].summands, self._sums, strict=True):
            if kind == Kind.SUM and count > one.factor:
                raise ValueError(
                    f"num_items_in_batch is {one.factor:g}, but the batch has {count:g} targets: pass the number of "
                    f"the whole batch, the same on every rank, or leave it out"
                )
        if self._estimates:
            numbers = zip(kinds, self._estimates, self._sums, strict=True)
            corrections = [
                1.0 if kind == Kind.SUM else guess / count if count else math.nan for kind, guess, count in numbers
            ]
            self.correction = corrections[0]
            if not (
                all(map(math.isnan, corrections))
                or all(math.isclose(self.correction, one, rel_tol=1e-9) for one in corrections)
            ):
                raise ValueError(
                    f"the loss has several means, over {' and '.join(map('{:g}'.format, self._sums))} items of the "
                    f"batch, which are not in the same proportion in each microbatch: use microbatches=1, or return "
                    f"one MeanLoss"
                )
        return self._sums
