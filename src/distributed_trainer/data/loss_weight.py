# SPDX-License-Identifier: Apache-2.0
"""Weight of a part of a batch in the mean over the whole batch, as each loss of torch defines its mean.

With w_r the weight of rank r's part and W the weight of the whole batch (the sum of all w_r), a mean is

    loss = sum_r (w_r / W) loss_r

and gradients are summed over the ranks. The loss is scaled before backward, so 16-bit gradients never hold the
unscaled sum. Nothing here communicates.

Three definitions of a mean cover torch (torch/nn/functional.py and ATen's Loss*.cpp): over the class weights
of the targets that are not ignored, over elements, over samples. Any other callable counts as a mean over samples,
unless its user passes the weight (`Weighted`) or it returns a `MeanLoss` (`mean_loss.py`).
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .batch import cut_tensor, leaves, map_tensors, rebuilt, values_of

_CLASS_WEIGHTS, _ELEMENTS, _SAMPLES = "class weights", "elements", "samples"

# The key is the function that computes the loss, so that a subclass with its own forward is not taken for its parent.
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
            nn.CTCLoss.forward,  # a mean over samples: each sample's loss is divided by its target's length
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
FUNCTIONS: tuple[Any, ...] = tuple(key for key in _MEANS if getattr(F, key.__name__, None) is key)
"""The functions of torch.nn.functional among these losses."""
# Arguments of a functools.partial that change the definition of its mean: the deprecated forms of `reduction`, and for
# the functions of _DIVIDE_BY_WEIGHT the weight, by which they divide.
_LEGACY = {"size_average", "reduce"}
_DIVIDE_BY_WEIGHT = {F.l1_loss, F.mse_loss}


@dataclass(frozen=True)
class Weighted:
    """Loss that is a mean, with a weight that its user defines.

    Raises:
        ValueError: The loss has `reduction="sum"`.
    """

    criterion: Callable[..., Any]
    """Loss, called as criterion(outputs, targets)."""
    weight: Callable[[Any], Any] | float
    """Weight of a part of a batch: a function of the part's targets, or a number for this rank's whole part."""

    def __post_init__(self) -> None:
        if is_sum(self.criterion):
            name = criterion_name(self.criterion)
            raise ValueError(f'{name} has reduction="sum", so weight= has no meaning: leave it out')

    def __call__(self, outputs: Any, targets: Any) -> Any:
        """Return the loss of the outputs."""
        return self.criterion(outputs, targets)


@dataclass(frozen=True)
class MeanLoss:
    """Loss, or term of a loss, that is a mean whose denominator the criterion knows.

        def criterion(outputs, labels):
            is_labelled = labels != -100
            losses = F.cross_entropy(outputs[is_labelled], labels[is_labelled], reduction="sum")
            return MeanLoss(losses, is_labelled.sum())

    A criterion of `DistributedTrainer.train_step` or `evaluate` returns it, alone or for some of its terms in a tuple,
    list or dict; each term has a denominator of its own. The loss of the batch is the sum of the totals of all parts
    over the sum of their counts, on any number of ranks and microbatches.

    Args:
        total: Sum of the loss over this part of the batch, a tensor with one element. Differentiable.
        count: Number of items over which the mean is taken in this part, such as labels, or the sum of their weights: a
            number, or a tensor with one element. It gets no gradient. A part with 0 counts for nothing.

    Raises:
        TypeError: `total` is not a tensor.
        ValueError: `total` does not have one element. When the count is read: it is not one number, or is negative,
            infinite or NaN.
    """

    total: Tensor
    """Sum of the loss over this part."""
    count: Tensor | float
    """Number of items over which the mean is taken."""

    def __post_init__(self) -> None:
        if not isinstance(self.total, Tensor):
            raise TypeError(f"total of MeanLoss must be a tensor, not {self.total!r}")
        if self.total.numel() != 1:
            raise ValueError(f"total of MeanLoss must have one element, not shape {list(self.total.shape)}: use sum()")

    def count_as_float(self) -> float:
        """Return the count, after a check. Local; waits for its device."""
        if isinstance(self.count, Tensor) and self.count.numel() != 1:
            raise ValueError(f"count of MeanLoss must be one number, not a tensor of shape {list(self.count.shape)}")
        count = float(self.count)
        if not (math.isfinite(count) and count >= 0):
            raise ValueError(f"count of MeanLoss is {count}; it must be finite and not negative")
        return count


def local_weight(criterion: Callable[..., Any], targets: Any, num_samples: int | None) -> float:
    """Return the weight of a batch or of a part of a batch: the divisor of its mean; 1 for a sum. Local.

    For a mean over class weights this reads the targets, and waits for their device.

    Args:
        criterion: Loss, which defines its mean.
        targets: Targets of the samples.
        num_samples: Number of samples; None if it is not known.

    Raises:
        ValueError: The criterion has `reduction="none"`, the user's weight is negative or not finite, or the mean is
            over samples, whose number is not known.
    """
    if isinstance(criterion, Weighted):
        weight = float(criterion.weight(targets) if callable(criterion.weight) else criterion.weight)
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"weight= gives {weight} for a part of the batch; it must be finite and not negative")
        return weight
    reduction = _reduction(criterion)
    if reduction == "sum":
        return 1.0
    mean_over = _mean_over(criterion)
    if mean_over is _CLASS_WEIGHTS and isinstance(targets, Tensor):
        return _class_weight(criterion, targets)
    if mean_over is _ELEMENTS and isinstance(targets, Tensor) and reduction != "batchmean":
        return float(targets.numel())
    if num_samples is None:
        raise ValueError(
            f"{criterion_name(criterion)} is a mean over samples, but neither the batch nor its targets have one "
            f"number of samples: pass weight=, a function of the targets or this part's number of samples"
        )
    return float(num_samples)


def local_loss(criterion: Callable[..., Any], outputs: Any, targets: Any, weight: float, total: float) -> Any:
    """Return this rank's summand of the loss of the whole batch. Differentiable; only for ranks that have samples.

    A criterion may return several terms in a tuple, list or dict. All of them must be means with the same weight.

    Args:
        criterion: Loss, called as criterion(outputs, targets).
        outputs: Outputs of the model for this rank's part.
        targets: Targets of this rank's part.
        weight: `local_weight` of this rank's part.
        total: Weight of the whole batch.

    Raises:
        ValueError: The criterion would mix samples with each other, so its value cannot be computed from parts.
    """
    adds = is_sum(criterion)
    # If every target of the whole batch is ignored, both are 0, and each rank returns NaN, as one process does.
    if weight == total and not adds:
        return criterion(outputs, targets)
    refuse_mixing(criterion, outputs, targets)
    if adds:
        return criterion(outputs, targets)
    if isinstance(criterion, Weighted):
        return weighted_loss(criterion(outputs, targets), weight, total)
    if weight == 0 and is_known(criterion):
        # A mean without weight is NaN, and 0 times NaN is NaN too. The sum is an exact 0 with the same graph. It is
        # also correct for label smoothing, where a target of class weight 0 still has a loss.
        return _with_options(criterion, reduction="sum")(outputs, targets) / total
    return map_tensors(lambda term: term * (weight / total), criterion(outputs, targets))


def weighted_loss(loss: Any, weight: float, total: float) -> Any:
    """Return the summand of the loss of the whole batch, as `local_loss` does, for a loss with `weight=`."""
    if weight == total:
        return loss
    if weight == 0:
        return map_tensors(lambda term: torch.zeros_like(term.detach()), loss)  # it may be NaN
    return map_tensors(lambda term: term * (weight / total), loss)


def loss_terms(criterion: Callable[..., Any], loss: Any) -> list[Tensor]:
    """Return the terms of a criterion's result, whose sum is the loss.

    Raises:
        TypeError: A term is not a tensor, or there is no term.
        ValueError: A term does not have exactly one element, or is a `MeanLoss`, which `LossCounts` is for.
    """
    if isinstance(loss, Tensor) and loss.numel() == 1:
        return [loss]
    if has_means(loss):
        raise ValueError(
            f"{criterion_name(criterion)} returns MeanLoss, whose count is the weight. It does not go with weight=, "
            f'with an attribute reduction = "sum", or with reproducible=. Leave these out; or return the mean, '
            f"total / count, and pass weight=."
        )
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


def map_terms(change: Callable[[Any], Any], loss: Any) -> Any:
    """Return a criterion's result with each tensor and each `MeanLoss` replaced by `change` of it."""
    values = None if isinstance(loss, (Tensor, MeanLoss)) else values_of(loss)
    if values is None:
        return change(loss) if isinstance(loss, (Tensor, MeanLoss)) else loss
    return rebuilt(loss, [map_terms(change, value) for value in values])


