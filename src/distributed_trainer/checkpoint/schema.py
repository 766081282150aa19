# SPDX-License-Identifier: Apache-2.0
"""Check the form of a checkpoint's JSON before its content is used. Nothing here communicates.

A checksum reveals accidental damage. It does not show who wrote the file: a file that names other files outside of the
checkpoint, or a tensor of any size, may have the right checksum.
"""

from __future__ import annotations

import math
import re
from typing import Any

_FILE = re.compile(r"rank-[0-9]{5,}(\.json|-[0-9]+\.safetensors)")
_MAX_DIMS = 64  # torch allows no more
_MAX_ELEMENTS = 1 << 58  # so that a tensor's bytes can be counted in 64 bits


def require(is_so: bool, what: str) -> None:
    """Raise ValueError if `is_so` is False; `what` names the invalid part."""
    if not is_so:
        raise ValueError(f"{what} is not valid in a checkpoint")


def require_count(value: Any, what: str) -> int:
    """Return a number that counts something, 0 to 2^63 - 1; raise ValueError for any other value."""
    require(type(value) is int and 0 <= value < 1 << 63, what)
    count: int = value
    return count


def require_shape(value: Any, what: str) -> list[int]:
    """Return the shape of a tensor, or a position in it; raise ValueError for any other value."""
    require(isinstance(value, list) and len(value) <= _MAX_DIMS, what)
    sizes = [require_count(size, what) for size in value]
    require(math.prod(max(size, 1) for size in sizes) < _MAX_ELEMENTS, what)
    return sizes


def check_content(content: Any) -> None:
    """Raise ValueError, KeyError or TypeError if this is not the content of a checkpoint.json."""
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
        require(isinstance(about.get("frozen", ""), str), name)


def check_own(own: Any) -> None:
    """Raise ValueError, KeyError or TypeError if these are not the data that a rank writes for itself."""
    require_count(own["step"], "step")
    require(isinstance(own["progress"], list) and len(own["progress"]) == 3, "progress")
    for number in own["progress"]:
        require_count(number, "progress")
    require_count(own.get("seed", 0), "seed")
    scale, num_finite = own.get("loss_scale", (1.0, 0))
    require(type(scale) is float and math.isfinite(scale) and scale >= 1, "loss_scale")
    require_count(num_finite, "loss_scale")
    position = own["position"]
    require(position["epoch"] is None or type(position["epoch"]) is int, "position")
    require(isinstance(position["loaders"], list), "position")
    for loader in position["loaders"]:
        if loader is not None:
            require(isinstance(loader, dict), "position")
            keys = {"epoch", "num_read", "seed"}
            require(keys <= set(loader) <= keys | {"checksum", "num_ranks", "num_workers"}, "position")
            for number in loader.values():
                require_count(number, "position")
    require(isinstance(own["random_states"], list), "random_states")


def _items(value: Any, what: str) -> list[tuple[str, Any]]:
    require(isinstance(value, dict), what)
    return list(value.items())
