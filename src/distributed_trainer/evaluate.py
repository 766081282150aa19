# SPDX-License-Identifier: Apache-2.0
"""The loss and metrics of a model over a dataset of which each rank computes a part, every sample counted once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .backend import gather_objects
from .criterion import is_sum, local_weight, loss_terms
from .data import batch_size, call_model, map_tensors, to_device


class Evaluation:
    """Sums up what a rank's parts give, and then what all ranks' do.

    Args:
        criterion: As of `train_step`, or None for no loss.
        metrics: By name: a function of (outputs, targets), or an object of torchmetrics.

    Raises:
        TypeError: A metric is neither.
    """

    def __init__(self, criterion: Callable[..., Any] | None, metrics: Mapping[str, Any]) -> None:
        self._criterion = criterion
        self._objects, self._functions = {}, {}
        for name, metric in metrics.items():
            if name == "loss" and criterion is not None:
                raise ValueError('a metric cannot be named "loss", which is the criterion\'s')
            if hasattr(metric, "update") and hasattr(metric, "dist_sync_fn"):
                metric.reset()
                self._objects[name] = metric
            elif hasattr(metric, "update") or not callable(metric):
                raise TypeError(
                    f"metrics[{name!r}] must be a function of (outputs, targets) or a torchmetrics.Metric, not "
                    f"{type(metric).__name__}"
                )
            else:
                self._functions[name] = metric
        self._loss: Any = None
        """As the criterion returns it."""
        self._loss_sums: list[float] = []
        self._weight = 0.0
        self._sums = dict.fromkeys(self._functions, (0.0, 0.0))
        self._num_samples = 0

    def add(self, outputs: Any, targets: Any, num_samples: int) -> None:
        """Counts a part that has samples. Local."""
        self._num_samples += num_samples
        if self._criterion is not None:
            weight = local_weight(self._criterion, targets, num_samples)
            if weight:  # else a mean over nothing
                self._loss = self._criterion(outputs, targets)
                terms = [term.item() for term in loss_terms(self._criterion, self._loss)]
                factor = 1.0 if is_sum(self._criterion) else weight
                before = self._loss_sums or [0.0] * len(terms)
                self._loss_sums = [old + factor * term for old, term in zip(before, terms, strict=True)]
                self._weight += weight
        for name, function in self._functions.items():
            value = torch.as_tensor(function(outputs, targets))
            is_mean = value.dim() == 0
            count = num_samples if is_mean else value.numel()
            total, weight = self._sums[name]
            self._sums[name] = total + value.double().sum().item() * (count if is_mean else 1), weight + count
        for metric in self._objects.values():
            metric.update(outputs, targets)

    def result(self, group: Any) -> dict[str, Any]:
        """What `DistributedTrainer.evaluate` returns. Collective, blocks.

        Raises:
            ValueError: No rank has counted a sample.
        """
        structure = map_tensors(lambda term: term.new_zeros((), device="cpu"), self._loss)
        own = (self._num_samples, structure, self._loss_sums, self._weight, self._sums)
        gathered = gather_objects(group, own)
        if not any(num_samples for num_samples, *_ in gathered):
            raise ValueError("the loader has no samples, on any rank")
        result = {}
        if self._criterion is not None:
            result["loss"] = self._global_loss(gathered)
        for name in self._functions:
            parts = [sums[name] for *_, sums in gathered]
            result[name] = sum(total for total, _ in parts) / sum(count for _, count in parts)
        for name, metric in self._objects.items():
            with _synchronised(metric, group):
                result[name] = metric.compute()
        return result

    def _global_loss(self, gathered: list[Any]) -> Any:
        counted = [(structure, sums, weight) for _, structure, sums, weight, _ in gathered if weight]
        if not counted:  # every target ignored
            return float("nan")
        total = 1.0 if is_sum(self._criterion) else sum(weight for *_, weight in counted)
        terms = iter([sum(parts) / total for parts in zip(*(sums for _, sums, _ in counted), strict=True)])
        return map_tensors(lambda _: next(terms), counted[0][0])


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within it the model is in evaluation mode, without autograd. Afterwards each module is as it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def evaluate(
    model: nn.Module, parts: Iterable[Any], evaluation: Evaluation, group: Any, device: torch.device
) -> dict[str, Any]:
    """Runs the model over this rank's parts, (inputs, targets) each. Collective, blocks.

    Raises:
        ValueError: An element is no pair, or there are no samples on any rank.
    """
    with evaluating(model):
        for part in parts:
            if not isinstance(part, (tuple, list)) or len(part) != 2:
                raise ValueError(
                    "evaluate needs batches that are pairs (inputs, targets). Make such of others: "
                    '((batch["x"], batch["y"]) for batch in loader).'
                )
            num_samples = batch_size({"inputs": part[0], "targets": part[1]})
            if num_samples:
                inputs, targets = to_device(part, device)
                evaluation.add(call_model(model, inputs), targets, num_samples)
    return evaluation.result(group)


@contextlib.contextmanager
def _synchronised(metric: Any, group: Any) -> Iterator[None]:
    """Within it `metric.compute()` is over what all ranks have seen, gathered by us."""

    def gather(tensor: Tensor, group_of_torch: Any = None, **_: Any) -> list[Tensor]:
        gathered = [other.to(tensor.device) for other in gather_objects(group, tensor.cpu())]
        # A rank that has seen nothing gives an empty tensor, of a type that need not be the others'.
        return [other for other in gathered if other.numel()] or gathered

    before = metric.dist_sync_fn, metric.distributed_available_fn
    metric.dist_sync_fn, metric.distributed_available_fn = gather, lambda: True
    try:
        yield
    finally:
        metric.dist_sync_fn, metric.distributed_available_fn = before
