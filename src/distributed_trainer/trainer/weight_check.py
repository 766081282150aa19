# SPDX-License-Identifier: Apache-2.0
"""Check, once for each criterion, that its mean has the weight with which parts of a batch are counted.

If the loss is a mean with weight w, any two parts of a batch give the loss of the whole: (w_1 loss_1 + w_2 loss_2) / w.
A rank compares the two by its own samples, where the step cuts batches and the mean is not one that torch defines:

1. In forward, `look` calls the criterion with the step's own outputs, and with two parts of them, in float64. So there
   is no second forward, and hardly any rounding. For most criteria this is all.
2. If the outputs cannot be cut, since the model computes the loss, or 1. has found a difference, `compare` calls the
   model with the samples and with two parts of them, in evaluation mode. Only a difference that this finds is an error.

The parts have a third of the samples, and the rest: with equal parts some wrong weights do not show. Nothing is said of
what is the same in both parts. An exception ends the check, and nothing else. Nothing here communicates; a criterion or
model that calls other ranks is not checked, since the ranks may make the check in different ways.

The check comes after the step's own loss, and calls copies of the criterion (its attributes, what its function has
closed over) with copies of the tensors, since a criterion may count its calls or write to its arguments. A function
that assigns to a global variable is not checked.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import dis
import functools
import math
import time
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..backend.engine_group import no_collectives
from ..data.batch import call_model, cut_tensor, leaves, map_tensors, tensors, to_device
from ..data.loss_weight import MeanLoss, Weighted, criterion_name, is_known, local_weight, map_terms
from ..data.partition import Given
from ..replica.max_norm import max_norm_modules
from ..replica.model_state import StepSnapshot

_TOLERANCES = {torch.float64: 1e-6, torch.float32: 2e-5}
"""Relative difference of losses that rounding may explain, by the least exact dtype; that of 16-bit types is next."""
_COARSE = 2e-2
_RESOLUTION = 1e-2  # a check has passed if it would have shown that a part's share of the weight is wrong by this


_MOST_CHECKS = 8  # for criteria with the same code

_LARGEST_COPY = 1 << 20  # elements

_TOO_SIMILAR = "the losses of the two parts are almost the same"


class _NotComparable(Exception):
    """The loss of parts and of the whole cannot be compared; the text is the reason."""


class _Losses(NamedTuple):
    """Loss of some samples."""

    terms: list[float]
    """Terms of the loss."""
    weights: list[float]
    """Weight of these samples in each term."""
    dtype: torch.dtype
    """Dtype of the loss."""


class WeightCheck:
    """Check of a trainer's criteria. It outlives ranks.

    Args:
        device: Device of the model.

    Attributes:
        has_passed: Whether the last step has made a check that has passed on this rank.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._checked: dict[Any, set[Any]] = {}  # by code of criteria, the values with which they were checked
        self._criterion: Any = None  # to be checked in this step; None if there is none
        self.has_passed = False

    @property
    def is_on(self) -> bool:
        """Whether the last step has made a check."""
        return self._criterion is not None

    def start(self, criterion: Callable[..., Any], is_on: bool) -> None:
        """Begin a step. Local.

        Args:
            criterion: Loss of the step.
            is_on: Whether the step cuts batches, and is to be checked.
        """
        is_exact = is_known(criterion) and not (isinstance(criterion, Weighted) and callable(criterion.weight))
        code, values = _key(criterion)
        checked = self._checked.get(code, set())
        needs_check = is_on and not is_exact and values not in checked and len(checked) < _MOST_CHECKS
        self._criterion = criterion if needs_check else None
        self._leaves_out_plain = self._has_count = False
        self.has_passed = False
        self._candidate: tuple[Given, int] | None = None  # samples that need a forward, and their number
        self._has_compared = False
        self._reason = "this rank's part has fewer than two samples"
        self._seconds = 0.0

    def leave_out_plain(self) -> None:
        """Leave out terms without a weight or count, since the step has found counts of the model's losses. Local."""
        self._leaves_out_plain = not isinstance(self._criterion, Weighted)

    def look(self, given: Given, num_samples: int, outputs: Any) -> None:
        """Compare the losses of a microbatch by its outputs, after the criterion was called for it. Local."""
        if self._criterion is None or self.has_passed or self._candidate is not None or num_samples < 2:
            return
        with self._checking([]):
            self._candidate = given, num_samples
            if _can_be_cut(outputs, given, num_samples):
                is_same, self.has_passed = self._judge_outputs(given, num_samples, outputs)
                if is_same:
                    self._candidate, self._has_compared, self._reason = None, True, _TOO_SIMILAR

    def compare(self, model: nn.Module, given: Given, is_cut: bool, rank: int) -> str | None:
        """Compare the losses by forwards, if `look` has not; return why the step must not be made, or None. Local.

        Args:
            model: The model.
            given: The samples that this rank has passed to the step.
            is_cut: Whether the step cuts them: then the first dimension of their tensors does count samples.
            rank: This rank's number.
        """
        if self._criterion is None:
            return None
        refusal = None
        if not (self.has_passed or self._has_compared):
            with self._checking([model]):
                if self._candidate is None and is_cut:
                    number = given.rule.count(given.roots)
                    self._candidate = given.part(number, 0, min(number, 3)), min(number, 3)
                if self._candidate is not None and self._candidate[1] > 1:
                    refusal = self._judge_forwards(model, *self._candidate, is_cut, rank)
        self._candidate = None  # it holds the batch
        if refusal is None:  # a criterion that was refused will be refused again
            code, values = _key(self._criterion)
            self._checked.setdefault(code, set()).add(values)
        return refusal

    def report(self, has_passed: bool) -> str | None:
        """Return a line on what the last step's check has found and taken; None if there was none. Local.

        Args:
            has_passed: Whether it has passed on every rank.
        """
        if self._criterion is None:
            return None
        name, taken = criterion_name(self._criterion), f"{self._seconds:.2g} s; check_weight=False leaves this out"
        if isinstance(self._criterion, Weighted):
            if has_passed:
                return (
                    f"weight= fits {name}: the loss of two parts of a batch, weighted, is that of the whole ({taken})"
                )
            reason = "the part of another rank shows nothing" if self.has_passed else self._reason
            return f"weight= of {name} was not checked, since {reason} ({taken})"
        if has_passed and self._has_count:
            return f"MeanLoss of {name} fits: the loss of two parts of a batch is that of the whole ({taken})"
        if has_passed:
            return (
                f"{name} counts as a mean over samples: the loss of two parts of a batch, weighted, is that of the "
                f"whole ({taken}). If it leaves out targets that are not in this batch, such as padding, pass weight="
            )
        return None

    @contextlib.contextmanager
    def _checking(self, modules: list[nn.Module]) -> Iterator[None]:
        """Surround a comparison, which changes nothing: modules, the criterion, random states. Local."""
        began = time.perf_counter()
        criterion = _module_of(self._criterion)
        snapshots = [StepSnapshot(module, self._device) for module in [*modules, criterion or nn.Identity()]]
        try:
            with torch.no_grad(), no_collectives():
                yield
        except Exception as error:
            self._reason = str(error) if isinstance(error, _NotComparable) else f"{type(error).__name__}: {error}"
        finally:
            for snapshot in snapshots:
                snapshot.restore()
            self._seconds += time.perf_counter() - began

    def _judge_outputs(self, given: Given, num_samples: int, outputs: Any) -> tuple[bool, bool]:
        """Return whether losses of parts of the outputs are those of the whole, and whether that shows anything."""

        def losses(change: Callable[[Tensor], Tensor], start: int, stop: int) -> _Losses:
            def cut(tensor: Tensor) -> Tensor:
                return change(cut_tensor(tensor.detach(), given.rule.dim_of(tensor), start, stop)).clone()

            part = given.part(num_samples, start, stop)
            return self._losses(part, stop - start, map_tensors(cut, outputs), change)

        def double(tensor: Tensor) -> Tensor:
            return tensor.double() if tensor.is_floating_point() else tensor

        middle = _middle(num_samples)
        for change in (double, lambda tensor: tensor):
            try:
                bounds = (0, num_samples), (0, num_samples), (0, middle), (middle, num_samples)
                return _judge([losses(change, *bound) for bound in bounds])[:2]
            except _NotComparable:
                raise
            except Exception:
                if change is not double:
                    raise
        raise AssertionError

    def _judge_forwards(self, model: nn.Module, given: Given, num_samples: int, is_cut: bool, rank: int) -> str | None:
        """Compare by forwards; return why the step must not be made, or None. Set `has_passed`."""
        if max_norm_modules(model):
            raise _NotComparable("a forward of the model writes to its weights")
        middle = _middle(num_samples)
        parts = [given, given, given.part(num_samples, 0, middle), given.part(num_samples, middle, num_samples)]
        sizes = [num_samples, num_samples, middle, num_samples - middle]
        with _evaluating(model):
            outputs = [call_model(model, _cloned(to_device(part.inputs, self._device))) for part in parts]
        # Two evaluations of the whole, which differ if something draws.
        losses = [self._losses(*one) for one in zip(parts, sizes, outputs, strict=True)]
        spread, scale = _spread(outputs[0], outputs[2:], given, sizes)
        if not (scale or is_cut):
            raise _NotComparable("nothing shows which dimension of the batch counts samples")
        dtypes = {tensor.dtype for tensor in [*model.parameters(), *tensors(outputs[0])] if tensor.is_floating_point()}
        if torch.is_autocast_enabled(self._device.type):
            dtypes.add(torch.get_autocast_dtype(self._device.type))
        relative = max((_TOLERANCES.get(dtype, _COARSE) for dtype in dtypes), default=0.0)
        if spread > 10 * relative * scale:
            raise _NotComparable("the model's outputs for a part of the samples are not those for all of them")
        is_same, self.has_passed, index = _judge(losses, relative, 4 * spread)
        if is_same:
            self._reason = _TOO_SIMILAR
            return None
        _, whole, first, second = losses
        weight, *weights = (losses.weights[index] for losses in (whole, first, second))
        mean = (weights[0] * first.terms[index] + weights[1] * second.terms[index]) / weight
        name = criterion_name(given.criterion)
        finding = "weight= is wrong" if isinstance(given.criterion, Weighted) else "it is no mean over samples"
        return (
            f"{name}: the loss of two parts of a batch, weighted, is not that of the whole. On rank {rank} the first "
            f"{middle} of {num_samples} samples have loss {first.terms[index]:.6g} and weight {weights[0]:g}, the "
            f"others {second.terms[index]:.6g} and {weights[1]:g}: together {mean:.6g}, but all have "
            f"{whole.terms[index]:.6g} and weight {weight:g}. So {finding}: pass as weight= a "
            f"function of a part's targets that returns the denominator of its mean (for a language model that shifts "
            f"its labels by one, lambda labels: (labels[:, 1:] != -100).sum()), or return "
            f'MeanLoss(total, count). If it is a sum, give it an attribute reduction = "sum". If the loss is meant to '
            f"compare the samples of each part with each other, pass check_weight=False."
        )

    def _losses(
        self, given: Given, num_samples: int, outputs: Any, change: Callable[[Tensor], Tensor] = lambda tensor: tensor
    ) -> _Losses:
        """Return the loss of samples; `change` is applied to their targets."""
        criterion = _copied(given.criterion)
        weight = local_weight(criterion, _cloned(given.targets), num_samples)
        targets = map_tensors(change, _cloned(to_device(given.targets, self._device)))
        returned, terms = list[Any](), list[tuple[Tensor, float]]()
        map_terms(returned.append, criterion(outputs, targets))
        for term in returned:
            if isinstance(term, MeanLoss):
                self._has_count = True
                count = term.count_as_float()
                terms.append((term.total / count, count))
            elif not self._leaves_out_plain:
                terms.append((term, weight))
        if not terms:
            raise _NotComparable("the trainer finds the counts of the model's losses")
        dtype = max((term.dtype for term, _ in terms), key=lambda dtype: _TOLERANCES.get(dtype, _COARSE))
        return _Losses([term.item() for term, _ in terms], [weight for _, weight in terms], dtype)


