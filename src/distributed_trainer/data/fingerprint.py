# SPDX-License-Identifier: Apache-2.0
"""Fingerprints of batches, which show whether all ranks were given the same batch.

Nothing here communicates. `roots` are a batch's trees by name; see the head of `batch.py`.
"""

from __future__ import annotations

import ctypes
import functools
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .batch import PLAIN, leaves

if TYPE_CHECKING:
    from numpy.typing import NDArray

# A fingerprint holds a checksum of the structure, a checksum of integer contents, the structure's text, sampled values.
_TEXT_BYTES = 216
_NUM_VALUES = 36
_HEADER = struct.Struct(f"<II{_TEXT_BYTES}s")
FINGERPRINT_BYTES = _HEADER.size + 8 * _NUM_VALUES  # 512

_NUM_CHECKED_INTEGERS = 256  # elements read of each integer tensor: all of a smaller one, a sample of a larger one
_TOLERANCE = 1e-3  # for floats, relative to the largest sampled value of the tensor
_SMALLEST_MAGNITUDE = 1e-3  # for smaller values, the tolerance is relative to this value

_REMEDY = (
    "Every rank must pass the same global batch: give the loader the same seed on all ranks. If each rank loads its "
    "own part of the data, use split_batches=False or trainer.batches(loader)."
)


def fingerprint(roots: Mapping[str, Any], read_devices: bool = False) -> bytes:
    """Return the fingerprint of a batch, `FINGERPRINT_BYTES` bytes, whatever its structure. Local.

    It covers paths, shapes and dtypes; numbers, strings and None by their text, and lists of them by a checksum of it;
    all elements of small integer tensors and a sample of large ones by checksum; and a few elements of each tensor by
    value, so that floats can be compared with a tolerance (preprocessing may give different last bits on two machines).
    Lists of floats count as tensors.

    Args:
        roots: Trees of the batch by name; see the head of this file.
        read_devices: Also read tensors that are not on the CPU. This waits for all work queued on the device.
    """
    items = []
    checksum = 0
    values: list[float] = []
    tensors = []
    for path, leaf in _leaves(roots):
        if isinstance(leaf, Tensor):
            items.append(_description(path, leaf.dtype, leaf.shape, leaf.device.type))
            if _is_read(leaf, read_devices):
                tensors.append(leaf)
        elif isinstance(leaf, PLAIN):
            items.append(f"{path} {leaf!r}")
        elif isinstance(leaf, (list, tuple)):
            items.append(f"{path} {len(leaf)} values with checksum {zlib.crc32(repr(leaf).encode()):08x}")
        else:
            items.append(f"{path} {type(leaf).__qualname__}")
    num_samples = _samples_each(len(tensors))
    for tensor in tensors:
        values += _sample(tensor, num_samples)
        if _is_exact(tensor):
            checksum = _checksum(tensor, checksum)
    text_checksum, text = _text(tuple(items))
    return _HEADER.pack(text_checksum, checksum, text) + _packed_values(values)


