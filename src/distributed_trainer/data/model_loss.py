# SPDX-License-Identifier: Apache-2.0
"""Losses that a model of transformers computes in its forward: find of which means of torch they are made.

Such a model returns `outputs.loss`, a mean over labels that the criterion does not see: shifted by one, flattened,
without those that are -100. Nearly all of them call a loss function of torch.nn.functional. So these functions are
replaced while the model's forward runs, and record their results and what each is a mean over, by the rules of
`loss_weight.py`. Afterwards the graph of a term tells whether it is a sum of recorded means with constant coefficients,
which are its derivatives. What is left of a term, such as a router's balancing loss, counts by the weight of the part.

Nothing here imports transformers, and nothing communicates.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .batch import rebuilt
from .loss_weight import FUNCTIONS, MeanLoss, is_sum, local_weight, refuse_mixing
from .mean_loss import Kind, Summand

# Nodes of autograd that are linear in each input, if their other input is a constant.
_LINEAR = (
    *("Add", "Alias", "Clone", "Div", "Mean", "Mul", "Neg", "Select", "Squeeze", "Stack", "Sub", "Sum", "ToCopy"),
    *("Unsqueeze", "View"),
)


@dataclass(frozen=True)
class Record:
    """A loss of torch that was called in forward."""

    result: Tensor
    """Mean over the targets; the sum if `is_sum`, or if `count` is 0."""
    count: float
    """Number of what the mean is over."""
    is_sum: bool
    is_over_all: bool
    """Whether the mean is over all targets, and ignores none."""


def computes_loss(model: nn.Module) -> bool:
    """Return whether a model, or a module inside of it, computes losses as those of transformers do. Local."""
    return any(hasattr(type(module), "loss_function") for module in model.modules())


def number_of_items(inputs: Any) -> float | None:
    """Return the number by which a model of transformers divides its loss, if the batch has one. Local."""
    number = inputs.get("num_items_in_batch") if isinstance(inputs, Mapping) else None
    return None if number is None else float(number)


def with_plain_number(inputs: Any) -> Any:
    """Return inputs in which a 0-dimensional `num_items_in_batch` is a number, which is not cut. Local."""
    number = inputs.get("num_items_in_batch") if isinstance(inputs, Mapping) else None
    if not isinstance(number, Tensor) or number.dim():
        return inputs
    return rebuilt(inputs, [number.item() if value is number else value for value in inputs.values()])


@contextlib.contextmanager
def recording(records: list[Record]) -> Iterator[None]:
    """Append the calls of torch's losses in the block to `records`. Local."""
    replaced = {function.__name__: function for function in FUNCTIONS if getattr(F, function.__name__) is function}
    for name, function in replaced.items():
        setattr(F, name, _recorder(function, records))
    try:
        yield
    finally:
        for name, function in replaced.items():
            setattr(F, name, function)


def _recorder(function: Callable[..., Tensor], records: list[Record]) -> Callable[..., Tensor]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Tensor:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        arguments = _signature(function).bind(*args, **kwargs).arguments
        outputs, targets = arguments.pop("input"), arguments.pop("target")
        loss = functools.partial(function, **{name: value for name, value in arguments.items() if value is not None})
        try:
            refuse_mixing(loss, outputs, targets)
            as_mean = functools.partial(loss, reduction="mean") if is_sum(loss) else loss
            count = local_weight(as_mean, targets, None)
        except ValueError:  # no mean, or one over samples
            return function(*args, **kwargs)
        # The mean over nothing is NaN, and NaN times 0 is NaN. The sum is an exact 0 with the same graph.
        result = loss(outputs, targets) if count else loss(outputs, targets, reduction="sum")
        records.append(Record(result, count, is_sum(loss), count == targets.numel()))
        return result.clone()  # the model may add to its loss in place

    return call


_signature = functools.cache(inspect.signature)


def summands_of(
    loss: Tensor | MeanLoss, term: int, records: list[Record], number: float | None, weight: float
) -> list[Summand]:
    """Return the summands of a term of a loss. Local.

    Args:
        loss: The term.
        term: Its number.
        records: Losses of torch that the model has computed.
        number: `number_of_items` of the batch.
        weight: Weight of the part.
    """
    if isinstance(loss, MeanLoss):
        return [Summand(Kind.MEAN, term, loss.total, loss.count_as_float())]
    records = [record for record in records if record.result.requires_grad and record.is_sum <= (number is not None)]
    plain = Summand(Kind.PLAIN, term, loss, weight)
    if not records or not loss.requires_grad:
        return [plain]
    results = [record.result for record in records]
    derivatives = torch.autograd.grad(loss, results, torch.ones_like(loss), retain_graph=True, allow_unused=True)
    parts, found = [], list[Summand]()
    for record, derivative in zip(records, derivatives, strict=True):
        if derivative is None:
            continue
        factor = derivative.item()
        if record.is_sum:
            assert number is not None
            value = record.result * (factor if math.isfinite(factor) else 0.0)  # divided by 0: a part without targets
            found.append(Summand(Kind.SUM, term, value, record.count, number))
            parts.append(value)
        else:
            found.append(Summand(Kind.MODEL, term, record.result, record.count, factor))
            parts.append(record.result * factor)
    if not found:
        return [plain]
    rest = loss - torch.stack([part.to(loss.dtype).reshape(loss.shape) for part in parts]).sum(0)
    is_complete = _is_linear(loss, results) and not abs(rest.item()) > 1e-4 * abs(loss.item())
    return found if is_complete else [*found, replace(plain, value=rest)]


def _is_linear(loss: Tensor, results: list[Tensor]) -> bool:
    """Return whether the graph of a loss leads to these results alone, by linear operations. Local."""
    ends = {result.grad_fn for result in results}
    waiting, seen = [loss.grad_fn], set[Any]()
    while waiting:
        node = waiting.pop()
        if node is None or node in ends or node in seen:
            continue
        seen.add(node)
        children = [child for child, _ in node.next_functions if child is not None]
        if not children or not type(node).__name__.lstrip("_").startswith(_LINEAR):
            return False
        waiting += children
    return True


def summands_by_value(
    loss: Tensor | MeanLoss, term: int, records: Sequence[Record], number: float | None, weight: float
) -> list[Summand]:
    """Return the summands of a term of a loss that has no graph, as `summands_of` does. Local.

    A term counts as a recorded mean if it has its value. If the model computes several, such as for the start and the
    end of an answer, it may be their sum or their mean.
    """
    if isinstance(loss, MeanLoss):
        return [Summand(Kind.MEAN, term, loss.total, loss.count_as_float())]
    means = [record for record in records if not record.is_sum or number]
    values = [record.result.item() / (number if number and record.is_sum else 1.0) for record in means]
    value = loss.item()
    for record, mean in zip(means, values, strict=True):
        if value == mean:
            factor = 1 / record.count if record.is_sum and record.count else 1.0
            return [Summand(Kind.MODEL, term, record.result, record.count, factor)]
    for factor in (1.0, 1 / max(len(means), 1)):
        if len(means) > 1 and math.isclose(value, sum(values) * factor, rel_tol=1e-6):
            return [Summand(Kind.MODEL, term, record.result, record.count, factor) for record in means]
    return [Summand(Kind.PLAIN, term, loss, weight)]
