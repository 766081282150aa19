# SPDX-License-Identifier: Apache-2.0
"""What a part of a batch counts in the mean over the whole batch, as each loss of torch defines its mean.

With w_r the weight of rank r's part and W the weight of the whole batch (the sum of all w_r), a mean is

    loss = sum_r (w_r / W) loss_r

and the ranks add up their gradients. Scaling comes before backward, so 16-bit gradients never hold the sum.
Nothing here communicates.

Three definitions of a mean cover torch (torch/nn/functional.py and ATen's Loss*.cpp): over the class weights
of the targets that are not ignored, over elements, over samples. Anything else callable is taken for a mean
over samples, unless its user gives the weight (`Weighted`).
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import leaves, map_tensors

_CLASS_WEIGHTS, _ELEMENTS, _SAMPLES = "class weights", "elements", "samples"

# By the function that computes the loss, so that a subclass with a forward of its own is not taken for its
# parent.
_MEANS: dict[Any, str] = {
    **dict.fromkeys(
        (
            nn.CrossEntropyLoss.forward,
            nn.NLLLoss.forward,
            F.cross_entropy,
            F.nll_loss,
        ),
        _CLASS_WEIGHTS,
    ),
    **dict.fromkeys(
        (
            nn.BCELoss.forward,
            nn.BCEWithLogitsLoss.forward,
            nn.GaussianNLLLoss.forward,
            nn.HingeEmbeddingLoss.forward,
            nn.HuberLoss.forward,
            nn.KLDivLoss.forward,
            nn.L1Loss.forward,
            nn.MarginRankingLoss.forward,
            nn.MSELoss.forward,
            nn.MultiLabelSoftMarginLoss.forward,
            nn.PoissonNLLLoss.forward,
            nn.SmoothL1Loss.forward,
            nn.SoftMarginLoss.forward,
            F.binary_cross_entropy,
            F.binary_cross_entropy_with_logits,
            F.hinge_embedding_loss,
            F.huber_loss,
            F.kl_div,
            F.l1_loss,
            F.mse_loss,
            F.multilabel_soft_margin_loss,
            F.poisson_nll_loss,
            F.smooth_l1_loss,
            F.soft_margin_loss,
        ),
        _ELEMENTS,
    ),
    **dict.fromkeys(
        (
            nn.CosineEmbeddingLoss.forward,
            nn.CTCLoss.forward,  # a mean over samples of each one's loss divided by its target's length
            nn.MultiLabelMarginLoss.forward,
            nn.MultiMarginLoss.forward,
            nn.TripletMarginLoss.forward,
            nn.TripletMarginWithDistanceLoss.forward,
            F.multi_margin_loss,
            F.multilabel_margin_loss,
        ),
        _SAMPLES,
    ),
}
if hasattr(nn, "LinearCrossEntropyLoss"):  # torch 2.13 and newer
    _MEANS[nn.LinearCrossEntropyLoss.forward] = _CLASS_WEIGHTS
# Arguments of a functools.partial that change what its mean is over: the deprecated forms of `reduction`, and
# the weight by which these two divide.
_LEGACY = {"size_average", "reduce"}
_DIVIDE_BY_WEIGHT = {F.l1_loss, F.mse_loss}


@dataclass(frozen=True)
class Weighted:
    """A loss that is a mean over what its user says.

    Raises:
        ValueError: the loss has a `reduction` that is no mean.
    """

    criterion: Callable[..., Any]
    weight: Callable[[Any], Any] | float
    """Of a part of a batch: a function of its targets, or a number for all of this rank's part."""

    def __post_init__(self) -> None:
        if is_sum(self.criterion):
            name = criterion_name(self.criterion)
            raise ValueError(f'{name} has reduction="sum", so weight= has no meaning: leave it out')

    def __call__(self, outputs: Any, targets: Any) -> Any:
        """Call the loss."""
        return self.criterion(outputs, targets)


