# SPDX-License-Identifier: Apache-2.0
"""Compare a model's weights and buffers with those of other ranks, copy them between ranks, and restore them.

Forward may do anything with buffers: write to them, resize or replace them, set them to None, register more. Two kinds
are told apart. *Plain* buffers have a strided layout, and are copied as bytes. The others (sparse, quantised) are
pickled.
"""

from __future__ import annotations

import itertools
import operator
import pickle
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..backend.gather import call_together, gather_bytes, gather_objects, message_device
from ..data.rng import RngState
from ..errors import MismatchError

Description = tuple[list[int], str, bool] | None

_values = operator.methodcaller("values")


def align_models(model: nn.Module, group: Any) -> None:
    """Set parameters and buffers to rank 0's values. Collective, blocks.

    Raises:
        MismatchError: The models differ in a name, shape, strides, dtype or requires_grad. The same on every rank.
    """
    compare_models([*model.named_parameters(), *model.named_buffers()], group)
    if group.size() == 1:
        return
    for parameter in model.parameters():
        broadcast(group, parameter.detach(), 0)
    buffers = Buffers(model)
    buffers.copy_from(0, group, *agree(group, buffers))


def compare_models(tensors: Iterable[tuple[str, Tensor]], group: Any, new: Collection[str] | None = None) -> None:
    """Compare the forms of the ranks' parameters and buffers. Collective, blocks.

    Args:
        tensors: Names, and parameters and buffers.
        group: Process group of the ranks.
        new: Names of those that were added or replaced since the last step; None at the start of the training.

    Raises:
        MismatchError: The models differ in a name, shape, strides, dtype or requires_grad, or other tensors are new.
            The same on every rank.
    """
    own = [_description(name, tensor, new is not None and name in new) for name, tensor in tensors]
    gathered = gather_objects(group, own)
    for rank, other in enumerate(gathered):
        if other != gathered[0]:
            remedy = "Build the model" if new is None else "After a change, build the model"
            raise MismatchError(_model_difference(rank, gathered[0], other, f"{remedy} the same way on every rank."))


