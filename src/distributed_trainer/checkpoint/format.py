# SPDX-License-Identifier: Apache-2.0
"""A checkpoint on disk: a folder that appears under its name when it is complete. Nothing here communicates.

    step-00001234/
        checkpoint.json              the form of all states, and length and checksum of each other file
        rank-00000.json              the rank's random states, and what it has written; one file for each rank
        rank-00000-1.safetensors     the tensors that the rank has written (safetensors.py)

Ranks write their files into a hidden folder beside it. When all files are on the disk, `commit` adds checkpoint.json
and renames the folder. Nothing is pickled.
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

from ..errors import CheckpointError
from ..gradients.sharded_optimizer import Part
from .safetensors import (
    DTYPE_NAMES,
    SUFFIX,
    Place,
    describe_file,
    read_places,
    read_tensor,
    sync_folder,
    write_file,
)
from .schema import check_content, check_own, require

logger = logging.getLogger("distributed_trainer")

INDEX = "checkpoint.json"
VERSION = 1
"""Version of the format. A change that older code cannot read raises it by one."""
_FORMAT = "distributed_trainer checkpoint"
_PREFIX = "step-"


def encode(value: Any, path: str, tensors: dict[str, Tensor | Part]) -> Any:
    """Convert a state to a form that JSON can hold. Local.

    Args:
        value: The state: tensors, arrays, numbers, text, lists, tuples and dicts, nested in any way.
        path: Name of the state; a tensor's name is the path to it.
        tensors: Gets the state's tensors, by their names.

    Returns:
        The form, with names in place of tensors.

    Raises:
        TypeError: The state holds something else.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor | Part | np.ndarray):
        kind = "$numpy" if isinstance(value, np.ndarray) else "$tensor"
        tensor = torch.from_numpy(value) if isinstance(value, np.ndarray) else value
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
    """Convert the form that `encode` has made back to a state. Local.

    Args:
        value: The form.
        read: Returns a tensor by its name.

    Raises:
        ValueError, TypeError, RecursionError: The form was not made by `encode`.
    """
    if isinstance(value, list):
        return [decode(item, read) for item in value]
    if not isinstance(value, dict):
        return value
    first: tuple[str, Any] = next(iter(value.items()), ("", None))
    kind, inner = first
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
    """Turn any error that keeps a file from being read into a CheckpointError."""
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
    """A checkpoint on disk. Making a Checkpoint reads its index.

    Args:
        folder: The checkpoint's folder.

    Attributes:
        folder: The checkpoint's folder.
        content: Content of checkpoint.json.

    Raises:
        CheckpointError: There is no checkpoint, or its index is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / INDEX
        with _reading(path):
            index = json.loads(path.read_bytes())
            _check_format(path, index["format"])
            self.content: dict[str, Any] = index["content"]
            require(index["crc32"] == _checksum(self.content), INDEX)
            check_content(self.content)
        self._places: dict[str, list[Place]] | None = None

    @property
    def order(self) -> tuple[float, int]:
        """Key by which checkpoints are sorted: the time of the save in seconds since the epoch, then the step."""
        return self.content["saved_at"], self.content["step"]

    def verify(self, rank: int, num_ranks: int) -> None:
        """Compare a rank's share of the files with the lengths and checksums in the index. Local.

        Args:
            rank: This rank, which reads every `num_ranks`-th file from number `rank` on.
            num_ranks: Number of ranks that share the files.

        Raises:
            CheckpointError: A file is missing or differs; the message names it.
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
        """Return the data that a rank has written for itself, such as its random states. Local.

        Raises:
            CheckpointError: There is no such rank, or its file is damaged.
        """
        path = self.folder / rank_file(rank)
        with _reading(path):
            require(path.name in self.content["files"], path.name)
            own: dict[str, Any] = json.loads(path.read_bytes())["own"]
            check_own(own)
        return own

    def state(self, name: str) -> Any:
        """Return the state of the model, or of the object with that name. Local.

        Raises:
            CheckpointError: There is no such state, or it is damaged.
        """
        left = set(self.content["tensors"])

        def read(tensor: str) -> Tensor:
            left.remove(tensor)  # once each, so that the state takes no more memory than the files
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


def _check_format(path: Path, form: Any) -> None:
    name, _, version = form.rpartition(" ") if isinstance(form, str) else ("", "", "")
    if name != _FORMAT or not version.isdecimal():
        raise CheckpointError(f"{path} is not a checkpoint of distributed_trainer: its format is {form!r:.80}")
    if int(version) > VERSION:
        raise CheckpointError(
            f"{path} has version {version} of the format; this version of distributed_trainer reads version {VERSION}. "
            f"Install the one that wrote it, or a newer one."
        )


