# SPDX-License-Identifier: Apache-2.0
"""Sums of gradients with the same bits on any number of ranks.

A global batch is cut into S *shards*, on any number of ranks. Each shard is computed by itself: with its own samples,
random stream and BatchNorm statistics. The shards' gradients are added in one binary tree over the shards, in which
every node is the sum of its two halves. A rank computes consecutive shards, and adds them up to the largest nodes of
the tree that it can complete. These nodes are sent to all ranks, and each rank adds the rest of the tree. So the sums,
and their rounding, are the same as in one process that computes all shards. Shards without samples are left out of the
tree.

Example with S = 8 and 3 ranks, where rank 1 has shards 3, 4 and 5:

    rank 0: (0+1), 2    rank 1: 3, (4+5)    rank 2: (6+7)    all: ((0+1) + (2+3)) + ((4+5) + (6+7))

The idea is from EasyScale (Li et al., SC'23), which calls shards virtual ranks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..backend.gather import gather_bytes
from ..data.split import own_shards
from .buckets import LINE_BYTES, Memory, is_finite, view_like
from .hooks import GradientFunctions
from .layout import BUCKET_BYTES
from .loss_scale import LossScale

Node = tuple[int, int]  # first shard, and one past the last
Kind = tuple[torch.dtype, torch.device]


def halves(node: Node) -> tuple[Node, Node]:
    """Return the two nodes whose sum is the given node."""
    start, stop = node
    middle = start + (stop - start + 1) // 2
    return (start, middle), (middle, stop)


def whole_nodes(node: Node, shards: range) -> list[Node]:
    """Return the largest nodes within `node` that together hold exactly these shards, in order."""
    start, stop = node
    if not shards or stop <= shards.start or shards.stop <= start:
        return []
    if shards.start <= start and stop <= shards.stop:
        return [node]
    return [found for half in halves(node) for found in whole_nodes(half, shards)]


class _Sum:
    """Gradients of all trained parameters: one flat tensor for each dtype and device, in at least float32."""

    def __init__(self, layout: _Layout) -> None:
        self._layout = layout
        self.flat = {
            kind: torch.zeros(length, dtype=torch.promote_types(kind[0], torch.float32), device=kind[1])
            for kind, length in layout.lengths.items()
        }
        self._memories = [Memory(flat, []) for flat in self.flat.values()]

    @property
    def is_held(self) -> bool:
        """Whether anything beyond this object refers to the memory, such as a `.grad`. Local."""
        return any(memory.is_held for memory in self._memories)

    def take(self, parameters: list[nn.Parameter]) -> None:
        """Copy the parameters' `.grad`, or zeros where there is none, and set every `.grad` to None."""
        for index, view in self._views(self.flat):
            gradient = parameters[index].grad
            if gradient is None:
                view.zero_()
            else:
                view.copy_(gradient.to_dense() if gradient.is_sparse else gradient)
            parameters[index].grad = None

    def add_(self, other: _Sum) -> None:
        """Add another sum, element by element."""
        for kind, flat in self.flat.items():
            flat.add_(other.flat[kind])

    def gradients(self) -> dict[int, Tensor]:
        """Return the gradients by the parameters' numbers, in the parameters' shapes and dtypes.

        They are views of this memory, except for 16-bit parameters.
        """
        return dict(self._views({kind: flat.to(kind[0]) for kind, flat in self.flat.items()}))

    def _views(self, flat: dict[Kind, Tensor]) -> Iterator[tuple[int, Tensor]]:
        for index, kind, start in self._layout.places:
            yield index, view_like(self._layout.parameters[index], flat[kind][start:])


