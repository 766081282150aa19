# SPDX-License-Identifier: Apache-2.0
"""The form of a checkpoint's JSON, looked at before anything is done with what it says. Nothing here communicates.

A checksum tells of what has changed by itself. It does not tell who wrote it: a file that names others outside of the
checkpoint, or a tensor of any size, may have the right one.
"""

from __future__ import annotations

import math
import re
from typing import Any

_FILE = re.compile(r"rank-[0-9]{5,}(\.json|-[0-9]+\.safetensors)")
_MAX_DIMS = 64  # what torch takes
_MAX_ELEMENTS = 1 << 58  # so that bytes are numbers of 64 bits


def require(is_so: bool, what: str) -> None:
    """Raises ValueError if something is not as it is written."""
    if not is_so:
        raise ValueError(f"{what} is not as it is written")


def require_count(value: Any, what: str) -> int:
    """Takes a number that counts something; raises ValueError for any other."""
    require(type(value) is int and 0 <= value < 1 << 63, what)
    return value


def require_shape(value: Any, what: str) -> list[int]:
    """Takes the shape of a tensor, or a place in one; raises ValueError for what is none."""
    require(isinstance(value, list) and len(value) <= _MAX_DIMS, what)
    sizes = [require_count(size, what) for size in value]
    require(math.prod(max(size, 1) for size in sizes) < _MAX_ELEMENTS, what)
    return sizes


def check_content(content: Any) -> None:
    """Raises ValueError, KeyError or TypeError if this is not the content of a checkpoint.json."""
    require_count(content["step"], "step")
    require_count(content["world_size"], "world_size")
    saved_at = content["saved_at"]
    require(type(saved_at) in (int, float) and math.isfinite(saved_at), "saved_at")
    for name, about in _items(content["files"], "files"):
        require(_FILE.fullmatch(name) is not None, "the name of a file")
        require_count(about["bytes"], name)
        require_count(about["crc32"], name)
    for name, about in _items(content["tensors"], "tensors"):
        require(isinstance(about["dtype"], str), name)
        require_shape(about["shape"], name)
    for name, about in _items(content["states"], "states"):
        require(isinstance(about["type"], str) and "state" in about, name)


def check_own(own: Any) -> None:
    """Raises ValueError, KeyError or TypeError if this is not what a rank has written for itself."""
    require_count(own["step"], "step")
    require(isinstance(own["progress"], list) and len(own["progress"]) == 3, "progress")
    for number in own["progress"]:
        require_count(number, "progress")
    position = own["position"]
    require(position["epoch"] is None or type(position["epoch"]) is int, "position")
    require(isinstance(position["loaders"], list), "position")
    for loader in position["loaders"]:
        if loader is not None:
            require(isinstance(loader, dict) and set(loader) == {"epoch", "num_read", "seed"}, "position")
            for number in loader.values():
                require_count(number, "position")
    require(isinstance(own["random_states"], list), "random_states")


def _items(value: Any, what: str) -> list[tuple[str, Any]]:
    require(isinstance(value, dict), what)
    return list(value.items())