class Buffers:
    """Buffers of a model, by module and name, since forward may replace a buffer by another tensor or by None.

    Args:
        model: Model whose buffers are looked up now, and again by `find`.
        skip: Types of modules whose buffers are left out.

    Attributes:
        names: Full name of each buffer.
    """

    def __init__(self, model: nn.Module, skip: tuple[type[nn.Module], ...] = ()) -> None:
        self._model, self._skip = model, skip
        self.find()

    def __len__(self) -> int:
        """Return the number of buffers."""
        return len(self._places)

    def find(self) -> None:
        """Look up the model's buffers. Local."""
        first = next(itertools.chain(self._model.parameters(), self._model.buffers()), None)
        self._device = torch.device("cpu") if first is None else first.device
        modules = list(self._model.named_modules())
        # Scripted modules have a wrapper in the place of a dict, and their children never change.
        self._children = [module._modules for _, module in modules if isinstance(module._modules, dict)]
        self._tree = self._all_children()
        own = [(prefix, module._buffers) for prefix, module in modules if not isinstance(module, self._skip)]
        self._dicts = [buffers for _, buffers in own]
        self._places = [(buffers, name) for buffers in self._dicts for name in buffers.keys()]
        self.names = [f"{prefix}.{name}" if prefix else name for prefix, buffers in own for name in buffers.keys()]

    def have_moved(self) -> bool:
        """Return whether modules or buffers were added or removed since `find`. Local."""
        return sum(map(len, self._dicts)) != len(self._places) or self._all_children() != self._tree

    def tensors(self) -> list[Tensor | None]:
        """Return the present buffers, not copies. Local."""
        return list(itertools.chain.from_iterable(map(_values, self._dicts)))

    def put(self, index: int, value: Tensor | None) -> None:
        """Give a buffer a value: in place if it fits, else as a new tensor in all its places. Local."""
        buffers, name = self._places[index]
        old = buffers[name]
        if old is not None and value is not None and is_plain(old) and describe(old) == describe(value):
            _compact(old.detach(), old).copy_(_compact(value, old))
            return
        if value is not None:
            value = value.to(self._device if old is None else old.device)
        for others, other in [(buffers, name)] if old is None else self._places:
            if others[other] is old:
                others[other] = value

    def copy_from(self, source: int, group: Any, plain: Sequence[int], others: Sequence[int]) -> None:
        """Copy buffers of rank `source` to all ranks. Collective, blocks.

        Args:
            source: The rank.
            group: Process group of the ranks.
            plain: Numbers of plain buffers whose description is the same on all ranks.
            others: Numbers of other buffers.
        """
        buffers = self.tensors()
        compact = [_compact(buffer.detach(), buffer) for index in plain if (buffer := buffers[index]) is not None]
        if compact:
            flat = torch.cat([bytes_of(buffer) for buffer in compact])
            broadcast(group, flat, source)
            pieces = torch.split(flat, [buffer.numel() * buffer.element_size() for buffer in compact])
            for buffer, piece in zip(compact, pieces, strict=True) if group.rank() != source else ():
                buffer.copy_(piece.clone().view(buffer.dtype).view(buffer.shape))  # the clone is aligned
        if others:
            own = [buffers[index] for index in others] if group.rank() == source else []
            for index, value in zip(others, _broadcast_tensors(group, own, source), strict=True):
                if group.rank() != source:
                    self.put(index, value)

    def snapshot(self) -> list[tuple[Tensor | None, Tensor | None]]:
        """Return each buffer and a copy of it, for `restore`. Local."""
        return [(buffer, None if buffer is None else buffer.detach().clone()) for buffer in self.tensors()]

    def restore(
        self, snapshot: list[tuple[Tensor | None, Tensor | None]], indices: Iterable[int] | None = None
    ) -> None:
        """Put the buffers of a snapshot back, with the values that it holds. Local.

        Args:
            snapshot: Result of `snapshot`, for all buffers.
            indices: Numbers of the buffers to put back; None for all.
        """
        for index in range(len(snapshot)) if indices is None else indices:
            (buffers, name), (buffer, value) = self._places[index], snapshot[index]
            buffers[name] = buffer
            if value is not None:
                self.put(index, value.clone())

    def _all_children(self) -> list[nn.Module | None]:
        return list(itertools.chain.from_iterable(map(dict.values, self._children)))


class StepSnapshot:
    """Snapshot of a step's state, except gradients, that changes before the optimizer runs: buffers, random states.

    Args:
        model: Model whose buffers are copied.
        device: Device of the model.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._buffers = Buffers(model)
        self._values = self._buffers.snapshot()
        self._device = device
        self._rng = RngState.capture(device)

    def restore(self) -> None:
        """Restore buffers and random states from the snapshot. Local."""
        self._buffers.restore(self._values)
        self._rng.restore(self._device)


def describe(buffer: Tensor | None) -> Description:
    """Return a buffer's shape, dtype and whether it is plain; None for None. Local."""
    return None if buffer is None else (list(buffer.shape), str(buffer.dtype), is_plain(buffer))


def is_plain(buffer: Tensor) -> bool:
    """Return whether a buffer can be copied as bytes. Local."""
    is_ordinary = type(buffer) in (Tensor, nn.Parameter) and buffer.layout is torch.strided
    return is_ordinary and not buffer.is_quantized and not buffer.is_inference()


def have_same_values(one: Tensor | None, other: Tensor | None) -> bool:
    """Return whether two values of a buffer are the same. Local."""
    if one is None or other is None or describe(one) != describe(other):
        return one is other
    if one.layout is not torch.strided:  # torch.equal does not know sparse tensors
        one, other = one.to_dense(), other.to_dense()
    return torch.equal(one, other)


