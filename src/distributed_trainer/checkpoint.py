# SPDX-License-Identifier: Apache-2.0
"""A checkpoint on disk: a folder that is whole or not there under its name. Nothing here communicates.

    step-00001234/
        checkpoint.json              what is in it: the form of all states, and length and checksum of each other file
        rank-00000.json              of each rank: its random states
        rank-00000-1.safetensors     the tensors that the rank has written (tensor_files.py)

Ranks write their files into a hidden folder beside it. When all are on the disk, `commit` adds checkpoint.json and
renames the folder. Nothing is pickled.
"""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import math
import shutil
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .checkpoint_form import check_content, check_own, require
from .errors import CheckpointError
from .tensor_files import (
    DTYPE_NAMES,
    SUFFIX,
    Part,
    Place,
    describe_file,
    read_places,
    read_tensor,
    sync_folder,
    write_file,
)

logger = logging.getLogger("distributed_trainer")

INDEX = "checkpoint.json"
FORMAT = "distributed_trainer checkpoint 1"
_PREFIX = "step-"


def encode(value: Any, path: str, tensors: dict[str, Tensor | Part]) -> Any:
    """A state as JSON holds it. Its tensors go to `tensors`, under names made of the path.

    Raises:
        TypeError: There is something else in it than tensors, arrays, numbers, text, lists, tuples and dicts.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor | Part | np.ndarray):
        kind = "$numpy" if isinstance(value, np.ndarray) else "$tensor"
        tensor = torch.from_numpy(value) if kind == "$numpy" else value
        own = tensor.own if isinstance(tensor, Part) else tensor
        if own.layout is not torch.strided or own.dtype not in DTYPE_NAMES:
            raise TypeError(f"{path} is a tensor of {own.dtype}, {own.layout}, which a checkpoint cannot hold")
        while path in tensors:
            path += "'"
        tensors[path] = tensor
        return {kind: path}
    if isinstance(value, bytes):
        return {"$bytes": base64.b64encode(value).decode()}
    if isinstance(value, list | tuple):
        items = [encode(item, f"{path}.{number}", tensors) for number, item in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    if isinstance(value, Mapping):
        items = [(key, encode(item, f"{path}.{key}", tensors)) for key, item in value.items()]
        if isinstance(value, Counter):
            return {"$counter": items}
        is_plain = all(isinstance(key, str) and not key.startswith("$") for key, _ in items)
        return dict(items) if is_plain else {"$dict": [[encode(key, path, {}), item] for key, item in items]}
    raise TypeError(
        f"{path} is a {type(value).__name__}, which a checkpoint cannot hold: it takes tensors, arrays, numbers, text, "
        f"lists, tuples and dicts"
    )


def decode(value: Any, read: Callable[[str], Tensor]) -> Any:
    """What `encode` was given; `read` gives a tensor by its name.

    Raises:
        ValueError, TypeError, RecursionError: `encode` has not made this.
    """
    if isinstance(value, list):
        return [decode(item, read) for item in value]
    if not isinstance(value, dict):
        return value
    kind, inner = next(iter(value.items()), ("", None))
    if not kind.startswith("$"):
        return {key: decode(item, read) for key, item in value.items()}
    if kind in ("$tensor", "$numpy"):
        return read(inner) if kind == "$tensor" else read(inner).numpy()
    if kind == "$bytes":
        return base64.b64decode(inner)
    if kind == "$tuple":
        return tuple(decode(inner, read))
    require(kind in ("$dict", "$counter"), kind)
    pairs = {decode(key, read): decode(item, read) for key, item in inner}
    return pairs if kind == "$dict" else Counter(pairs)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Makes one error of whatever keeps a file from being read."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or path} cannot be read: {error.strerror or error}. Take another checkpoint."
        ) from None
    except (ValueError, LookupError, TypeError, RecursionError, EOFError):
        raise CheckpointError(
            f"{path} is damaged, or was not written by trainer.save. Take another checkpoint."
        ) from None


class Checkpoint:
    """A checkpoint that lies on disk.

    Attributes:
        folder: Its own.
        content: What checkpoint.json holds.

    Raises:
        CheckpointError: There is none, or its index is not as it was written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / INDEX
        with _reading(path):
            index = json.loads(path.read_bytes())
            form = index["format"]
            if form != FORMAT:
                raise CheckpointError(f'{path} has the format {form!r:.80}; this version reads "{FORMAT}"')
            self.content: dict[str, Any] = index["content"]
            require(index["crc32"] == _checksum(self.content), INDEX)
            check_content(self.content)
        self._places: dict[str, list[Place]] | None = None

    @property
    def order(self) -> tuple[float, int]:
        """By which checkpoints are sorted: the time, then the step."""
        return self.content["saved_at"], self.content["step"]

    def verify(self, rank: int, num_ranks: int) -> None:
        """Compares a rank's share of the files with what was written.

        Raises:
            CheckpointError: Names the file.
        """
        for name, written in list(self.content["files"].items())[rank::num_ranks]:
            path = self.folder / name
            with _reading(path):
                found = describe_file(path)
            if found["bytes"] != written["bytes"]:
                raise CheckpointError(
                    f"{path} has {found['bytes']} bytes, but was written with {written['bytes']}. Take another "
                    f"checkpoint."
                )
            if found["crc32"] != written["crc32"]:
                raise CheckpointError(f"{path} has other contents than were written. Take another checkpoint.")

    def of_rank(self, rank: int) -> dict[str, Any]:
        """What a rank has written for itself.

        Raises:
            CheckpointError: There is no such rank, or its file is damaged.
        """
        path = self.folder / rank_file(rank)
        with _reading(path):
            require(path.name in self.content["files"], path.name)
            own = json.loads(path.read_bytes())["own"]
            check_own(own)
        return own

    def state(self, name: str) -> Any:
        """The state of the model, or of the object with that name.

        Raises:
            CheckpointError: There is none, or it is damaged.
        """
        left = set(self.content["tensors"])

        def read(tensor: str) -> Tensor:
            left.remove(tensor)  # once each, so that what is read is no longer than the files
            return self._tensor(tensor)

        with _reading(self.folder / INDEX):
            return decode(self.content["states"][name]["state"], read)

    def _tensor(self, name: str) -> Tensor:
        if self._places is None:
            self._places = defaultdict(list)
            for file in sorted(name for name in self.content["files"] if name.endswith(SUFFIX)):
                with _reading(self.folder / file):
                    for key, place in read_places(self.folder / file).items():
                        self._places[key].append(place)
        about = self.content["tensors"][name]
        return read_tensor(self._places[name], about["dtype"], about["shape"])