class _Layout:
    """Place of each trained parameter's gradient in a `_Sum`."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        self.lengths: dict[Kind, int] = {}
        self.places: list[tuple[int, Kind, int]] = []
        for index, parameter in enumerate(parameters):
            if parameter.requires_grad:
                kind = (parameter.dtype, parameter.device)
                line = LINE_BYTES // 4
                start = -(-self.lengths.get(kind, 0) // line) * line
                self.places.append((index, kind, start))
                self.lengths[kind] = start + parameter.numel()


class DeterministicReducer:
    """Reducer that sums the gradients of shards over the ranks of a process group, in the order of a fixed tree.

    It keeps up to log2(S) + 2 copies of all gradients.

    Args:
        parameters: Names and parameters, the same on every rank; shared parameters once.
        process_group: Any process group of torch.
        num_shards: Number S of shards, at least the number of ranks.
        check_finite: Whether to set `found_nonfinite`.

    Attributes:
        found_nonfinite: Whether a gradient of the last step is infinite or NaN. The same on every rank.
        has_unsummed: False: backwards other than the reducer's are not noticed.
        recorder: Recorder of a profile in progress. It gets no calls, since there are no buckets.
        functions: Functions that may replace sums.
        loss_scale: Scale of the loss, by which the sums are divided; None for no division.
    """

    recorder: Any = None
    has_unsummed = False

    def __init__(
        self, parameters: Iterable[tuple[str, nn.Parameter]], process_group: Any, num_shards: int, check_finite: bool
    ) -> None:
        self._group = process_group
        self._root = (0, num_shards)
        self._parents = {halves(node): node for node in _inner_nodes(self._root)}
        self._shards = own_shards(num_shards, process_group.rank(), process_group.size())
        self._check_finite = check_finite
        self.found_nonfinite = False
        self.functions = GradientFunctions()
        self.loss_scale: LossScale | None = None
        self._nodes: list[tuple[Node, _Sum | None]] = []
        self._used: list[bool] = []
        self._num_taken = 0
        self.follow(parameters)

    def follow(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        """Sum the gradients of these parameters from now on. Local; see `GradientReducer.follow`."""
        named = list(parameters)
        self._names = [name for name, _ in named]
        self._parameters = [parameter for _, parameter in named]
        self._layout = _Layout(self._parameters)
        self._spare: list[_Sum] = []
        self._result: _Sum | None = None

    def start(self) -> None:
        """Begin a step, before forward: drop all gradients. Local."""
        for parameter in self._parameters:
            parameter.grad = None
        if self._result is not None:
            if not self._result.is_held:  # else the script keeps gradients of the last step
                self._spare.append(self._result)
            self._result = None
        self._nodes, self._num_taken = [], 0
        self._used = [False] * len(self._parameters)

    @contextlib.contextmanager
    def backward(self, leave_out: bool = False, is_last: bool = True) -> Iterator[None]:
        """Surround the backward of this rank's next shard. Local.

        Args:
            leave_out: Drop the gradients of this shard, which counts for nothing.
            is_last: Ignored; an argument of `GradientReducer.backward`.
        """
        yield
        if leave_out:
            for parameter in self._parameters:
                parameter.grad = None
        self._used = [was or p.grad is not None for was, p in zip(self._used, self._parameters, strict=True)]
        own = self._spare.pop() if self._spare else _Sum(self._layout)
        own.take(self._parameters)
        number = self._shards[self._num_taken]
        self._num_taken += 1
        self._push((number, number + 1), own)

    def finish(self) -> None:
        """Sum the gradients at the end of a step. Collective, blocks.

        Shards without samples, which are the last ones, had no backward.
        """
        for number in self._shards[self._num_taken :]:
            self._push((number, number + 1), None)
        num_shards = gather_bytes(self._group, bytes([self._num_taken]))
        used = [any(row) for row in zip(*gather_bytes(self._group, bytes(self._used)), strict=True)]
        self._result = self._sum_of_tree(sum(row[0] for row in num_shards))
        gradients = self._result.gradients()
        for index, gradient in gradients.items():
            self._parameters[index].grad = gradient if used[index] else None
        if self._check_finite:
            self.found_nonfinite = not all(is_finite(gradient) for gradient in gradients.values())
        if self.loss_scale is not None:
            self.loss_scale.unscale([p.grad for p in self._parameters if p.grad is not None])
        self.functions.apply()

    def first_nonfinite(self) -> str:
        """Return the name of the first parameter whose gradient is infinite or NaN. Local; needs `found_nonfinite`."""
        named = zip(self._names, self._parameters, strict=True)
        return next(name for name, p in named if p.grad is not None and not is_finite(p.grad))

    def close(self) -> None:
        """Release the memory. Local."""
        self._spare, self._nodes, self._result = [], [], None

    def _push(self, node: Node, value: _Sum | None) -> None:
        """Append a node, and add the last two nodes as long as together they are a node of the tree."""
        self._nodes.append((node, value))
        while len(self._nodes) > 1:
            (left, left_sum), (right, right_sum) = self._nodes[-2:]
            parent = self._parents.get((left, right))
            if parent is None:
                return
            if left_sum is not None and right_sum is not None:
                left_sum.add_(right_sum)
                self._spare.append(right_sum)
            self._nodes[-2:] = [(parent, left_sum)]

    def _sum_of_tree(self, num_full: int) -> _Sum:
        """Exchange the remaining nodes, and add the rest of the tree, piece by piece. Collective, blocks."""
        size = self._group.size()
        if size == 1:
            ((_, result),) = self._nodes
            assert result is not None
            return result
        nodes = [whole_nodes(self._root, own_shards(self._root[1], rank, size)) for rank in range(size)]
        assert [node for node, _ in self._nodes] == nodes[self._group.rank()]
        num_rows = max(map(len, nodes))
        places = {node: rank * num_rows + row for rank, own in enumerate(nodes) for row, node in enumerate(own)}
        result = self._spare.pop() if self._spare else _Sum(self._layout)
        for kind, target in result.flat.items():
            step = max(1, BUCKET_BYTES // target.element_size())
            for start in range(0, len(target), step):
                piece = slice(start, min(len(target), start + step))
                own = target.new_zeros(num_rows, piece.stop - start)
                for row, (_, value) in zip(own, self._nodes, strict=False):
                    if value is not None:
                        row.copy_(value.flat[kind][piece])
                gathered = own.new_empty(size * own.numel())
                self._group._allgather_base(gathered, own.view(-1)).wait()
                target[piece] = self._value(self._root, gathered.view(size * num_rows, -1), places, num_full)
        self._spare += [value for _, value in self._nodes if value is not None]
        return result

    def _value(self, node: Node, rows: Tensor, places: dict[Node, int], num_full: int) -> Tensor:
        """Return the sum of a node with samples, computed from the exchanged nodes."""
        if node in places:
            return rows[places[node]]
        left, right = halves(node)
        value = self._value(left, rows, places, num_full)
        return value if right[0] >= num_full else value + self._value(right, rows, places, num_full)


def _inner_nodes(node: Node) -> Iterator[Node]:
    if node[1] - node[0] > 1:
        yield node
        for half in halves(node):
            yield from _inner_nodes(half)
