# SPDX-License-Identifier: Apache-2.0
"""Tensors of a checkpoint in files, in the form of torch.distributed.checkpoint's HuggingFaceStorageWriter.

The form is safetensors: 8 bytes with the length of a JSON header, the header, the tensors. The header also says where
in the whole tensor each piece begins. HuggingFaceStorageReader reads these files; `safetensors.torch.load_file` reads
tensors that were not cut. The files are written here, not by that writer: a file is laid out in memory as it will be on
disk, so that a step waits for one copy only, and its checksum is computed as it is written.
"""

from __future__ import annotations

import heapq
import json
import math
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..gradients.sharded_optimizer import Part
from .schema import require, require_count, require_shape

SUFFIX = ".safetensors"
_DTYPES = {
    **{"BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "U16": torch.uint16},
    **{"I32": torch.int32, "U32": torch.uint32, "I64": torch.int64, "U64": torch.uint64, "F16": torch.float16},
    **{"BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "C64": torch.complex64},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
}
DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_BLOCK_BYTES = 1 << 24  # most bytes of one read or write


@dataclass(frozen=True, eq=False)
class Piece:
    """A block of a tensor that a file holds: a part of the tensor, or all of it."""

    name: str
    """Name of the tensor."""
    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    offsets: tuple[int, ...]
    """Index of the block's first element in the whole tensor, in each dimension."""
    tensor: Tensor
    """The block."""


def pieces_of(name: str, value: Tensor | Part) -> list[Piece]:
    """Cut a part of a tensor into blocks, the only form that a file can hold; a whole tensor is one block. Local.

    Args:
        name: Name of the tensor.
        value: The tensor, or this rank's part of it.

    Returns:
        The blocks: views of `value`, not copies.
    """
    if isinstance(value, Tensor):
        return [Piece(name, tuple(value.shape), (0,) * value.dim(), value.detach())]
    shape, strides = value.like.shape, value.like.stride()
    if not value.like.numel():
        return [Piece(name, tuple(shape), (0,) * len(shape), value.own.detach().view(shape))]
    order = sorted(range(len(shape)), key=lambda dim: -strides[dim])  # slowest first
    places = [order.index(dim) for dim in range(len(shape))]
    pieces, position = [], 0
    for offsets, sizes in _blocks([shape[dim] for dim in order], value.start, value.start + value.own.numel()):
        length = math.prod(sizes)
        block = value.own[position : position + length].detach().view(sizes).permute(places)
        pieces.append(Piece(name, tuple(shape), tuple(offsets[place] for place in places), block))
        position += length
    return pieces


def _blocks(shape: Sequence[int], start: int, stop: int) -> Iterator[tuple[list[int], list[int]]]:
    """Yield offsets and sizes of the blocks that make up the elements `start` to `stop` of a tensor.

    Elements are numbered row by row, and the blocks follow in this order.
    """
    if start == stop:
        return
    if len(shape) <= 1:
        yield [start] * len(shape), [stop - start] * len(shape)
        return
    row = math.prod(shape[1:])
    while start < stop:
        first, within = divmod(start, row)
        num_rows = (stop - start) // row if within == 0 else 0
        if num_rows:
            yield [first, *(0 for _ in shape[1:])], [num_rows, *shape[1:]]
            start += num_rows * row
        else:
            end = min(stop, (first + 1) * row)
            for offsets, sizes in _blocks(shape[1:], within, within + end - start):
                yield [first, *offsets], [1, *sizes]
            start = end


def divide(num_bytes: dict[str, int], num_ranks: int) -> dict[str, int]:
    """Divide tensors among the ranks so that all write about as many bytes. Local; the same on every rank.

    The largest tensor is assigned first, each to the rank that has least.

    Args:
        num_bytes: Bytes of each tensor, by name.
        num_ranks: Number of ranks.

    Returns:
        The rank that writes each tensor, by name.
    """
    loads = [(0, rank) for rank in range(num_ranks)]
    owners = {}
    for name, length in sorted(num_bytes.items(), key=lambda item: (-item[1], item[0])):
        load, rank = heapq.heappop(loads)
        owners[name] = rank
        heapq.heappush(loads, (load + length, rank))
    return owners


def copy_to_files(pieces: Iterable[Piece], prefix: str) -> dict[str, Tensor]:
    """Copy pieces into memory in the form that the files will have. Local.

    Args:
        pieces: The pieces.
        prefix: Beginning of the files' names.

    Returns:
        The contents of each file, by its name. There are several files if a tensor has several pieces, since a file
        holds each name once.
    """
    files: list[dict[str, Piece]] = []
    for piece in pieces:
        file = next((file for file in files if piece.name not in file), None)
        if file is None:
            files.append(file := {})
        file[piece.name] = piece
    return {f"{prefix}-{number}{SUFFIX}": _with_offsets(file.values()) for number, file in enumerate(files, 1)}


def _with_offsets(pieces: Iterable[Piece]) -> Tensor:
    offsets = {piece.name: {"saved_offsets": piece.offsets} for piece in pieces}
    return contents_of(pieces, DCP_SHARDING_INFO=json.dumps(offsets), DCP_VERSION="1.0")


def contents_of(pieces: Iterable[Piece], **metadata: str) -> Tensor:
    """Copy pieces of different tensors into memory in the form of one file. Local.

    Args:
        pieces: The pieces.
        metadata: Texts for the header, by name.

    Returns:
        The bytes of the file, 1-dimensional, uint8.
    """
    # The largest elements first: then all are aligned without gaps. (The form does not allow gaps.)
    pieces = sorted(pieces, key=lambda piece: -piece.tensor.element_size())
    header: dict[str, Any] = {"__metadata__": {**metadata, "format": "pt"}}
    end = 0
    for piece in pieces:
        begin, end = end, end + piece.tensor.numel() * piece.tensor.element_size()
        dtype, shape = DTYPE_NAMES[piece.tensor.dtype], list(piece.tensor.shape)
        header[piece.name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    contents = torch.empty(8 + len(text) + end, dtype=torch.uint8)
    contents[: 8 + len(text)] = torch.frombuffer(bytearray(len(text).to_bytes(8, "little") + text), dtype=torch.uint8)
    position = 8 + len(text)
    for piece in pieces:
        length = piece.tensor.numel() * piece.tensor.element_size()
        target = contents[position : position + length].view(piece.tensor.dtype).view(piece.tensor.shape)
        target.copy_(piece.tensor)
        position += length
    return contents


def write_file(path: Path, contents: Tensor | bytes) -> dict[str, Any]:
    """Write a new file and wait until it is on the disk. Local.

    Returns:
        The file's length in bytes and its CRC-32.

    Raises:
        OSError: The file exists, or cannot be written.
    """
    view = contents.numpy().data if isinstance(contents, Tensor) else memoryview(contents)
    checksum = 0
    with open(path, "xb", buffering=0) as file:
        for start in range(0, len(view), _BLOCK_BYTES):
            block = view[start : start + _BLOCK_BYTES]
            checksum = zlib.crc32(block, checksum)
            while len(block):
                block = block[file.write(block) :]
        os.fsync(file.fileno())
    return {"bytes": len(view), "crc32": checksum}


def sync_folder(path: Path) -> None:
    """Wait until the names in a folder are on the disk. Local."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def describe_file(path: Path) -> dict[str, Any]:
    """Measure the length and checksum of a file. Local.

    Returns:
        The file's length in bytes and its CRC-32, as from `write_file`.
    """
    checksum = num_bytes = 0
    with open(path, "rb", buffering=0) as file:
        while block := file.read(_BLOCK_BYTES):
            checksum = zlib.crc32(block, checksum)
            num_bytes += len(block)
    return {"bytes": num_bytes, "crc32": checksum}


@dataclass(frozen=True)
class Place:
    """Position of a piece of a tensor on disk."""

    path: Path
    """The file."""
    position: int
    """Byte in the file at which the piece begins."""
    dtype: torch.dtype
    offsets: list[int]
    """Index of the piece's first element in the whole tensor, in each dimension; not checked yet."""
    sizes: list[int]
    """Shape of the piece."""


def read_places(path: Path) -> dict[str, Place]:
    """Read the header of a file; return the places of its pieces, by tensor name. Local.

    Raises:
        OSError: The file cannot be read.
        ValueError, LookupError, TypeError, RecursionError: The file is not in the form that `copy_to_files` makes.
    """
    num_bytes = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        require(8 + length <= num_bytes, "the length of the header")
        header = json.loads(file.read(length))
    require(isinstance(header, dict), "the header")
    metadata = header.pop("__metadata__")
    offsets = json.loads(metadata["DCP_SHARDING_INFO"])
    places = {}
    runs = []
    for name, about in header.items():
        begin, end = (require_count(offset, name) for offset in about["data_offsets"])
        dtype, sizes = _DTYPES[about["dtype"]], require_shape(about["shape"], name)
        require(end - begin == math.prod(sizes) * dtype.itemsize, name)
        places[name] = Place(path, 8 + length + begin, dtype, offsets[name]["saved_offsets"], sizes)
        runs.append((begin, end))
    # Pieces must follow one another: if they overlapped, a short file could hold many long tensors.
    last = 8 + length
    for begin, end in sorted(runs):
        require(8 + length + begin == last, "a tensor's place")
        last = 8 + length + end
    require(last == num_bytes, "the length")
    return places


def read_tensor(places: Sequence[Place], dtype: str, shape: list[int]) -> Tensor:
    """Read a tensor from all its pieces. Local.

    Args:
        places: Places of the pieces.
        dtype: Name of the tensor's dtype.
        shape: Shape of the whole tensor.

    Raises:
        OSError: A piece cannot be read.
        ValueError, TypeError, EOFError: The pieces are not pieces of this tensor, or not all of them.
    """
    for place in places:
        require(place.dtype == _DTYPES.get(dtype) and len(place.sizes) == len(shape), "a piece")
        require(len(require_shape(place.offsets, "a piece")) == len(shape), "a piece")
        ends = [offset + size for offset, size in zip(place.offsets, place.sizes, strict=True)]
        require(all(end <= size for end, size in zip(ends, shape, strict=True)), "a piece")
    require(sum(math.prod(place.sizes) for place in places) == math.prod(shape), "the number of elements")
    if len(places) == 1:
        require(places[0].sizes == shape, "a piece")
        return _read_piece(places[0])
    whole = torch.empty(shape, dtype=_DTYPES[dtype])
    is_read = torch.zeros(shape, dtype=torch.bool)
    for place in places:
        block, is_block_read = whole, is_read
        for dim, (offset, size) in enumerate(zip(place.offsets, place.sizes, strict=True)):
            block, is_block_read = block.narrow(dim, offset, size), is_block_read.narrow(dim, offset, size)
        require(not is_block_read.any(), "a piece")
        block.copy_(_read_piece(place))
        is_block_read.fill_(True)
    return whole


def _read_piece(place: Place) -> Tensor:
    tensor = torch.empty(place.sizes, dtype=place.dtype)
    if tensor.numel():
        view = tensor.view(-1).view(torch.uint8).numpy().data
        with open(place.path, "rb", buffering=0) as file:
            file.seek(place.position)
            while len(view):
                num_read = file.readinto(view)
                if not num_read:
                    raise EOFError(f"{place.path} has become shorter")
                view = view[num_read:]
    return tensor