def has_means(loss: Any) -> bool:
    """Return whether a criterion's result is, or has a term that is, a `MeanLoss`."""
    if isinstance(loss, (Tensor, MeanLoss)):
        return isinstance(loss, MeanLoss)
    return any(map(has_means, values_of(loss) or ()))


def split_criterion(
    criterion: Callable[..., Any], targets: Any, start: int, stop: int, batch_dim: int = 0
) -> Callable[..., Any]:
    """Return the criterion for samples start to stop of a batch: itself, unless it has a weight per sample.

    nn.BCELoss and nn.BCEWithLogitsLoss take a `weight` (and the latter a `pos_weight`) of the targets' shape.

    Args:
        criterion: Loss of the whole batch.
        targets: Targets of the whole batch.
        start: First sample of the part.
        stop: One past the last sample of the part.
        batch_dim: Dimension that counts the samples, or else the last one.
    """
    if isinstance(criterion, Weighted):
        part = split_criterion(criterion.criterion, targets, start, stop, batch_dim)
        return criterion if part is criterion.criterion else replace(criterion, criterion=part)
    if not isinstance(targets, Tensor) or _mean_over(criterion) is not _ELEMENTS:
        return criterion
    options = {}
    for name in ("weight", "pos_weight"):
        option = _option(criterion, name)
        dim = min(batch_dim, targets.dim() - 1)
        if isinstance(option, Tensor) and option.dim() == targets.dim() and option.size(dim) > 1:
            options[name] = cut_tensor(option, dim, start, stop)
    return _with_options(criterion, **options) if options else criterion


