# SPDX-License-Identifier: Apache-2.0
"""Write a model to one safetensors file, for programs that do not train."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..backend.gather import call_on_rank_0
from .safetensors import DTYPE_NAMES, contents_of, pieces_of, sync_folder, write_file


def export(path: Path, model: nn.Module, group: Any) -> None:
    """Write the model's `state_dict()` on rank 0. Collective, blocks.

    Args:
        path: Path of the file, which is replaced if it exists.
        model: The model.
        group: Process group of the ranks.

    Raises:
        ValueError: Something in the `state_dict()` cannot be in such a file. The same on every rank.
        OSError: The file cannot be written. The same on every rank.
    """
    call_on_rank_0(group, lambda: _write(path, model), keep=(ValueError, OSError))


def _write(path: Path, model: nn.Module) -> None:
    path = Path(os.path.realpath(path))  # a link stays one
    path.parent.stat()  # raises an error that names the folder
    if path.exists() and not path.is_file():
        raise FileExistsError(errno.EEXIST, "is no file that could be replaced", str(path))
    contents = contents_of([piece for name, tensor in _tensors(model) for piece in pieces_of(name, tensor)])
    # Readers see the old file or the new one.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
        write_file(Path(folder) / path.name, contents)
        os.replace(Path(folder) / path.name, path)
    sync_folder(path.parent)


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Return names and tensors of the `state_dict()`; those that share all their memory once, as its form demands."""
    found: dict[Any, tuple[str, Tensor]] = {}
    for name, value in model.state_dict().items():
        is_plain = isinstance(value, Tensor) and value.layout == torch.strided and value.dtype in DTYPE_NAMES
        if not is_plain:
            what = f"a tensor of {value.dtype}, {value.layout}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"{name!r} in the model's state_dict() is {what}, which a safetensors file cannot hold. Write the "
                f"model with `if trainer.is_main: torch.save(model.state_dict(), path)`."
            )
        memory = (value.data_ptr(), value.shape, value.stride(), value.dtype) if value.numel() else name
        found.setdefault(memory, (name, value))
    return list(found.values())
