# SPDX-License-Identifier: Apache-2.0
"""Make the buffers of a model the same on all ranks: after each step, or by a user's rule after each microbatch."""

from __future__ import annotations

import itertools
import logging
import operator
from typing import Any

from torch import Tensor, nn

from ..backend.gather import gather_objects
from ..options import TrainerOptions
from .buffer_rules import check_mean, combine, match_rules
from .divergence import sum_of_bits
from .model_state import Buffers, Description, agree, describe, is_plain

logger = logging.getLogger("distributed_trainer")


class SharedBuffers:
    """Buffers that are made the same on all ranks.

    Buffers may be registered later, on every rank alike.

    Args:
        model: Model whose buffers are shared. They are the same on all ranks, unless `share_all` is called first.
        group: Process group of the ranks.
        options: Options of the trainer. With `sync_batchnorm` the buffers of BatchNorm modules are left out, which are
            already the same on all ranks.
    """

    def __init__(self, model: nn.Module, group: Any, options: TrainerOptions) -> None:
        self._model, self._group, self._rules = model, group, options.buffers or {}
        self._is_alone = group.size() == 1
        self._combines = not self._is_alone and any(rule != "first" for rule in self._rules.values())
        self._buffers = buffers_of(model, options)
        self._changing = set[str]()  # names of the buffers that have ever changed, on any rank
        self._hidden = set[str]()  # names of the buffers whose versions do not show that they change
        self._find()
        self._first_sums = [] if self._is_alone else list(map(_checksum, self._last))

    def changes(self) -> list[float]:
        """Return whether this rank's buffers have changed, have new layouts, change for the first time. Local.

        The numbers are 0 or 1. Their sums over the ranks are an argument of `share`.
        """
        if self._is_alone:
            return [0.0, 0.0, 0.0]
        if self._has_moved or self._buffers.have_moved():
            self._find()
            self._changed = set(self._names)
            return [1.0, 1.0, 1.0]
        buffers = self._shared()
        versions = _versions(buffers)
        if self._first_sums:
            # A write to `buffer.data` does not change the version. Whether forward does that is seen in the first step.
            sums, self._first_sums = zip(self._names, self._first_sums, map(_checksum, buffers), strict=True), []
            self._hidden = {name for name, before, now in sums if before != now}
        if not self._hidden and versions == self._versions and all(map(operator.is_, buffers, self._last)):
            return [0.0, 0.0, 0.0]
        places = list(zip(self._names, buffers, versions, self._last, self._versions, self._layouts, strict=True))
        written = {name for name, now, new, last, old, _ in places if now is not last or new != old}
        self._changed = written | self._hidden
        has_new_layout = any(
            (layout := describe(buffer)) != known or (layout is not None and not layout[2])
            for name, buffer, *_, known in places
            if name in self._changed
        )
        return [float(bool(self._changed)), float(has_new_layout), float(not self._changed <= self._changing)]

    def share(self, source: int, changes: list[float], has_samples: bool) -> None:
        """Copy rank `source`'s buffers without another rule to all ranks, if they have changed. Collective, blocks.

        Args:
            source: First rank that has samples.
            changes: Sums of all ranks' `changes`.
            has_samples: Whether this rank has samples.

        Raises:
            MismatchError: A buffer is not on all ranks. The same on every rank.
        """
        has_changed, has_new_layout, is_first_change = map(bool, changes)
        if not has_changed:
            return
        plain, others = agree(self._group, self._buffers) if has_new_layout else (self._plain, [])
        if is_first_change:
            self._look_at_first_change(has_samples)
        chosen = {index for index, name in zip(self._indices, self._names, strict=True) if name in self._changing}
        self._buffers.copy_from(source, self._group, sorted(chosen & set(plain)), sorted(chosen & set(others)))
        self._remember(has_new_layout)

    def share_all(self, source: int) -> None:
        """Copy all buffers of rank `source` to all ranks. Collective, blocks."""
        if not self._is_alone:
            self._buffers.find()
            self._buffers.copy_from(source, self._group, *agree(self._group, self._buffers))
            self._find()

    def combine(self, weight: float) -> None:
        """Combine the ranks' buffers by the rules "mean" and "gather", after a microbatch. Collective, blocks.

        Local if there are no such rules.

        Args:
            weight: Number of this rank's samples; 0 if it ran a dummy.

        Raises:
            MismatchError: The ranks' values do not fit together. The same on every rank.
            ValueError: A buffer does not have the type that its rule needs. The same on every rank.
        """
        if not self._combines:
            return
        if self._buffers.have_moved():
            self._find()
            self._has_moved = True
        buffers = self._buffers.tensors()
        names = [self._buffers.names[index] for index in self._combined]
        own = [describe(buffers[index]) for index in self._combined]
        rows = gather_objects(self._group, (weight, names, own))
        if any(row[1] != names for row in rows):
            agree(self._group, self._buffers)  # raises
        weights = [row[0] for row in rows]
        if not any(weights):
            return
        for number, (index, rule) in enumerate(self._combined.items()):
            layouts = [row[2][number] if row[0] else None for row in rows]
            self._buffers.put(index, combine(names[number], rule, buffers[index], layouts, weights, self._group))

    def unchanged(self) -> dict[str, Tensor]:
        """Return the plain buffers that this rank has not changed since they were shared. Local.

        Other buffers may differ between ranks, such as those that an evaluation has changed.
        """
        places = zip(self._names, self._shared(), self._last, self._versions, strict=False)
        changed = {name for name, now, last, old in places if now is not last or [old] != _versions([now])}
        changed.update(self._buffers.names[index] for index in self._combined)
        named = self._model.named_buffers()
        return {name: buffer for name, buffer in named if name not in changed and is_plain(buffer)}

    def _find(self) -> None:
        """Look up the buffers and their rules. Local."""
        self._buffers.find()
        names = self._buffers.names
        rules = match_rules(names, self._rules)
        self._combined = {
            index: rule for index, name in enumerate(names) if (rule := rules.get(name, "first")) != "first"
        }
        self._is_shared = [index not in self._combined for index in range(len(names))]
        self._indices = list(itertools.compress(range(len(names)), self._is_shared))
        self._names = [names[index] for index in self._indices]
        self._unruled = set(names) - rules.keys()
        self._has_moved = False
        self._remember(has_new_layout=True)

    def _shared(self) -> list[Tensor | None]:
        return list(itertools.compress(self._buffers.tensors(), self._is_shared))

    def _remember(self, has_new_layout: bool) -> None:
        self._changed = set[str]()  # since then, on this rank
        self._last = self._shared()  # kept, since the address of a deleted tensor may be used again
        self._versions = _versions(self._last)
        if has_new_layout:
            self._layouts: list[Description] = list(map(describe, self._last))
            places = zip(self._indices, self._layouts, strict=True)
            self._plain = [index for index, layout in places if layout is None or layout[2]]

    def _look_at_first_change(self, has_samples: bool) -> None:
        """Remember buffers that change, and warn of those that depend on the samples. Collective, blocks."""
        values = [(describe(buffer), _checksum(buffer)) for buffer in self._shared()]
        rows = gather_objects(self._group, (has_samples, self._changed, values))
        new = set[str]().union(*(changed for _, changed, _ in rows)) - self._changing
        self._changing |= new
        columns = zip(self._names, *(values for has_samples, _, values in rows if has_samples), strict=True)
        names = [name for name, first, *others in columns if any(other != first for other in others)]
        names = [name for name in names if name in new & self._unruled]
        if names and self._group.rank() == 0:
            logger.warning(
                "Each rank has computed other values of buffer(s) %s, which depend on its samples. All ranks take "
                "those of the first rank that has samples, while one process would have those of the whole batch. Pass "
                'buffers={%r: "mean"} or "gather" to create_distributed_trainer if that is how they add up '
                '(docs/training.md), or "first" if this is as intended.',
                *(", ".join(map(repr, names)), names[0]),
            )


def buffers_of(model: nn.Module, options: TrainerOptions) -> Buffers:
    """Return the buffers to share: without those of BatchNorm modules if these use the statistics of all ranks."""
    return Buffers(model, (nn.modules.batchnorm._BatchNorm,) if options.sync_batchnorm else ())


def check_rules(model: nn.Module, options: TrainerOptions) -> None:
    """Check the rules of `buffers=` against a model. Local.

    Raises:
        ValueError: A pattern matches no buffer, or the rule "mean" a buffer that is not of a floating type.
    """
    buffers = buffers_of(model, options)
    rules = match_rules(buffers.names, options.buffers or {}, is_strict=True)
    for name, buffer in zip(buffers.names, buffers.tensors(), strict=True):
        if buffer is not None and rules.get(name) == "mean":
            check_mean(name, buffer.dtype)


def _versions(buffers: list[Tensor | None]) -> list[int]:
    return [0 if buffer is None or buffer.is_inference() else buffer._version for buffer in buffers]


def _checksum(buffer: Tensor | None) -> int | None:
    return None if buffer is None or not is_plain(buffer) else int(sum_of_bits(buffer.detach()))