def agree(group: Any, buffers: Buffers) -> tuple[list[int], list[int]]:
    """Compare the ranks' buffers. Collective, blocks.

    Args:
        group: Process group of the ranks.
        buffers: This rank's buffers.

    Returns:
        Numbers of the buffers that are plain and have the same description on all ranks, and of all others.

    Raises:
        MismatchError: The names of the buffers differ. The same on every rank.
    """
    rows = gather_objects(group, (buffers.names, list(map(describe, buffers.tensors()))))
    for rank, (names, _) in enumerate(rows):
        if names != rows[0][0]:
            only = set(names).symmetric_difference(rows[0][0])
            where = rank if only & set(names) else 0
            raise MismatchError(
                f"buffers differ: {min(only) if only else 'their order'} is on rank {where} and not on rank "
                f"{rank - where}. Register the same buffers on every rank, in the same order."
            )
    columns = list(zip(*(descriptions for _, descriptions in rows), strict=True))
    alike = [all(one == column[0] for one in column) and (column[0] is None or column[0][2]) for column in columns]
    return [i for i, is_alike in enumerate(alike) if is_alike], [i for i, is_alike in enumerate(alike) if not is_alike]


def _compact(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a view without the dimensions along which `like` repeats itself (expanded tensors)."""
    for dim, stride in enumerate(like.stride()):
        if stride == 0 and like.size(dim) > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def bytes_of(tensor: Tensor) -> Tensor:
    """Return the bytes of a plain tensor, by row; a view if it is contiguous. Local."""
    data = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return data.as_strided((data.numel(),), (1,)).view(torch.uint8)  # a single element may have a stride of 0


def _broadcast_tensors(group: Any, tensors: list[Tensor | None], source: int) -> list[Tensor | None]:
    """Return rank `source`'s tensors, of any layout, on the CPU. Collective, blocks.

    Raises:
        DistributedTrainerError: A tensor cannot be pickled. The same on every rank.
    """

    def pack() -> bytes:
        return pickle.dumps([None if tensor is None else tensor.detach().cpu() for tensor in tensors])

    data = call_together(group, pack)
    lengths = gather_bytes(group, len(data).to_bytes(8, "little"))
    if group.rank() != source:
        data = bytes(int.from_bytes(lengths[source], "little"))
    message = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(message_device(group))
    broadcast(group, message, source)
    result: list[Tensor | None] = pickle.loads(message.cpu().numpy().tobytes())
    return result


def broadcast(group: Any, tensor: Tensor, source: int) -> None:
    """Copy rank `source`'s values of a tensor to all ranks. Collective, blocks."""
    options = dist.BroadcastOptions()
    options.rootRank = source
    group.broadcast([tensor], options).wait()


def _description(name: str, tensor: Tensor, is_new: bool) -> tuple[str, str]:
    """Return a tensor's name, and its form in words."""
    if nn.parameter.is_lazy(tensor):
        return name, "without a shape"
    form = f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
    if isinstance(tensor, nn.Parameter):  # its gradient is summed in the order of its memory
        strides = torch.empty_like(tensor, device="meta").stride()
        form += "" if tensor.is_contiguous() else f" with strides {list(strides)}"
    return name, f"{form}{'' if tensor.requires_grad else ' without gradient'}{', which is new' if is_new else ''}"


def _model_difference(rank: int, first: list[Any], other: list[Any], remedy: str) -> str:
    for ours, theirs in zip(first, other, strict=False):
        if ours != theirs:
            return f"models differ: rank 0 has {' '.join(ours)}, rank {rank} has {' '.join(theirs)}. {remedy}"
    longer, extra = (0, first[len(other)]) if len(first) > len(other) else (rank, other[len(first)])
    return (
        f"models differ: rank 0 has {len(first)} parameters and buffers, rank {rank} has {len(other)}; only rank "
        f"{longer} has {' '.join(extra)}. {remedy}"
    )
