# SPDX-License-Identifier: Apache-2.0
"""Batches as trees: nested tuples, lists, mappings and dataclasses, with tensors and other values as leaves.

This module walks and rebuilds trees, moves them to a device and calls models with them. `samples.py` says which of
their values are samples. Nothing here communicates.

Functions that name values in messages take `roots`: the batch's trees by name, such as
`{"inputs": inputs, "targets": targets}`. A value's path then reads `inputs["ids"]`, `inputs[0]`, `targets`.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

PLAIN = (str, bytes, bool, int, float, complex, type(None))
"""Types of values that hold no tensors and no other values."""

_PLAIN_TYPES = frozenset(PLAIN)

_SEARCH_DEPTH = 4  # levels of attributes in which `children_of_object` looks for tensors


def is_sequence(tree: Any) -> bool:
    """Return whether a value is a tuple or list whose entries have no names."""
    return isinstance(tree, (tuple, list)) and not hasattr(tree, "_fields")


def is_plain_sequence(tree: Any) -> bool:
    """Return whether a value is a tuple or list of numbers, strings and None alone, with at least one."""
    return type(tree) in (list, tuple) and bool(tree) and _PLAIN_TYPES.issuperset(map(type, tree))


def values_of(tree: Any) -> list[Any] | None:
    """Return the direct children of a structure; None for a leaf.

    Structures are mappings, tuples, lists, NamedTuples and dataclasses.
    """
    if isinstance(tree, Mapping):
        return list(tree.values())
    if isinstance(tree, (tuple, list)):
        return None if isinstance(tree, PackedSequence) else list(tree)
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return [getattr(tree, field.name) for field in dataclasses.fields(tree)]
    return None


def children(tree: Any, path: str) -> list[tuple[str, Any]] | None:
    """Return (path, value) of each direct child of a structure; None for a leaf."""
    values = values_of(tree)
    if values is None:
        return None
    if isinstance(tree, Mapping):
        names = [f'["{key}"]' if isinstance(key, str) else f"[{key!r}]" for key in tree]
    elif is_sequence(tree):
        names = [f"[{index}]" for index in range(len(values))]
    else:
        names = [
            f".{name}" for name in getattr(tree, "_fields", None) or [one.name for one in dataclasses.fields(tree)]
        ]
    return [(path + name, value) for name, value in zip(names, values, strict=True)]


def rebuilt(tree: Any, values: list[Any]) -> Any:
    """Return a structure of the same type with other children, in the order of `children`.

    A mapping keeps its type if it can be copied and changed (or made from a dict). Otherwise it becomes a dict.
    """
    if isinstance(tree, Mapping):
        changed = dict(zip(tree, values, strict=True))
        if type(tree) is dict:
            return changed
        try:
            if not isinstance(tree, MutableMapping):
                make: Any = type(tree)
                return make(changed)
            clone: Any = copy.copy(tree)  # keeps other attributes of the object, such as those of a tokenizer's batch
            for key, value in changed.items():
                clone[key] = value
            return clone
        except TypeError:
            return changed
    if isinstance(tree, (tuple, list)):
        return type(tree)(*values) if hasattr(tree, "_fields") else type(tree)(values)
    clone = copy.copy(tree)
    for field, value in zip(dataclasses.fields(tree), values, strict=True):
        object.__setattr__(clone, field.name, value)  # dataclasses may be frozen
    return clone


def leaves(tree: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield (path, leaf) of every tensor and every other value in a nested structure.

    A list or tuple of plain values (numbers, strings, None) is one leaf. Objects that hold tensors are structures here.
    """
    if isinstance(tree, Tensor):
        yield path, tree
        return
    if isinstance(tree, PLAIN) or is_plain_sequence(tree):
        yield path, tree
        return
    found = children(tree, path)
    if found is None:
        found = children_of_object(tree, path)
    if found is None:
        yield path, tree
        return
    for child_path, child in found:
        yield from leaves(child, child_path)


