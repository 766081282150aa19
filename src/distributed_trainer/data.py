# SPDX-License-Identifier: Apache-2.0
"""Batches: nested tuples, lists and mappings of tensors whose first dimension counts the samples.

Cutting a batch into the ranks' parts, moving it, calling a model with it, and a fingerprint by which ranks
find out that they were not given the same batch. Nothing here communicates.

Functions that name tensors in messages take `roots`: the batch's trees by name, such as
`{"inputs": inputs, "targets": targets}`. A tensor's path then reads `inputs["ids"]`, `inputs[0]`, `targets`.
"""

from __future__ import annotations

import copy
import ctypes
import functools
import itertools
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# A fingerprint: checksum of the structure, checksum of integer contents, text of the structure, sampled values.
_TEXT_BYTES = 216
_NUM_VALUES = 36
_HEADER = struct.Struct(f"<II{_TEXT_BYTES}s")
FINGERPRINT_BYTES = _HEADER.size + 8 * _NUM_VALUES  # 512

_NUM_CHECKED_INTEGERS = 256  # of each integer tensor: all elements up to here, else as many sampled ones
_TOLERANCE = 1e-3  # of floats, relative to the largest sampled value of the tensor
_SMALLEST_MAGNITUDE = 1e-3  # below it differences count as if values were this large

_REMEDY = (
    "Every rank must pass the same global batch: seed the loader alike on all ranks. If each rank loads its own "
    "part of the data, use split_batches=False or trainer.batches(loader)."
)


