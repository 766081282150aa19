# SPDX-License-Identifier: Apache-2.0
"""Samples of a batch: which of its values they are, their number, and parts of the batch. Nothing here communicates.

A tensor's samples are counted by its first dimension (or by `batch_dim`). Mappings, NamedTuples and dataclasses are
structures: their values are cut one by one. A tuple or list is one of two things:

- A *structure*, whose tensors have as many samples as the batch.
- A *list of samples*, with as many entries as the batch has samples: numbers, strings, dicts, tensors of any shape.

The tuple or list of all inputs is always a structure, since its entries are the model's arguments. A list of dicts is
always a list of samples. Elsewhere the sizes decide: the number of samples is the one number that fits all values of
the batch. Where both readings fit, a list whose entries differ in kind (dtype, number of dimensions, type) is a
structure. Otherwise the reading of an earlier batch holds, or a list of dicts beside it makes it a list of samples,
too. If neither is there, the batch is refused.

A value outside of lists that is no tensor (a number, a string, None) is shared by all samples, and is not cut. Objects
that hold tensors are refused. The user's `split` function takes the place of all these rules.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .batch import PLAIN, children, cut_tensor, holds_tensors, is_plain_sequence, is_sequence, rebuilt, values_of

SplitFunction = Callable[[Any, int, int | None], tuple[Any, int]]
"""Called with a batch, the first sample of a part, and one past its last (None: to the end). Returns the part, and the
number of samples in it."""

_OWN_SPLIT = "or pass split= to create_distributed_trainer (docs/training.md)"


class NoSamples(list[Any]):
    """An empty list of samples that remembers one sample, for a dummy.

    Attributes:
        sample: A list (or tuple) with one sample.
    """

    def __init__(self, sample: Any) -> None:
        super().__init__()
        self.sample = sample


class SampleRule:
    """Rule by which batches are counted and cut: the one at the head of this file, or the user's.

    Args:
        batch_dim: Dimension that counts the samples, in tensors with more than that many dimensions; in others it is
            the last one.
        split: The user's function; None for the rule of this file.
    """

    def __init__(self, batch_dim: int = 0, split: SplitFunction | None = None) -> None:
        self.batch_dim, self.split = batch_dim, split
        self._known: dict[str, bool] = {}  # by path: whether a list of earlier batches was a list of samples

    # ---- the number of samples

    def count(self, roots: Mapping[str, Any]) -> int:
        """Return the number of samples of a batch.

        Raises:
            ValueError: No number fits all values (all are listed), or more than one does; a tensor has no dimension; or
                there is nothing to count.
            TypeError: A value cannot be cut, or the user's function does not return what it should.
        """
        if self.split is not None:
            return self._split(roots, 0, None)[1]
        size = self._size_of_tensors(roots)
        if size is not None:
            return size
        possible = list(self._possible(roots))
        if not possible:
            raise ValueError(f"{' and '.join(roots)} contain no tensor, so the batch has no size: pass at least one.")
        fits = set.intersection(*possible)
        if not fits:
            raise ValueError(self._different_sizes(roots))
        if len(fits) > 1:
            numbers = " or ".join(map(str, sorted(fits)))
            path = next(path for path, tree, sizes in self._sequences(roots) if fits <= sizes)
            raise ValueError(f"the batch may have {numbers} samples. {_two_readings(path)}")
        return fits.pop()

    def _size_of_tensors(self, roots: Mapping[str, Any]) -> int | None:
        """Return the number of samples if each tree is one tensor, as in most batches; None for other batches."""
        found = None
        for tree in roots.values():
            if type(tree) is not Tensor or tree.is_nested or tree.layout is not torch.strided or tree.dim() == 0:
                return None
            size = tree.size(self.dim_of(tree))
            if found is not None and size != found:
                return None
            found = size
        return found

    def count_uncut(self, inputs: Any, targets: Any) -> int | None:
        """Return the number of samples of a batch that is not cut, or None if nothing says it.

        The targets say it if the whole batch does not, since a criterion's mean is over its targets.
        """
        if self.split is not None:
            return self.count({"inputs": inputs, "targets": targets})
        with contextlib.suppress(TypeError, ValueError):
            return self.count({"inputs": inputs, "targets": targets})
        # A tuple of tensors that differ in length is more likely a structure, such as (values, offsets).
        is_structure = isinstance(targets, tuple) and all(isinstance(value, Tensor) for value in targets)
        if is_structure and self._structure_sizes(targets, "targets") == set():
            return None
        with contextlib.suppress(TypeError, ValueError):
            return self.count({"targets": targets})
        return None

    def _possible(self, roots: Mapping[str, Any]) -> Iterator[set[int]]:
        """Yield, for each value that is cut, the numbers of samples that the batch may have."""
        for name, tree in roots.items():
            if is_sequence(tree) and name in ("inputs", "batch"):
                yield from self._possible_of_root(tree, name)
            else:
                yield from self._possible_of(tree, name)

    def _possible_of_root(self, tree: Any, name: str) -> Iterator[set[int]]:
        """Yield the numbers for a tuple or list of all inputs, or of a whole batch."""
        if name == "batch" and (_holds_dicts(tree) or is_plain_sequence(tree)):
            yield {len(tree)}
            return
        found = [sizes for path, value in children(tree, name) or () for sizes in self._possible_of(value, path)]
        if name == "inputs" and not found and tree:
            raise ValueError(
                f"inputs is a {type(tree).__name__} without tensors, whose entries would be single arguments of the "
                f"model, the same for all samples. If they are samples, pass a tuple with one list: (inputs,)"
            )
        yield from found

    def _possible_of(self, tree: Any, path: str) -> Iterator[set[int]]:
        if isinstance(tree, Tensor):
            yield {self._size(tree, path)}
        elif is_sequence(tree):
            sizes = self._sizes_of_sequence(tree, path)
            if sizes is not None:
                yield sizes
        elif (found := children(tree, path)) is not None:
            for child_path, value in found:
                yield from self._possible_of(value, child_path)
        elif not isinstance(tree, PLAIN):
            _check_object(tree, path)

    def _sizes_of_sequence(self, tree: Any, path: str) -> set[int] | None:
        """Return the numbers of samples that the batch may have by a tuple or list; None if by any number."""
        if not tree:
            return {0} if isinstance(tree, NoSamples) else None
        if is_plain_sequence(tree):
            return {len(tree)}
        if _is_mixed(tree):
            return self._structure_sizes(tree, path)
        return {len(tree)} | (self._structure_sizes(tree, path) or set())

    def _structure_sizes(self, tree: Any, path: str) -> set[int] | None:
        """Return the numbers of samples by a tuple or list that is a structure; None or no number if it cannot be one.

        None means that nothing in it is cut.
        """
        if _holds_dicts(tree):
            return set()
        try:
            possible = [
                sizes for child, value in children(tree, path) or () for sizes in self._possible_of(value, child)
            ]
        except (TypeError, ValueError):
            if _is_mixed(tree):
                raise
            return set()
        return set.intersection(*possible) if possible else None

    def _size(self, tensor: Tensor, path: str) -> int:
        if tensor.is_nested or tensor.layout is not torch.strided:
            kind = "nested" if tensor.is_nested else "sparse"
            raise TypeError(
                f"{path} is a {kind} tensor, which cannot be cut into parts: pass a padded or dense tensor, a list "
                f"with one tensor for each sample, {_OWN_SPLIT}."
            )
        if tensor.dim() == 0:
            raise ValueError(
                f"{path} is a 0-dimensional tensor: the first dimension counts the samples. Pass a Python number "
                "for a value that all samples share, or unsqueeze(0) for a batch of one."
            )
        return tensor.size(self.dim_of(tensor))

    def dim_of(self, tensor: Tensor) -> int:
        """Return the dimension of a tensor that counts its samples."""
        return min(self.batch_dim, tensor.dim() - 1)

    def _different_sizes(self, roots: Mapping[str, Any]) -> str:
        listed = [item for name, tree in roots.items() for item in self._listed(tree, name)]
        where = "first dimension" if self.batch_dim == 0 else f"size in dimension {self.batch_dim}"
        text = f"Tensors of a batch must have the same {where}, the number of samples"
        if any(item.endswith("entries") for item in listed):
            text += ", and lists as many entries (keep a list that all samples share in the model)"
        return f"{text}, but have {', '.join(listed)}."

    def _listed(self, tree: Any, path: str) -> Iterator[str]:
        """Yield the path and the number of samples of each tensor, and of each list of samples."""
        if isinstance(tree, Tensor):
            yield f"{path}: {self._size(tree, path)}"
        elif path not in ("inputs", "batch") and self._looks_like_samples(tree, path):
            yield f"{path}: {len(tree)} entries"
        else:
            for child_path, value in children(tree, path) or ():
                yield from self._listed(value, child_path)

    def _looks_like_samples(self, tree: Any, path: str) -> bool:
        """Return whether a value can only be a list of samples, and its entries are of one kind."""
        if is_plain_sequence(tree):
            return True
        is_list = is_sequence(tree) and self._sizes_of_sequence(tree, path) == {len(tree)}
        return is_list and len({_kind(value) for value in tree}) == 1

    def _sequences(self, roots: Mapping[str, Any]) -> Iterator[tuple[str, Any, set[int]]]:
        """Yield path, value and possible numbers of samples of each tuple or list that may be a list of samples."""
        pending = list(roots.items())
        while pending:
            path, tree = pending.pop(0)
            is_root = path in ("inputs", "batch")
            if is_sequence(tree) and tree and not is_root:
                sizes = self._sizes_of_sequence(tree, path)
                if sizes is not None:
                    yield path, tree, sizes
                continue
            pending += children(tree, path) or ()

    # ---- parts

    def part(self, roots: Mapping[str, Any], num_samples: int, start: int, stop: int) -> tuple[Any, ...]:
        """Return the batch's trees with samples start to stop: tensors become views, shared values do not change.

        Args:
            roots: The batch's trees by name.
            num_samples: Number of samples, as `count` returns it.
            start: First sample of the part.
            stop: One past its last sample.

        Raises:
            ValueError: A list has two readings, or the user's function returned another number of samples.
        """
        if self.split is not None:
            if (start, stop) == (0, num_samples):
                return tuple(roots.values())
            part, number = self._split(roots, start, stop)
            if number != stop - start:
                raise ValueError(
                    f"split(batch, {start}, {stop}) returned {number} sample(s) of a batch of {num_samples}, not "
                    f"{stop - start}: the parts of a batch must add up to the batch"
                )
            return tuple(part) if len(roots) > 1 else (part,)
        return tuple(self._cut(tree, name, roots, num_samples, start, stop) for name, tree in roots.items())

    def empty(self, batch: Any) -> Any:
        """Return the same structure without samples, from which `dummy` can make one again.

        Raises:
            TypeError, ValueError: The batch cannot be cut, so it has no form without samples.
        """
        if self.split is not None:
            raise TypeError("split= makes no parts without samples")
        roots = {"batch": batch}
        return self.part(roots, self.count(roots), 0, 0)[0]

    def dummy(self, inputs: Any, targets: Any, num_samples: int = 1) -> tuple[Any, Any, int]:
        """Return inputs and targets for a dummy, and their number of samples; 0 for the whole batch as it is.

        Args:
            inputs: Inputs of a batch. If it has no samples, the dummy is of zeros.
            targets: Targets of the same samples.
            num_samples: Number of samples to take, at most.
        """
        roots = {"inputs": inputs, "targets": targets}
        try:
            present = self.count(roots)
            if present == 0:
                return self._zero_sample(inputs), self._zero_sample(targets), 1
            number = min(present, num_samples)
            return (*self.part(roots, present, 0, number), number)
        except (TypeError, ValueError):
            return inputs, targets, 0

    def _cut(self, tree: Any, path: str, roots: Mapping[str, Any], num_samples: int, start: int, stop: int) -> Any:
        if isinstance(tree, Tensor):
            is_whole = stop - start == num_samples and not tree.requires_grad  # see cut_tensor
            return tree if is_whole else cut_tensor(tree, self.dim_of(tree), start, stop)
        if isinstance(tree, PLAIN):
            return tree
        if is_sequence(tree):
            if not tree:
                return tree
            if self._is_list_of_samples(tree, path, roots, num_samples):
                return tree[start:stop] if start < stop else NoSamples(tree[:1])
        found = children(tree, path)
        if found is None:
            return tree
        return rebuilt(tree, [self._cut(value, child, roots, num_samples, start, stop) for child, value in found])

    def _is_list_of_samples(self, tree: Any, path: str, roots: Mapping[str, Any], num_samples: int) -> bool:
        if path == "inputs":
            return False
        if path == "batch":
            return _holds_dicts(tree) or is_plain_sequence(tree)
        structure = None if is_plain_sequence(tree) else self._structure_sizes(tree, path)
        is_structure = num_samples in (structure or ())
        if num_samples == 1 or not (is_structure and len(tree) == num_samples):
            is_list = not is_structure and not (structure is None and _is_mixed(tree))
            if num_samples > 1:
                self._known[path] = is_list
            return is_list
        if _is_mixed(tree) or len({_kind(value) for value in tree if value is not None}) > 1:
            return False
        if path in self._known:
            return self._known[path]
        if any(isinstance(other[0], Mapping) for _, other, _ in self._sequences(roots)):
            return True
        raise ValueError(_two_readings(path))

    def _zero_sample(self, tree: Any) -> Any:
        if isinstance(tree, Tensor):
            shape = list(tree.shape)
            shape[self.dim_of(tree)] = 1
            return tree.new_zeros(shape)
        if isinstance(tree, NoSamples):
            return tree.sample
        values = values_of(tree)
        return tree if values is None else rebuilt(tree, [self._zero_sample(value) for value in values])

    def _split(self, roots: Mapping[str, Any], start: int, stop: int | None) -> tuple[Any, int]:
        """Call the user's function, with (inputs, targets) in a step, and check the form of what it returns."""
        assert self.split is not None
        is_pair = len(roots) > 1
        batch = tuple(roots.values()) if is_pair else next(iter(roots.values()))
        result = self.split(batch, start, stop)
        is_right = isinstance(result, tuple) and len(result) == 2 and hasattr(result[1], "__index__")
        if not is_right or (is_pair and not (isinstance(result[0], (tuple, list)) and len(result[0]) == 2)):
            form = "((inputs, targets), number of samples)" if is_pair else "(part, number of samples)"
            raise TypeError(f"split(batch, {start}, {stop}) must return {form}, not {_form(result)}")
        return result[0], operator.index(result[1])