def local_weight(criterion: Callable[..., Any], targets: Any, num_samples: int) -> float:
    """Return the weight of a batch, or of a part of one: what its mean was divided by; 1 for a sum.

    Reads the targets for a mean over class weights, which waits for the device if they are on one.

    Raises:
        ValueError: the criterion has `reduction="none"`, or the weight that its user gives is no weight.
    """
    if isinstance(criterion, Weighted):
        weight = float(criterion.weight(targets) if callable(criterion.weight) else criterion.weight)
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"weight= gives {weight} for {num_samples} samples; it must be finite and not negative")
        return weight
    reduction = _reduction(criterion)
    if reduction == "sum":
        return 1.0
    mean_over = _mean_over(criterion)
    if mean_over is _CLASS_WEIGHTS and isinstance(targets, Tensor):
        return _class_weight(criterion, targets)
    if mean_over is _ELEMENTS and isinstance(targets, Tensor) and reduction != "batchmean":
        return float(targets.numel())
    return float(num_samples)


def local_loss(criterion: Callable[..., Any], outputs: Any, targets: Any, weight: float, total: float) -> Any:
    """Return what this rank adds to the loss of the whole batch. Differentiable; for ranks that have samples.

    A criterion may return several terms in a tuple, list or dict, all of which are means over the same.

    Args:
        criterion: called as criterion(outputs, targets).
        outputs: of the model, for this rank's part.
        targets: of this rank's part.
        weight: `local_weight` of this rank's part.
        total: the weight of the whole batch.

    Raises:
        ValueError: the criterion would mix samples with each other, so that no split gives its value.
    """
    adds = is_sum(criterion)
    # With every target of the whole batch ignored both are 0, and each rank's NaN is one process's answer.
    if weight == total and not adds:
        return criterion(outputs, targets)
    _refuse_mixing(criterion, outputs, targets)
    if adds:
        return criterion(outputs, targets)
    if weight == 0 and is_known(criterion):
        # A mean over nothing is NaN, and 0 times NaN as well. The sum is an exact 0 with the same graph, and
        # right for label smoothing, where a target of class weight 0 still has a loss.
        return _with_options(criterion, reduction="sum")(outputs, targets) / total
    return map_tensors(lambda term: term * (weight / total), criterion(outputs, targets))


def loss_terms(criterion: Callable[..., Any], loss: Any) -> list[Tensor]:
    """Return the terms of what a criterion has returned, which add up to the loss.

    Raises:
        TypeError, ValueError: one is no tensor, or has more than one element.
    """
    if isinstance(loss, Tensor) and loss.numel() == 1:
        return [loss]
    terms = list(leaves(loss, "loss"))
    for path, term in terms:
        if not isinstance(term, Tensor):
            raise TypeError(f"{criterion_name(criterion)} must return tensors, but its {path} is {term!r}")
        if term.numel() != 1:
            raise ValueError(
                f"{criterion_name(criterion)} must return one number for the batch, or several in a tuple, list or "
                f"dict, but its {path} has shape {list(term.shape)}: reduce it with mean() or sum()."
            )
    if not terms:
        raise TypeError(f"{criterion_name(criterion)} returned no loss")
    return [term for _, term in terms]


def split_criterion(criterion: Callable[..., Any], targets: Any, start: int, stop: int) -> Callable[..., Any]:
    """Return the criterion for samples start to stop of a batch: itself, unless it has a weight per sample.

    nn.BCELoss and nn.BCEWithLogitsLoss take a `weight` (and the latter a `pos_weight`) of the targets' shape.

    Args:
        criterion: of the whole batch.
        targets: of the whole batch.
        start: first sample of the part.
        stop: one past its last.
    """
    if isinstance(criterion, Weighted):
        return replace(criterion, criterion=split_criterion(criterion.criterion, targets, start, stop))
    if not isinstance(targets, Tensor) or _mean_over(criterion) is not _ELEMENTS:
        return criterion
    options = {}
    for name in ("weight", "pos_weight"):
        option = _option(criterion, name)
        if isinstance(option, Tensor) and option.dim() == targets.dim() and option.size(0) > 1:
            options[name] = option[start:stop]
    return _with_options(criterion, **options) if options else criterion


