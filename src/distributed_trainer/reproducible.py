# SPDX-License-Identifier: Apache-2.0
"""The same bits on any number of ranks.

A global batch is cut into S *shards*, whatever the number of ranks. Each is computed by itself: its samples, a random
stream and BatchNorm statistics of its own. What they give is added in one binary tree over the shards, in which every
node is the sum of its two halves. A rank computes consecutive shards, and adds what makes up whole nodes of the tree;
the nodes that are left go to all ranks, each of which adds the rest of the tree. So the sums, and their rounding, are
those of one process that computes all shards. Shards without samples are left out of the tree.

With S = 8 and 3 ranks, of which rank 1 has shards 3, 4 and 5:

    rank 0: (0+1), 2    rank 1: 3, (4+5)    rank 2: (6+7)    all: ((0+1) + (2+3)) + ((4+5) + (6+7))

The idea is EasyScale's (Li et al., SC'23), whose virtual ranks these shards are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .alignment import draw_seed, random_stream
from .backend import gather_bytes, gather_objects
from .buckets import LINE_BYTES, is_finite, view_like
from .data import part_bounds
from .errors import MismatchError
from .gradients import BUCKET_BYTES

# Which code torch's libraries choose for a CPU; all three fixed make ranks on different CPUs compute alike.
INSTRUCTION_VARIABLES = ("ATEN_CPU_CAPABILITY", "MKL_CBWR", "ONEDNN_MAX_CPU_ISA")


def own_shards(num_shards: int, rank: int, world_size: int) -> range:
    """The shards that a rank computes: consecutive ones, as even as can be."""
    return range(*part_bounds(num_shards, rank, world_size))


def shard_part(num_samples: int, num_shards: int, rank: int, world_size: int) -> tuple[int, int]:
    """First of the samples that a rank's shards hold, and the one after the last."""
    shards = own_shards(num_shards, rank, world_size)
    if not shards:
        return 0, 0
    return part_bounds(num_samples, shards[0], num_shards)[0], part_bounds(num_samples, shards[-1], num_shards)[1]


Node = tuple[int, int]  # first shard, and the one after the last
Kind = tuple[torch.dtype, torch.device]


def halves(node: Node) -> tuple[Node, Node]:
    """The two nodes whose sum a node is."""
    start, stop = node
    middle = start + (stop - start + 1) // 2
    return (start, middle), (middle, stop)


def whole_nodes(node: Node, shards: range) -> list[Node]:
    """The largest nodes below this one that hold these shards and no others, in order."""
    start, stop = node
    if not shards or stop <= shards.start or shards.stop <= start:
        return []
    if shards.start <= start and stop <= shards.stop:
        return [node]
    return [found for half in halves(node) for found in whole_nodes(half, shards)]


class _Sum:
    """Gradients of all trained parameters, flat: one tensor for each dtype and device, in at least float32."""

    def __init__(self, layout: _Layout) -> None:
        self._layout = layout
        self.flat = {
            kind: torch.zeros(length, dtype=torch.promote_types(kind[0], torch.float32), device=kind[1])
            for kind, length in layout.lengths.items()
        }

    def take(self, parameters: list[nn.Parameter]) -> None:
        """Becomes the `.grad` of the parameters, and zeros where there is none; these lose theirs."""
        for index, view in self._views(self.flat):
            gradient = parameters[index].grad
            if gradient is None:
                view.zero_()
            else:
                view.copy_(gradient.to_dense() if gradient.is_sparse else gradient)
            parameters[index].grad = None

    def add_(self, other: _Sum) -> None:
        """Adds another, element by element."""
        for kind, flat in self.flat.items():
            flat.add_(other.flat[kind])

    def gradients(self) -> dict[int, Tensor]:
        """By the number of the parameter, in its shape and dtype. In this memory, unless it is of 16 bits."""
        return dict(self._views({kind: flat.to(kind[0]) for kind, flat in self.flat.items()}))

    def _views(self, flat: dict[Kind, Tensor]) -> Iterator[tuple[int, Tensor]]:
        for index, kind, start in self._layout.places:
            yield index, view_like(self._layout.parameters[index], flat[kind][start:])


class _Layout:
    """Where each trained parameter's gradient is in a `_Sum`."""

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