def children_of_object(tree: Any, path: str) -> list[tuple[str, Any]] | None:
    """Return (path, value) of those attributes of an object that hold tensors; None if no attribute does."""
    found = [(f"{path}.{name}", value) for name, value in _attributes(tree) if holds_tensors(value, _SEARCH_DEPTH)]
    return found or None


def holds_tensors(tree: Any, depth: int = _SEARCH_DEPTH) -> bool:
    """Return whether a value is a tensor, looks like an array, or holds either in its elements or attributes."""
    if isinstance(tree, Tensor):
        return True
    if isinstance(tree, (*PLAIN, type, ModuleType)) or depth < 0:
        return False
    values = values_of(tree)
    if values is None:
        if hasattr(tree, "shape") or hasattr(tree, "to"):
            return True
        values = [value for _, value in _attributes(tree)]
    return any(holds_tensors(value, depth - 1) for value in values)


def _attributes(tree: Any) -> list[tuple[str, Any]]:
    if isinstance(tree, (*PLAIN, type, ModuleType, nn.Module)):
        return []
    if isinstance(tree, PackedSequence):
        return list(zip(tree._fields, tree, strict=True))
    names = [name for kind in type(tree).__mro__ for name in _slots(kind) if hasattr(tree, name)]
    return [*getattr(tree, "__dict__", {}).items(), *((name, getattr(tree, name)) for name in names)]


def _slots(kind: type) -> list[str]:
    slots = kind.__dict__.get("__slots__", ())
    return [name for name in ([slots] if isinstance(slots, str) else slots) if not name.startswith("__")]


def cut_tensor(tensor: Tensor, dim: int, start: int, stop: int) -> Tensor:
    """Return a view of a tensor with elements start to stop of a dimension.

    The part of a tensor that requires a gradient, without a graph, requires one by itself: `.grad` of the whole tensor
    stays None.
    """
    part = tensor[start:stop] if dim == 0 else tensor[(slice(None),) * dim + (slice(start, stop),)]
    # A model may differentiate by its inputs. But `.grad` of the whole tensor would hold a part's gradient only.
    is_input = tensor.requires_grad and tensor.is_leaf and not isinstance(tensor, nn.Parameter)
    return part.detach().requires_grad_() if is_input else part


def to_device(batch: Any, device: torch.device | str) -> Any:
    """Return the same structure with its tensors, and objects that have `to`, on the device.

    Copies of tensors to an accelerator are not waited for.
    """
    # Copies to the CPU are waited for: otherwise the tensors could be read before they are written.
    non_blocking = torch.device(device).type != "cpu"
    return map_tensors(
        lambda tensor: tensor.to(device, non_blocking=non_blocking), batch, lambda value: value.to(device)
    )


def call_model(model: nn.Module, inputs: Any) -> Any:
    """Call the model: a mapping becomes keyword arguments, a tuple or list positional ones, all else one argument."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, (tuple, list)) and not isinstance(inputs, PackedSequence):
        return model(*inputs)
    return model(inputs)


def map_tensors(
    change: Callable[[Tensor], Tensor], tree: Any, change_object: Callable[[Any], Any] = lambda value: value
) -> Any:
    """Return the same structure with each tensor replaced by `change(tensor)`.

    Args:
        change: Function of a tensor.
        tree: The structure.
        change_object: Function of a leaf that is no tensor but has a method `to`, such as a batch of graphs. The
            default returns the leaf.
    """
    if isinstance(tree, Tensor):
        return change(tree)
    if type(tree) in _PLAIN_TYPES or is_plain_sequence(tree):
        return tree
    values = values_of(tree)
    if values is None:
        return change_object(tree) if hasattr(tree, "to") and not isinstance(tree, type) else tree
    return rebuilt(tree, [map_tensors(change, value, change_object) for value in values])


def tensors(tree: Any) -> list[Tensor]:
    """Return the tensors of a nested structure."""
    found: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(keep, tree)
    return found