def _judge(losses: Sequence[_Losses], relative: float = 0.0, absolute: float = 0.0) -> tuple[bool, bool, int]:
    """Compare the loss of two parts with that of the whole.

    Args:
        losses: Loss of the whole, the same computed again, loss of the first part, loss of the second part.
        relative: Least tolerance relative to the losses.
        absolute: Further tolerance.

    Returns:
        Whether they are the same, whether this shows anything, and the term that differs most.

    Raises:
        _NotComparable: They cannot be compared.
    """
    again, whole, first, second = losses
    if not all((*first.weights, *second.weights)):
        raise _NotComparable("one of the two parts has weight 0")
    relative = max(relative, _TOLERANCES.get(whole.dtype, _COARSE))
    excess, shows = [], False
    weights = zip(whole.weights, first.weights, second.weights, strict=True)
    values_of_terms = zip(whole.terms, first.terms, second.terms, again.terms, strict=True)
    for values, (weight, weight_of_one, weight_of_other) in zip(values_of_terms, weights, strict=True):
        if not all(map(math.isfinite, values)):
            raise _NotComparable("a loss is infinite or NaN")
        tolerance = relative * max(map(abs, values)) + absolute
        of_whole, one, other, repeated = values
        if abs(of_whole - repeated) > tolerance:
            raise _NotComparable("the loss of the same samples differs from call to call")
        difference = abs((weight_of_one * one + weight_of_other * other) / weight - of_whole)
        excess.append(difference - tolerance)
        shows |= abs(one - other) * _RESOLUTION > tolerance
    worst = max(range(len(excess)), key=excess.__getitem__)
    is_same = excess[worst] <= 0
    return is_same, is_same and shows, worst