class ShardSum:
    """Sums the gradients of shards over the ranks of a process group. Has the methods of a `GradientSum`.

    Keeps up to log2(S) + 2 copies of all gradients.

    Args:
        parameters: Names and parameters, the same on every rank; shared parameters once.
        process_group: Any of torch's.
        num_shards: S, no less than there are ranks.
        check_finite: For `found_nonfinite`.

    Attributes:
        found_nonfinite: Whether a gradient of the last step is infinite or NaN. The same on every rank.
        recorder: As of `GradientSum`; there are no buckets to tell of.
    """

    recorder: Any = None

    def __init__(
        self, parameters: Iterable[tuple[str, nn.Parameter]], process_group: Any, num_shards: int, check_finite: bool
    ) -> None:
        named = list(parameters)
        self._names = [name for name, _ in named]
        self._parameters = [parameter for _, parameter in named]
        self._group = process_group
        self._root = (0, num_shards)
        self._parents = {halves(node): node for node in _inner_nodes(self._root)}
        self._shards = own_shards(num_shards, process_group.rank(), process_group.size())
        self._check_finite = check_finite
        self.found_nonfinite = False
        self._trainable: list[bool] = []
        self._layout = _Layout([])
        self._spare: list[_Sum] = []
        self._result: _Sum | None = None
        self._nodes: list[tuple[Node, _Sum | None]] = []
        self._used: list[bool] = []
        self._num_taken = 0

    def start(self) -> None:
        """Begins a step, before forward: drops all gradients. Collective where others are trained than before.

        Raises:
            MismatchError: The ranks train different parameters. The same on every rank.
        """
        for parameter in self._parameters:
            parameter.grad = None
        trainable = [parameter.requires_grad for parameter in self._parameters]
        if trainable != self._trainable:
            self._lay_out(trainable)
        if self._result is not None:
            self._spare.append(self._result)
            self._result = None
        self._nodes, self._num_taken = [], 0
        self._used = [False] * len(self._parameters)

    @contextlib.contextmanager
    def backward(self, leave_out: bool = False, is_last: bool = True) -> Iterator[None]:
        """Around the backward of the next of this rank's shards. Local.

        Args:
            leave_out: The shard counts for nothing.
            is_last: As of `GradientSum`; of no effect.
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
        """Ends a step, in which shards without samples had no backward: the last ones. Collective, blocks."""
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

    def first_nonfinite(self) -> str:
        """Name of the first parameter whose gradient is infinite or NaN, if `found_nonfinite`. Local."""
        named = zip(self._names, self._parameters, strict=True)
        return next(name for name, p in named if p.grad is not None and not is_finite(p.grad))

    def close(self) -> None:
        """Lets go of the memory. Local."""
        self._spare, self._nodes, self._result = [], [], None

    def _lay_out(self, trainable: list[bool]) -> None:
        gathered = gather_objects(self._group, trainable)
        for rank, other in enumerate(gathered):
            for index, name in enumerate(self._names):
                if other[index] != gathered[0][index]:
                    here, there = ("trained" if needed[index] else "frozen" for needed in (gathered[0], other))
                    raise MismatchError(
                        f"parameters differ: {name} is {here} on rank 0 and {there} on rank {rank}. Build the model "
                        f"the same way on every rank."
                    )
        self._trainable = trainable
        self._layout = _Layout(self._parameters)
        self._spare, self._result = [], None

    def _push(self, node: Node, value: _Sum | None) -> None:
        """Adds a node behind the others, and what makes up whole nodes with it."""
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
        """Exchanges the nodes that are left, and adds the rest of the tree, piece by piece. Collective, blocks."""
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
        """Of a node with samples, from those that were exchanged."""
        if node in places:
            return rows[places[node]]
        left, right = halves(node)
        value = self._value(left, rows, places, num_full)
        return value if right[0] >= num_full else value + self._value(right, rows, places, num_full)


class ShardBuffers:
    """The buffers of a model, of which every shard begins with the same: after a step floats are the shards' mean.

    Others become those of the first shard. (Running statistics of BatchNorm so take the mean of the shards'.)
    """

    def __init__(self, model: nn.Module) -> None:
        self._places = [
            (module, name) for module in model.modules() for name, b in module._buffers.items() if b is not None
        ]
        self._before: list[Tensor] = []
        self._changed: list[dict[int, Tensor]] = []

    def start(self) -> None:
        """Begins a step. Local."""
        self._before = [module._buffers[name].detach().clone() for module, name in self._places]
        self._changed = []

    @contextlib.contextmanager
    def shard(self) -> Iterator[None]:
        """Around forward and backward of a shard. Local."""
        buffers = [module._buffers[name] for module, name in self._places]
        yield
        changed = {}
        for index, (module, name) in enumerate(self._places):
            buffer = module._buffers[name]
            # By value: BatchNorm's kernels write to running statistics without telling autograd.
            if buffer is not buffers[index] or not torch.equal(buffer, self._before[index]):
                changed[index] = buffer.detach().cpu().clone()
                buffers[index].detach().copy_(self._before[index])
                module._buffers[name] = buffers[index]
        self._changed.append(changed)

    def finish(self, group: Any) -> None:
        """Ends a step. Collective, blocks."""
        if not self._places:
            return
        shards = [changed for row in gather_objects(group, self._changed) for changed in row]
        for index in sorted({index for changed in shards for index in changed}):
            module, name = self._places[index]
            buffer = module._buffers[name].detach()
            values = [changed.get(index, self._before[index].cpu()) for changed in shards]
            if buffer.is_floating_point():
                total = values[0].double()
                for value in values[1:]:
                    total = total + value
                buffer.copy_(total / len(values))
            else:
                buffer.copy_(values[0])


class ShardStreams:
    """A random stream for each shard of each step."""

    def __init__(self, shards: range, device: torch.device) -> None:
        self._shards, self._device = shards, device
        self._seed = self._num_used = 0

    def start(self) -> None:
        """Begins a step: draws from the common stream, which goes on alike on all ranks. Local."""
        self._seed, self._num_used = draw_seed(), 0

    def shard(self) -> contextlib.AbstractContextManager[None]:
        """Around forward and backward of the next shard of this rank. Local."""
        number = self._shards[self._num_used]
        self._num_used += 1
        return random_stream(self._seed ^ number, self._device)


def check_computers(group: Any, environ: Mapping[str, str], cpu: str | None = None) -> None:
    """Raises MismatchError if ranks would not compute the same bits. Collective, blocks; the same on every rank.

    Sets the number of threads to OMP_NUM_THREADS, else to 1, since sums depend on it.
    """
    threads = environ.get("OMP_NUM_THREADS", "1")
    torch.set_num_threads(int(threads) if threads.isdecimal() and int(threads) else 1)
    own = {
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        **{name: environ.get(name, "not set") for name in INSTRUCTION_VARIABLES},
        "CPU": cpu or instruction_sets(),
    }
    gathered = gather_objects(group, own)
    is_forced = all(own[name] != "not set" for name in INSTRUCTION_VARIABLES)
    for rank, other in enumerate(gathered):
        for name, value in other.items():
            if value == gathered[0][name] or (name == "CPU" and is_forced):
                continue
            remedy = {
                "threads": "Set OMP_NUM_THREADS to the same number on all machines, or nowhere.",
                "torch": "Install the same on all machines.",
                "CPU": "To have them compute alike, pass ATEN_CPU_CAPABILITY=avx2, MKL_CBWR=AVX2 and "
                "ONEDNN_MAX_CPU_ISA=AVX2 to all ranks.",
            }.get(name, "Set it alike on all machines.")
            raise MismatchError(
                f"reproducible= needs ranks that compute alike, but {name} is {gathered[0][name]} on rank 0 and "
                f"{value} on rank {rank}. {remedy}"
            )


def instruction_sets() -> str:
    """Vendor and instruction sets of this CPU, of those by which torch's libraries choose their code."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return torch.backends.cpu.get_cpu_capability()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    fields = {name.strip(): value.strip() for name, value in fields.items()}
    flags = [flag for flag in fields.get("flags", "").split() if flag.startswith(("avx", "fma", "amx"))]
    return f"{fields.get('vendor_id', 'unknown')} ({' '.join(sorted(flags))})"


def _inner_nodes(node: Node) -> Iterator[Node]:
    if node[1] - node[0] > 1:
        yield node
        for half in halves(node):
            yield from _inner_nodes(half)