def leaves(tree: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield (path, leaf) of every tensor and every other value in a nested structure.

    Raises:
        TypeError: a leaf holds numbers that we cannot cut: a NumPy array, or an object with its own `to`.
    """
    if isinstance(tree, Tensor):
        yield path, tree
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from leaves(value, f'{path}["{key}"]' if isinstance(key, str) else f"{path}[{key!r}]")
    elif isinstance(tree, tuple) and hasattr(tree, "_fields"):
        for field, value in zip(tree._fields, tree, strict=True):
            yield from leaves(value, f"{path}.{field}")
    elif isinstance(tree, (tuple, list)):
        for index, value in enumerate(tree):
            yield from leaves(value, f"{path}[{index}]")
    elif hasattr(tree, "shape") or hasattr(tree, "to"):
        raise TypeError(
            f"{path} is a {type(tree).__name__}, which cannot be cut into parts: pass tensors, or tuples, lists "
            "or dicts of tensors (torch.as_tensor turns an array into one)."
        )
    else:
        yield path, tree


def batch_size(roots: Mapping[str, Any]) -> int:
    """Return the number of samples: the first dimension, which all tensors share.

    Raises:
        ValueError: sizes differ (all are listed), a tensor has no dimension, or there is no tensor.
        TypeError: see `leaves`.
    """
    tensors = _named_tensors(roots)
    if not tensors:
        raise ValueError(f"{' and '.join(roots)} contain no tensor, so the batch has no size: pass at least one.")
    sizes = []
    for path, tensor in tensors:
        if tensor.dim() == 0:
            raise ValueError(
                f"{path} is a 0-dimensional tensor: the first dimension counts the samples. Pass a Python number "
                "for a value that all samples share, or unsqueeze(0) for a batch of one."
            )
        sizes.append(tensor.size(0))
    if len(set(sizes)) > 1:
        listed = ", ".join(f"{path}: {size}" for (path, _), size in zip(tensors, sizes, strict=True))
        raise ValueError(
            f"Tensors of a batch must have the same first dimension, the number of samples, but have {listed}."
        )
    return sizes[0]


def part_bounds(num_samples: int, rank: int, world_size: int) -> tuple[int, int]:
    """Return where the rank's part starts and stops. Parts are contiguous and differ by at most one sample.

    The first ranks get the longer parts, so with fewer samples than ranks the last ones have none.
    """
    share, num_longer = divmod(num_samples, world_size)
    start = rank * share + min(rank, num_longer)
    return start, start + share + (rank < num_longer)


@dataclass(frozen=True)
class Split:
    """How a batch is split over the ranks, in contiguous parts in their order. Called, it gives this rank's."""

    rank: int
    num_ranks: int
    shares: tuple[float, ...] | None = None
    """Of each rank, with sum 1; None for parts that differ by at most one sample."""

    def __call__(self, num_samples: int) -> tuple[int, int]:
        """Return where this rank's part starts and stops."""
        if self.shares is None:
            return part_bounds(num_samples, self.rank, self.num_ranks)
        lengths = self.lengths(num_samples)
        start = sum(lengths[: self.rank])
        return start, start + lengths[self.rank]

    def lengths(self, num_samples: int) -> list[int]:
        """Return the number of samples of each rank; at least one, if there are enough."""
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


def slice_batch(batch: Any, start: int, stop: int) -> Any:
    """Return the same structure with samples start to stop: views of the tensors, other leaves as they are.

    A mapping keeps its type if it can be copied and updated (or made from a dict), else it becomes a dict.
    """
    return map_tensors(lambda tensor: tensor[start:stop], batch)


def zero_sample(batch: Any) -> Any:
    """Return the same structure with one sample of zeros, for a batch that has none."""
    return map_tensors(lambda tensor: tensor.new_zeros((1, *tensor.shape[1:])), batch)


def to_device(batch: Any, device: torch.device | str) -> Any:
    """Return the same structure with its tensors on the device, not waiting for copies to an accelerator."""
    # Not to wait the other way would hand out host memory before it is written.
    non_blocking = torch.device(device).type != "cpu"
    return map_tensors(lambda tensor: tensor.to(device, non_blocking=non_blocking), batch)


def call_model(model: nn.Module, inputs: Any) -> Any:
    """Call the model with a mapping's items as keywords, a tuple or list as positional arguments, else as is."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, (tuple, list)):
        return model(*inputs)
    return model(inputs)


def fingerprint(roots: Mapping[str, Any], read_devices: bool = False) -> bytes:
    """Return `FINGERPRINT_BYTES` bytes that tell different batches apart, whatever their structure. Local.

    Covered: paths, shapes and dtypes; numbers, strings and None by their text; all elements of small integer
    tensors and a sample of large ones by checksum; a few elements of each tensor by value, so that floats can
    be compared with a tolerance (preprocessing need not give the same last bits on two machines).

    Args:
        roots: see the head of this file.
        read_devices: read tensors that are not on the CPU as well. That waits for everything queued on the
            device, so do it in the first steps only; loaders that differ do so at once.
    """
    items = []
    checksum = 0
    values: list[float] = []
    tensors = []
    for name, tree in roots.items():
        for path, leaf in leaves(tree, name):
            if isinstance(leaf, Tensor):
                items.append(_description(path, leaf.dtype, leaf.shape, leaf.device.type))
                if _is_read(leaf, read_devices):
                    tensors.append(leaf)
            elif leaf is None or isinstance(leaf, (bool, int, float, complex, str, bytes)):
                items.append(f"{path} {leaf!r}")
            else:
                items.append(f"{path} {type(leaf).__qualname__}")
    num_samples = _samples_each(len(tensors))
    for tensor in tensors:
        values += _sample(tensor, num_samples)
        if _is_exact(tensor):
            checksum = _checksum(tensor, checksum)
    text_checksum, text = _text(tuple(items))
    return _HEADER.pack(text_checksum, checksum, text) + _packed_values(values)


# Batches of a loader look alike, so what does not depend on their contents is worked out once.
@functools.lru_cache(maxsize=64)
def _description(path: str, dtype: torch.dtype, shape: torch.Size, device_type: str) -> str:
    place = "" if device_type == "cpu" else f" on {device_type}"
    return f"{path} {str(dtype).removeprefix('torch.')}{list(shape)}{place}"


@functools.lru_cache(maxsize=64)
def _text(items: tuple[str, ...]) -> tuple[int, bytes]:
    text = "; ".join(items).encode()
    return zlib.crc32(text), text[:_TEXT_BYTES]


def _packed_values(values: list[float]) -> bytes:
    values = values[:_NUM_VALUES]
    return struct.pack(f"{len(values)}d{8 * (_NUM_VALUES - len(values))}x", *values)


def compare_fingerprints(
    fingerprints: Sequence[bytes], roots: Mapping[str, Any], read_devices: bool = False
) -> str | None:
    """Return None if all ranks have the batch of rank 0, else what differs. Local; the same text on each rank.

    Args:
        fingerprints: of all ranks, in rank order, made with the same `read_devices`.
        roots: this rank's batch. Only its structure is used, and only if all ranks have the same one.
        read_devices: as given to `fingerprint`.
    """
    first = fingerprints[0]
    if all(other == first for other in fingerprints):
        return None
    headers = [_HEADER.unpack_from(one) for one in fingerprints]
    ranks = [rank for rank, header in enumerate(headers) if header[0] != headers[0][0]]
    if ranks:
        return _difference(ranks, _first_different_item(headers[0][2], headers[ranks[0]][2], ranks[0]))

    tensors = [(path, tensor) for path, tensor in _named_tensors(roots) if _is_read(tensor, read_devices)]
    num_samples = _samples_each(len(tensors))
    table = np.stack([np.frombuffer(one, np.float64, offset=_HEADER.size) for one in fingerprints])
    different = np.zeros(table.shape, bool)
    elements: list[tuple[str, torch.Size, int]] = []  # path, shape and position of what each column was read from
    for path, tensor in tensors:
        positions = _positions(tensor.numel(), num_samples)[: _NUM_VALUES - len(elements)]
        columns = slice(len(elements), len(elements) + len(positions))
        elements += [(path, tensor.shape, position) for position in positions]
        different[:, columns] = _is_different(table[:, columns], exact=_is_exact(tensor))
    wrong = different.any(1)
    ranks = [rank for rank, header in enumerate(headers) if wrong[rank] or header[1] != headers[0][1]]
    if not ranks:
        return None
    rank = ranks[0]
    if wrong[rank]:
        column = int(different[rank].argmax())
        values = table[[0, rank], column]
        path, shape, position = elements[column]
        index = [int(one) for one in np.unravel_index(position, shape)]
        what = f"{path}{index} is {values[0]:.9g} on rank 0 and {values[1]:.9g} on rank {rank}"
    else:
        paths = " or ".join(path for path, tensor in tensors if _is_exact(tensor))
        what = f"{paths} has checksum {headers[0][1]:08x} on rank 0 and {headers[rank][1]:08x} on rank {rank}"
    return _difference(ranks, what)


def _named_tensors(roots: Mapping[str, Any]) -> list[tuple[str, Tensor]]:
    found = (pair for name, tree in roots.items() for pair in leaves(tree, name))
    return [(path, leaf) for path, leaf in found if isinstance(leaf, Tensor)]


def map_tensors(change: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Return the same structure with `change` of each tensor."""
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, Mapping):
        changed = {key: map_tensors(change, value) for key, value in tree.items()}
        if type(tree) is dict:
            return changed
        try:
            if not isinstance(tree, MutableMapping):
                return type(tree)(changed)
            clone = copy.copy(tree)  # keeps what else the object holds, as a tokenizer's batch does
            clone.update(changed)
            return clone
        except TypeError:
            return changed
    if isinstance(tree, (tuple, list)):
        elements = [map_tensors(change, element) for element in tree]
        return type(tree)(*elements) if hasattr(tree, "_fields") else type(tree)(elements)
    return tree