def rank_file(rank: int) -> str:
    """Return the name of the file in which a rank describes the files that it has written."""
    return f"rank-{rank:05}.json"


def temporary_folder(folder: Path, step: int, token: str) -> Path:
    """Return the path of the folder into which ranks write, before the checkpoint is complete."""
    return folder / f".{_PREFIX}{step:08}.{token}.part"


def write_part(
    temporary: Path, rank: int, files: Mapping[str, Tensor], tensors: Mapping[str, Any], states: Any, own: Any
) -> None:
    """Write a rank's files; the last one shows rank 0 that the others are on the disk. Local.

    Rank 0 may rename the folder as soon as it sees the last file, so nothing is done after it. The file's name reaches
    the disk with `commit`.

    Args:
        temporary: Folder to write to (`temporary_folder`).
        rank: This rank.
        files: Contents of tensor files, by name.
        tensors: The tensors in the files, by name: dtype, shape of the whole tensor, number of elements in the files.
        states: The form of all states, if this is the rank that writes it; else None.
        own: The data for `Checkpoint.of_rank`.
    """
    written = {name: write_file(temporary / name, contents) for name, contents in files.items()}
    about = {"files": written, "tensors": dict(tensors), "states": states, "own": own}
    path = temporary / rank_file(rank)
    write_file(path.with_suffix(".new"), json.dumps(about).encode())
    sync_folder(temporary)
    path.with_suffix(".new").rename(path)


def commit(temporary: Path, num_ranks: int, content: dict[str, Any], keep: int) -> Path:
    """Complete a checkpoint from the files of all ranks, then remove all but the newest `keep`. Local, for rank 0.

    Args:
        temporary: Folder to which the ranks have written.
        num_ranks: Number of ranks.
        content: Content of checkpoint.json as far as the caller knows it; completed here.
        keep: Number of checkpoints to leave.

    Returns:
        Path of the checkpoint.

    Raises:
        CheckpointError: Some elements of a tensor were not written.
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
                f"the ranks have written {num_written[name]} of the {math.prod(about['shape'])} elements of {name}: "
                f"they have different states. Train every optimizer on all ranks."
            )
    content |= {"world_size": num_ranks, "saved_at": time.time(), "files": files, "tensors": tensors}
    index = {"format": f"{_FORMAT} {VERSION}", "crc32": _checksum(content), "content": content}
    write_file(temporary / INDEX, json.dumps(index, indent=1).encode())
    sync_folder(temporary)
    name = temporary.name[1:].partition(".")[0]
    number, final = 1, temporary.with_name(name)
    while final.exists():  # such as after a second save at the same step
        number += 1
        final = temporary.with_name(f"{name}-{number}")
    temporary.rename(final)
    sync_folder(final.parent)
    _remove_old(final.parent, keep)
    return final


def checkpoints_in(folder: Path) -> list[Path]:
    """Return paths of the checkpoints in a folder, the newest first. Local.

    Folders that look like a checkpoint but cannot be read are among them.
    """

    def order(path: Path) -> tuple[float, int]:
        try:
            return Checkpoint(path).order
        except CheckpointError:
            return path.stat().st_mtime, 0

    return sorted((path.parent for path in folder.glob(f"{_PREFIX}*/{INDEX}")), key=order, reverse=True)


def _remove_old(folder: Path, keep: int) -> None:
    """Remove older checkpoints, and unfinished folders of earlier runs."""
    num_whole = 0
    try:
        for path in checkpoints_in(folder):
            with contextlib.suppress(CheckpointError):  # damaged ones stay: their owner may want to look at them
                Checkpoint(path)
                num_whole += 1
                if num_whole > keep:
                    path.rename(path.with_name(f".{path.name}.old"))  # so that nobody sees it half removed
        for path in [*folder.glob(f".{_PREFIX}*.old"), *folder.glob(f".{_PREFIX}*.part")]:
            shutil.rmtree(path)
    except OSError as error:
        logger.warning("an old checkpoint cannot be removed: %s", error)


def _checksum(content: Any) -> str:
    """Compute a checksum of a JSON value, independent of how the text is formatted."""
    return f"{zlib.crc32(json.dumps(content, sort_keys=True, separators=(',', ':')).encode()):08x}"