def is_known(criterion: Callable[..., Any]) -> bool:
    """Return whether the mean over ranks is known to be exact: for a loss of torch, `reduction="sum"` or `Weighted`.

    Any other criterion counts as a mean over samples, and the trainer says so once.
    """
    return isinstance(criterion, Weighted) or _mean_over(criterion) is not None or is_sum(criterion)


def is_sum(criterion: Callable[..., Any]) -> bool:
    """Return whether the loss is a sum over samples, by its `reduction`."""
    return _reduction(criterion) == "sum"


def criterion_name(criterion: Callable[..., Any]) -> str:
    """Return the criterion's name for messages."""
    function = _unwrapped(criterion.criterion if isinstance(criterion, Weighted) else criterion)
    if isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__qualname__", type(function).__qualname__)


def _unwrapped(criterion: Any) -> Any:
    return getattr(criterion, "_orig_mod", criterion)  # torch.compile wraps modules


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
    changed.__dict__["_buffers"] = dict(criterion._buffers)  # otherwise a new weight would replace the user's
    for name, value in options.items():
        setattr(changed, name, value)
    return changed


def _class_weight(criterion: Any, targets: Tensor) -> float:
    if targets.is_floating_point():  # class probabilities: a mean over positions, independent of class weights
        if targets.dim() < 2:
            raise ValueError(
                f"{criterion_name(criterion)} got targets of {targets.dtype} and shape {list(targets.shape)}. Class "
                f"numbers are integers: pass targets.long(). (Class probabilities would have the outputs' shape.)"
            )
        return targets.numel() / targets.size(1)
    ignored = _option(criterion, "ignore_index")
    ignored = -100 if ignored is None else ignored
    class_weights = _option(criterion, "weight")
    if class_weights is None and type(targets) is Tensor and targets.is_cpu:
        return float(np.count_nonzero(targets.numpy() != ignored))  # torch takes 8 us more
    is_kept = targets != ignored
    if class_weights is None:
        return float(is_kept.sum())
    kept = targets[is_kept].long()  # uint8 would be a mask
    return float(class_weights.to(kept.device, torch.float64)[kept].sum())


def refuse_mixing(criterion: Any, outputs: Any, targets: Any) -> None:
    """Raise ValueError for a loss of torch that would mix samples with each other, by the shapes. Local."""
    mean_over = _mean_over(criterion)
    if mean_over is None or not isinstance(outputs, Tensor) or not isinstance(targets, Tensor):
        return
    if mean_over is _ELEMENTS and outputs.dim() != targets.dim():
        what = "broadcast them against each other, each sample with every other sample"
    elif mean_over is not _ELEMENTS and outputs.dim() < 2:
        what = "take the batch for a single sample"
    else:
        return
    # Without the first dimension, the message is the same on every rank.
    shapes = [", ".join(["batch", *map(str, tensor.shape[1:])]) for tensor in (outputs, targets)]
    raise ValueError(
        f"{criterion_name(criterion)} got outputs of shape [{shapes[0]}] and targets of shape [{shapes[1]}]: it "
        f"would {what}, so its value cannot be computed from parts of the batch. Give outputs and targets the shapes "
        "that the criterion expects of a batch."
    )