def _samples_each(num_tensors: int) -> int:
    return max(1, _NUM_VALUES // max(1, num_tensors))


@functools.lru_cache(maxsize=64)
def _positions(num_elements: int, num_samples: int) -> list[int]:
    """Return which elements of a tensor to read, by their numbers in order of the dimensions; the same on all ranks.

    A regular sequence would not do: where it falls in step with the rows of an image it meets only their borders,
    which are alike in all images. (RandomState draws the same numbers in every version of NumPy.)
    """
    if num_elements <= num_samples:
        return list(range(num_elements))
    return np.random.RandomState(0).randint(num_elements, size=num_samples).tolist()


def _sample(tensor: Tensor, num_samples: int) -> list[float]:
    elements, indices = _elements(tensor, num_samples)
    return [elements[index] for index in indices]


def _checksum(tensor: Tensor, start: int) -> int:
    elements, indices = _elements(tensor, _NUM_CHECKED_INTEGERS)
    if len(indices) < len(elements):
        elements = (elements._type_ * len(indices))(*[elements[index] for index in indices])
    return zlib.crc32(elements, start)


def _elements(tensor: Tensor, num_samples: int) -> tuple[ctypes.Array | np.ndarray, Sequence[int]]:
    """Return an array and the indices at which it holds the sample: no others are read, whatever the strides."""
    if tensor.is_cpu and tensor.dtype in _C_TYPES and tensor.is_contiguous():
        # Not by NumPy, whose code a training step drives out of the CPU's caches: 0.03 ms more a step.
        array_type, positions = _array_plan(tensor.dtype, tensor.numel(), num_samples)
        return array_type.from_address(tensor.data_ptr()), positions
    positions = _positions(tensor.numel(), num_samples)
    tensor = tensor.detach()
    if tensor.device.type == "cpu" and tensor.dtype in _NUMPY_DTYPES:
        elements = tensor.numpy().flat[positions]
    else:
        elements = tensor[tuple(torch.from_numpy(index) for index in np.unravel_index(positions, tensor.shape))]
        elements = (elements.abs() if elements.is_complex() else elements).double().cpu().numpy()
    return elements, range(len(elements))


_C_TYPES = {
    torch.bool: ctypes.c_bool,
    torch.uint8: ctypes.c_uint8,
    torch.int32: ctypes.c_int32,
    torch.int64: ctypes.c_int64,
    torch.float32: ctypes.c_float,
    torch.float64: ctypes.c_double,
}


@functools.lru_cache(maxsize=64)
def _array_plan(dtype: torch.dtype, num_elements: int, num_samples: int) -> tuple[type[ctypes.Array], list[int]]:
    return _C_TYPES[dtype] * num_elements, _positions(num_elements, num_samples)


_NUMPY_DTYPES = frozenset(
    getattr(torch, name)
    for name in "bool uint8 int8 int16 int32 int64 float16 float32 float64".split()  # bfloat16 has none
)


def _is_read(tensor: Tensor, read_devices: bool) -> bool:
    return tensor.layout is torch.strided and (read_devices or tensor.device.type == "cpu")


def _is_exact(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex())


def _is_different(values: np.ndarray, exact: bool) -> np.ndarray:
    """Compare values of one tensor, a row for each rank, with the first row, rank 0's. NaN equals NaN."""
    first = values[:1]
    same = (values == first) | (np.isnan(values) & np.isnan(first))
    if exact:
        return ~same
    magnitude = np.abs(values, where=np.isfinite(values), out=np.zeros_like(values)).max(initial=_SMALLEST_MAGNITUDE)
    with np.errstate(invalid="ignore"):  # infinity minus infinity
        return ~(same | (np.abs(values - first) <= _TOLERANCE * magnitude))


def _first_different_item(zero: bytes, other: bytes, rank: int) -> str:
    items = [text.rstrip(b"\0").decode(errors="replace").split("; ") for text in (zero, other)]
    for ours, theirs in zip(*items, strict=False):
        if ours != theirs:
            return f"rank 0 has {ours}, rank {rank} has {theirs}"
    if len(items[0]) != len(items[1]):
        return f"rank 0 has {', '.join(items[0])}, rank {rank} has {', '.join(items[1])}"
    return f"their structures differ after {', '.join(items[0])}"


def _difference(ranks: list[int], what: str) -> str:
    who = f"rank {ranks[0]} has" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))} have"
    return f"{who} another batch than rank 0: {what}. {_REMEDY}"