def is_known(criterion: Callable[..., Any]) -> bool:
    """Whether the mean is known to be exact: a loss of torch, one that is a sum by its `reduction`, or `Weighted`.

    Everything else counts as a mean over samples, which the trainer says once.
    """
    return isinstance(criterion, Weighted) or _mean_over(criterion) is not None or is_sum(criterion)


def is_sum(criterion: Callable[..., Any]) -> bool:
    """Whether the loss is a sum over samples, by its `reduction`."""
    return _reduction(criterion) == "sum"


def criterion_name(criterion: Callable[..., Any]) -> str:
    """Return a name for messages."""
    function = _unwrapped(criterion.criterion if isinstance(criterion, Weighted) else criterion)
    if isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__qualname__", type(function).__qualname__)


def _unwrapped(criterion: Any) -> Any:
    return getattr(criterion, "_orig_mod", criterion)  # of torch.compile


def _mean_over(criterion: Any) -> str | None:
    criterion = _unwrapped(criterion)
    if isinstance(criterion, nn.Module):
        return _MEANS.get(type(criterion).forward)
    if isinstance(criterion, functools.partial):
        function, named = criterion.func, criterion.keywords.keys()
        if criterion.args or named & _LEGACY or (function in _DIVIDE_BY_WEIGHT and "weight" in named):
            return None
        criterion = function
    return _MEANS.get(criterion) if isinstance(criterion, Hashable) else None


def _reduction(criterion: Any) -> str:
    reduction = str(_option(criterion, "reduction", "mean"))
    if reduction == "none":
        raise ValueError(
            f'{criterion_name(criterion)} has reduction="none", but a step needs one loss: use '
            'reduction="mean" or reduction="sum".'
        )
    return reduction


def _option(criterion: Any, name: str, default: Any = None) -> Any:
    if isinstance(criterion, functools.partial):
        return criterion.keywords.get(name, default)
    return getattr(criterion, name, default)


def _with_options(criterion: Any, **options: Any) -> Callable[..., Any]:
    criterion = _unwrapped(criterion)
    if not isinstance(criterion, nn.Module):
        return functools.partial(criterion, **options)
    changed = copy.copy(criterion)
    changed.__dict__["_buffers"] = dict(criterion._buffers)  # else setting a weight would set the user's
    for name, value in options.items():
        setattr(changed, name, value)
    return changed


def _class_weight(criterion: Any, targets: Tensor) -> float:
    if targets.is_floating_point():  # class probabilities: a mean over positions, whatever the class weights
        return targets.numel() / targets.size(1)
    ignore_index = _option(criterion, "ignore_index")
    is_kept = targets != (-100 if ignore_index is None else ignore_index)
    class_weights = _option(criterion, "weight")
    if class_weights is None:
        return float(is_kept.sum())
    kept = targets[is_kept]
    return float(class_weights.to(kept.device, torch.float64)[kept].sum())


def _refuse_mixing(criterion: Any, outputs: Any, targets: Any) -> None:
    mean_over = _mean_over(criterion)
    if mean_over is None or not isinstance(outputs, Tensor) or not isinstance(targets, Tensor):
        return
    if mean_over is _ELEMENTS and outputs.dim() != targets.dim():
        what = "broadcast them against each other, each sample with every other one"
    elif mean_over is not _ELEMENTS and outputs.dim() < 2:
        what = "take the batch for a single sample"
    else:
        return
    # Without the first dimension, the message is the same on every rank.
    shapes = [", ".join(["batch", *map(str, tensor.shape[1:])]) for tensor in (outputs, targets)]
    raise ValueError(
        f"{criterion_name(criterion)} got outputs of shape [{shapes[0]}] and targets of shape [{shapes[1]}]: it "
        f"would {what}, so its value cannot be had from parts of the batch. Give outputs and targets the shapes "
        "that the criterion expects of a batch."
    )