def _leaves(roots: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield (path, leaf) of a batch; lists of floats, and arrays, as tensors."""
    for name, tree in roots.items():
        for path, leaf in leaves(tree, name):
            if isinstance(leaf, Tensor):
                yield path, type(leaf).__qualname__ if leaf.is_nested else leaf
            elif isinstance(leaf, np.ndarray) and leaf.dtype.kind in "biufc":
                yield path, torch.as_tensor(leaf)
            elif isinstance(leaf, (list, tuple)) and {int, float} >= (kinds := set(map(type, leaf))) and float in kinds:
                yield path, torch.tensor(leaf, dtype=torch.float64)
            else:
                yield path, leaf


# The batches of a loader have the same structure, so results that do not depend on their contents are cached.
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
    """Return None if all ranks have the batch of rank 0, else a text with the difference, the same on each rank. Local.

    Args:
        fingerprints: Fingerprints of all ranks, in rank order, made with the same `read_devices`.
        roots: This rank's batch. Only its structure is used, and only if all ranks have the same structure.
        read_devices: Value that was passed to `fingerprint`.
    """
    first = fingerprints[0]
    if all(other == first for other in fingerprints):
        return None
    headers = [_HEADER.unpack_from(one) for one in fingerprints]
    ranks = [rank for rank, header in enumerate(headers) if header[0] != headers[0][0]]
    if ranks:
        return _difference(ranks, _first_different_item(headers[0][2], headers[ranks[0]][2], ranks[0]))

    tensors = [
        (path, leaf) for path, leaf in _leaves(roots) if isinstance(leaf, Tensor) and _is_read(leaf, read_devices)
    ]
    num_samples = _samples_each(len(tensors))
    table = np.stack([np.frombuffer(one, np.float64, offset=_HEADER.size) for one in fingerprints])
    different = np.zeros(table.shape, bool)
    elements: list[tuple[str, torch.Size, int]] = []  # path, shape and position of the element in each column
    for path, tensor in tensors:
        positions = _positions(tensor.numel(), num_samples)[: _NUM_VALUES - len(elements)]
        columns = slice(len(elements), len(elements) + len(positions))
        elements += [(path, tensor.shape, position) for position in positions]
        different[:, columns] = _is_different(table[:, columns], exact=_is_exact(tensor))
    wrong: NDArray[np.bool_] = np.logical_or.reduce(different, axis=1)
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


def _samples_each(num_tensors: int) -> int:
    return max(1, _NUM_VALUES // max(1, num_tensors))


@functools.lru_cache(maxsize=64)
def _positions(num_elements: int, num_samples: int) -> list[int]:
    """Return the positions of the elements of a tensor to read, counted in row-major order; the same on all ranks.

    Random positions are used because a regular sequence can coincide with the rows of an image, and then meets only the
    borders, which look the same in many images. (RandomState draws the same numbers in every version of NumPy.)
    """
    if num_elements <= num_samples:
        return list(range(num_elements))
    positions: list[int] = np.random.RandomState(0).randint(num_elements, size=num_samples).tolist()
    return positions


def _sample(tensor: Tensor, num_samples: int) -> list[float]:
    elements, indices = _elements(tensor, num_samples)
    return [elements[index] for index in indices]


def _checksum(tensor: Tensor, start: int) -> int:
    elements, indices = _elements(tensor, _NUM_CHECKED_INTEGERS)
    if len(indices) < len(elements):
        elements = (elements._type_ * len(indices))(*[elements[index] for index in indices])
    return zlib.crc32(elements, start)


def _elements(tensor: Tensor, num_samples: int) -> tuple[Any, Sequence[int]]:
    """Return an array of ctypes or NumPy, and the indices at which it holds the sample. No other elements are read."""
    if tensor.is_cpu and tensor.dtype in _C_TYPES and tensor.is_contiguous():
        # NumPy would take 0.03 ms more in each step, because training has driven its code out of the CPU's caches.
        array_type, positions = _array_plan(tensor.dtype, tensor.numel(), num_samples)
        return array_type.from_address(tensor.data_ptr()), positions
    positions = _positions(tensor.numel(), num_samples)
    tensor = tensor.detach()
    if tensor.device.type == "cpu" and tensor.dtype in _NUMPY_DTYPES:
        elements = tensor.numpy().flat[positions]
    else:
        sample = tensor[tuple(torch.from_numpy(index) for index in np.unravel_index(positions, tensor.shape))]
        elements = (sample.abs() if sample.is_complex() else sample).double().cpu().numpy()
    return elements, range(len(elements))


_C_TYPES: dict[torch.dtype, type[ctypes._SimpleCData[Any]]] = {
    torch.bool: ctypes.c_bool,
    torch.uint8: ctypes.c_uint8,
    torch.int32: ctypes.c_int32,
    torch.int64: ctypes.c_int64,
    torch.float32: ctypes.c_float,
    torch.float64: ctypes.c_double,
}


@functools.lru_cache(maxsize=64)
def _array_plan(dtype: torch.dtype, num_elements: int, num_samples: int) -> tuple[type[ctypes.Array[Any]], list[int]]:
    return _C_TYPES[dtype] * num_elements, _positions(num_elements, num_samples)


_NUMPY_DTYPES = frozenset(
    getattr(torch, name)
    for name in "bool uint8 int8 int16 int32 int64 float16 float32 float64".split()  # NumPy has no bfloat16
)


def _is_read(tensor: Tensor, read_devices: bool) -> bool:
    return tensor.layout is torch.strided and (read_devices or tensor.device.type == "cpu")


def _is_exact(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex())


def _is_different(values: NDArray[np.float64], exact: bool) -> NDArray[np.bool_]:
    """Compare values of one tensor, a row for each rank, with the first row, rank 0's. NaN equals NaN."""
    first = values[:1]
    same: NDArray[np.bool_] = (values == first) | (np.isnan(values) & np.isnan(first))
    if exact:
        return ~same
    magnitude = np.abs(values, where=np.isfinite(values), out=np.zeros_like(values)).max(initial=_SMALLEST_MAGNITUDE)
    with np.errstate(invalid="ignore"):  # infinity minus infinity
        same = same | (np.abs(values - first) <= _TOLERANCE * magnitude)
    return ~same


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
    return f"{who} a different batch than rank 0: {what}. {_REMEDY}"