def rank_file(rank: int) -> str:
    """Name of the file in which a rank says what it has written."""
    return f"rank-{rank:05}.json"


def temporary_folder(folder: Path, step: int, token: str) -> Path:
    """Where the ranks write, before the checkpoint is whole."""
    return folder / f".{_PREFIX}{step:08}.{token}.part"


def write_part(
    temporary: Path, rank: int, files: Mapping[str, Tensor], tensors: Mapping[str, Any], states: Any, own: Any
) -> None:
    """Writes a rank's files; the last is the one by which rank 0 knows that all are on the disk. Local.

    Args:
        temporary: Of `temporary_folder`.
        rank: This one.
        files: Contents of tensor files, by name.
        tensors: What of which tensor is in them: dtype, shape of the whole, number of elements.
        states: The form of all states, if this is the rank that writes it.
        own: What `Checkpoint.of_rank` gives.
    """
    written = {name: write_file(temporary / name, contents) for name, contents in files.items()}
    about = {"files": written, "tensors": dict(tensors), "states": states, "own": own}
    path = temporary / rank_file(rank)
    write_file(path.with_suffix(".new"), json.dumps(about).encode())
    path.with_suffix(".new").rename(path)
    sync_folder(temporary)


def commit(temporary: Path, num_ranks: int, content: dict[str, Any], keep: int) -> Path:
    """Makes a checkpoint of the files of all ranks, then removes all but the newest `keep`. Local, for rank 0.

    Raises:
        CheckpointError: Of some tensor not all was written.
    """
    files: dict[str, Any] = {}
    tensors: dict[str, Any] = {}
    num_written: Counter[str] = Counter()
    for rank in range(num_ranks):
        path = temporary / rank_file(rank)
        about = json.loads(path.read_bytes())
        files |= {**about["files"], path.name: describe_file(path)}
        for name, (dtype, shape, num_elements) in about["tensors"].items():
            tensors[name] = {"dtype": dtype, "shape": shape}
            num_written[name] += num_elements
        content |= {"states": about["states"]} if about["states"] else {}
    for name, about in tensors.items():
        if num_written[name] != math.prod(about["shape"]):
            raise CheckpointError(
                f"of {name}, {math.prod(about['shape'])} elements, the ranks have written {num_written[name]}: they "
                f"have different states. Train every optimizer on all ranks."
            )
    content |= {"world_size": num_ranks, "saved_at": time.time(), "files": files, "tensors": tensors}
    index = {"format": FORMAT, "crc32": _checksum(content), "content": content}
    write_file(temporary / INDEX, json.dumps(index, indent=1).encode())
    sync_folder(temporary)
    name = temporary.name[1:].partition(".")[0]
    number, final = 1, temporary.with_name(name)
    while final.exists():  # as after a second save at the same step
        number += 1
        final = temporary.with_name(f"{name}-{number}")
    temporary.rename(final)
    sync_folder(final.parent)
    _remove_old(final.parent, keep)
    return final


def checkpoints_in(folder: Path) -> list[Path]:
    """Checkpoints, the newest first, and what looks like one but cannot be read."""

    def order(path: Path) -> tuple[float, int]:
        try:
            return Checkpoint(path).order
        except CheckpointError:
            return path.stat().st_mtime, 0

    return sorted((path.parent for path in folder.glob(f"{_PREFIX}*/{INDEX}")), key=order, reverse=True)


def _remove_old(folder: Path, keep: int) -> None:
    """Removes older checkpoints, and what earlier runs have left unfinished."""
    num_whole = 0
    try:
        for path in checkpoints_in(folder):
            with contextlib.suppress(CheckpointError):  # whoever wrote that may want to look at it
                Checkpoint(path)
                num_whole += 1
                if num_whole > keep:
                    path.rename(path.with_name(f".{path.name}.old"))  # so that none is ever there by half
        for path in [*folder.glob(f".{_PREFIX}*.old"), *folder.glob(f".{_PREFIX}*.part")]:
            shutil.rmtree(path)
    except OSError as error:
        logger.warning("an old checkpoint cannot be removed: %s", error)


def _checksum(content: Any) -> str:
    """Of what JSON says, not how."""
    return f"{zlib.crc32(json.dumps(content, sort_keys=True, separators=(',', ':')).encode()):08x}"