def _middle(num_samples: int) -> int:
    return max(1, num_samples // 3)


def _key(criterion: Any) -> tuple[Any, Any]:
    """Return the code of a criterion and its weight, and the plain values in them.

    Both are the same for a criterion that a script makes again in each step.
    """
    if isinstance(criterion, Weighted):
        (code, values), (other, others) = _key(criterion.criterion), _key(criterion.weight)
        return (code, other), (values, others)
    if isinstance(criterion, functools.partial):
        code, values = _key(criterion.func)
        return code, (values, _plain([*criterion.args, *criterion.keywords.values()]))
    if isinstance(criterion, types.MethodType):
        return criterion.__code__, _plain(getattr(criterion.__self__, "__dict__", {}).values())
    if isinstance(criterion, types.FunctionType):
        cells = [_content(cell) for cell in criterion.__closure__ or ()]
        defaults = [*(criterion.__defaults__ or ()), *(criterion.__kwdefaults__ or {}).values()]
        return criterion.__code__, _plain([*cells, *defaults])
    return type(criterion), _plain(getattr(criterion, "__dict__", {}).values())


def _plain(values: Any) -> tuple[Any, ...]:
    """Return what chooses a loss, such as a reduction's name; not numbers, which may count steps."""
    return tuple(value if isinstance(value, str | bool) else type(value) for value in values)


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # it is empty
        return None


def _cloned(structure: Any) -> Any:
    return map_tensors(Tensor.clone, structure)


def _copied(criterion: Any) -> Any:
    """Return a copy of a criterion that counts its calls, or keeps its results, for itself.

    Raises:
        _NotComparable: There is none.
    """
    try:
        return _copy_of(criterion)
    except _NotComparable:
        raise
    except Exception as error:
        raise _NotComparable(f"it cannot be copied ({type(error).__name__}: {error})") from error


def _copy_of(criterion: Any) -> Any:
    if isinstance(criterion, Weighted):
        return Weighted(_copy_of(criterion.criterion), criterion.weight)
    if isinstance(criterion, functools.partial):
        return functools.partial(_copy_of(criterion.func), *criterion.args, **criterion.keywords)
    if isinstance(criterion, types.MethodType):
        return types.MethodType(criterion.__func__, _copy_of(criterion.__self__))
    if isinstance(criterion, types.FunctionType):
        if any(step.opname == "STORE_GLOBAL" for step in dis.get_instructions(criterion)):
            raise _NotComparable("it assigns to a global variable")
        cells = tuple(types.CellType(_copy_value(_content(cell))) for cell in criterion.__closure__ or ())
        function = types.FunctionType(
            criterion.__code__, criterion.__globals__, criterion.__name__, criterion.__defaults__, cells
        )
        function.__kwdefaults__ = criterion.__kwdefaults__
        function.__dict__.update({name: _copy_value(value) for name, value in criterion.__dict__.items()})
        return function
    return _copy_value(criterion)


def _copy_value(value: Any, depth: int = 4) -> Any:
    """Return a copy of what a criterion holds. Functions, modules with parameters and large tensors are not copied."""
    if depth == 0 or isinstance(value, types.FunctionType | types.ModuleType | type):
        return value
    if isinstance(value, Tensor):
        is_state = not isinstance(value, nn.Parameter) and not value.requires_grad and value.numel() <= _LARGEST_COPY
        return value.clone() if is_state else value
    if type(value) in (list, tuple, set, collections.deque):
        return type(value)(_copy_value(one, depth - 1) for one in value)
    if isinstance(value, dict):
        copied = copy.copy(value)
        copied.update({key: _copy_value(one, depth - 1) for key, one in value.items()})
        return copied
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, nn.Module):
        if any(True for _ in value.parameters()):
            return value
    elif type(value).__module__.partition(".")[0] in ("torch", "distributed_trainer") or not hasattr(value, "__dict__"):
        return value
    changed = copy.copy(value)
    vars(changed).update({name: _copy_value(one, depth - 1) for name, one in vars(value).items()})
    return changed