def _holds_dicts(sequence: Any) -> bool:
    """Return whether a tuple or list is a list of samples because all entries are mappings."""
    return bool(sequence) and all(isinstance(value, Mapping) for value in sequence)


def _is_mixed(sequence: Any) -> bool:
    """Return whether a tuple or list has numbers or strings beside other things, so that it is no list of samples."""
    plain = [isinstance(value, PLAIN) and value is not None for value in sequence]
    return any(plain) and not all(is_plain or value is None for is_plain, value in zip(plain, sequence, strict=True))


def _kind(value: Any) -> Any:
    return (value.dtype, value.dim()) if isinstance(value, Tensor) else type(value)


def _check_object(tree: Any, path: str) -> None:
    """Raise TypeError for an object that may hold samples, in a form that is not known here."""
    name = type(tree).__name__
    if holds_tensors(tree):
        raise TypeError(
            f"{path} is a {name}, which cannot be cut into parts: pass tensors, or tuples, lists, dicts or dataclasses "
            f"of tensors (torch.as_tensor turns an array into one), {_OWN_SPLIT}."
        )
    if not isinstance(tree, type) and (hasattr(tree, "__len__") or hasattr(tree, "__next__")):
        raise TypeError(f"{path} is a {name}, which cannot be cut into parts: pass a list, {_OWN_SPLIT}.")


def _two_readings(path: str) -> str:
    return (
        f"{path} may be a list of samples, or hold tensors of all samples, since its length and the sizes of its "
        f"tensors allow both. If it holds tensors of all samples, pass a dict or a NamedTuple in its place. If it is a "
        f"list of samples, stack it to one tensor, {_OWN_SPLIT}."
    )


def _form(result: Any) -> str:
    if isinstance(result, tuple):
        return f"({', '.join(type(value).__name__ for value in result)})"
    return type(result).__name__