def _module_of(criterion: Any) -> nn.Module | None:
    """Return the module whose state a criterion may change; None if there is none."""
    if isinstance(criterion, Weighted):
        return _module_of(criterion.criterion)
    if isinstance(criterion, functools.partial):
        return _module_of(criterion.func)
    owner = getattr(criterion, "__self__", criterion)
    return owner if isinstance(owner, nn.Module) else None


def _can_be_cut(outputs: Any, given: Given, num_samples: int) -> bool:
    """Return whether outputs consist of tensors whose samples are counted as those of the batch."""
    found = tensors(outputs)
    if len(found) != sum(isinstance(leaf, Tensor) for _, leaf in leaves(outputs, "outputs")):
        return False
    return bool(found) and all(_has_samples(tensor, given, num_samples) for tensor in found)


def _has_samples(tensor: Tensor, given: Given, num_samples: int) -> bool:
    return tensor.dim() > 0 and tensor.size(given.rule.dim_of(tensor)) == num_samples


def _spread(whole: Any, parts: list[Any], given: Given, sizes: list[int]) -> tuple[float, float]:
    """Return the largest difference between outputs of the whole and of two parts, and the largest output.

    Outputs that have no samples are left out; both are 0 if all are.
    """
    spread = scale = 0.0
    for tensor, first, second in zip(tensors(whole), *map(tensors, parts), strict=False):
        both = zip((tensor, first, second), (sizes[0], *sizes[2:]), strict=True)
        if not tensor.is_floating_point() or not all(_has_samples(one, given, number) for one, number in both):
            continue
        joined = torch.cat([first, second], given.rule.dim_of(tensor))
        if joined.shape == tensor.shape:
            scale = max(scale, tensor.abs().max().item())
            spread = max(spread, (joined - tensor).abs().max().item())
    return spread, scale


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Make modules compute as in evaluation, without their `train`, which may merge weights; nothing is compiled."""
    modes = {module: module.training for module in model.modules()}
    try:
        for module in modes:
            module.training = False
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
