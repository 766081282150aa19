# SPDX-License-Identifier: Apache-2.0
"""The loss and metrics of a model over a dataset: each rank computes a part, and every sample counts once."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ..backend.gather import gather_objects, raise_alike
from ..data.batch import call_model, map_tensors, to_device
from ..data.loss_weight import MeanLoss, is_known, is_sum, local_weight, loss_terms, map_terms
from ..data.mean_loss import Kind, Summand
from ..data.model_loss import Record, computes_loss, number_of_items, recording, summands_by_value
from ..errors import DistributedTrainerError
from ..replica.batchnorm import GlobalBatchNorm
from ..replica.replica import Replica


@runtime_checkable
class TorchMetric(Protocol):
    """The part of `torchmetrics.Metric` that is used here."""

    dist_sync_fn: Any
    distributed_available_fn: Any

    def reset(self) -> None:
        """Forget all samples."""

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Count samples."""

    def compute(self) -> Any:
        """Return the metric over all samples of all ranks."""


class Evaluation:
    """Add up results of this rank's parts, then of all ranks.

    Args:
        criterion: The criterion of `DistributedTrainer.evaluate`, or None for no loss.
        metrics: By name: a function of (outputs, targets), or an object of torchmetrics.

    Attributes:
        error: Exception of this rank's part; None if there was none.
        finds_means: Whether the criterion may return a mean whose denominator only the model knows.
        is_local: Whether the iteration over parts is local. If not, it raises `error` on every rank.

    Raises:
        TypeError: A metric is neither.
        ValueError: A metric is named "loss", and there is a criterion.
    """

    def __init__(self, criterion: Callable[..., Any] | None, metrics: Mapping[str, Any]) -> None:
        self._criterion = criterion
        self.finds_means = criterion is not None and not is_known(criterion)
        self.error: Exception | None = None
        self.is_local = False
        self._objects, self._functions = {}, {}
        for name, metric in metrics.items():
            if name == "loss" and criterion is not None:
                raise ValueError('a metric cannot be named "loss": that is the criterion\'s result')
            if isinstance(metric, TorchMetric):
                metric.reset()
                self._objects[name] = metric
            elif not callable(metric) or getattr(metric, "update", None) is not None:
                raise TypeError(
                    f"metrics[{name!r}] must be a function of (outputs, targets) or a torchmetrics.Metric, not "
                    f"{type(metric).__name__}"
                )
            else:
                self._functions[name] = metric
        self._loss: Any = None  # as the criterion returns it
        self._loss_sums: list[float] = []
        self._weight = 0.0
        self._means: dict[tuple[int, ...], list[tuple[float, float]]] = {}  # by number of the term, and kinds of means
        self._sums = dict.fromkeys(self._functions, (0.0, 0.0))
        self._num_samples = 0

    def add(
        self,
        outputs: Any,
        targets: Any,
        num_samples: int | None,
        autocast: Callable[[], contextlib.AbstractContextManager[object]],
        records: Sequence[Record] = (),
        number: float | None = None,
    ) -> None:
        """Count a part that has samples, whose number may not be known (None), with the criterion in autocast. Local.

        Args:
            outputs: Outputs of the model.
            targets: Targets.
            num_samples: Number of samples.
            autocast: Function that returns the context of the criterion.
            records: Losses that the model has computed.
            number: `number_of_items` of the part.

        Raises:
            ValueError: The number of samples is needed, but not known.
        """
        self._num_samples += 1 if num_samples is None else num_samples
        if self._criterion is not None:
            weight = local_weight(self._criterion, targets, num_samples)
            if weight:  # with 0 the mean would be over nothing
                with autocast():
                    loss = self._criterion(outputs, targets)
                if not is_known(self._criterion):
                    returned: list[Any] = []
                    map_terms(returned.append, loss)
                    for index, term in enumerate(returned):
                        self._add_means(summands_by_value(term, index, records, number, weight))
                    loss = map_terms(lambda term: term.total if isinstance(term, MeanLoss) else term, loss)
                self._loss = loss
                terms = [term.item() for term in loss_terms(self._criterion, self._loss)]
                factor = 1.0 if is_sum(self._criterion) else weight
                before = self._loss_sums or [0.0] * len(terms)
                self._loss_sums = [old + factor * term for old, term in zip(before, terms, strict=True)]
                self._weight += weight
        for name, function in self._functions.items():
            value = torch.as_tensor(function(outputs, targets))
            is_mean = value.dim() == 0
            if is_mean and num_samples is None:
                raise ValueError(
                    f"metrics[{name!r}] is a mean over samples, but neither the batch nor its targets have one "
                    f"number of samples: let it return a tensor with an element for each sample"
                )
            count = (num_samples or 0) if is_mean else value.numel()
            total, weight = self._sums[name]
            self._sums[name] = total + value.double().sum().item() * (count if is_mean else 1), weight + count
        for metric in self._objects.values():
            metric.update(outputs, targets)

    def _add_means(self, summands: list[Summand]) -> None:
        """Add the summands of a term. Local."""
        key = summands[0].term, *(summand.kind for summand in summands)
        before = self._means.get(key, [(0.0, 0.0)] * len(summands))
        self._means[key] = [
            (total + summand.multiplier * summand.value.item(), count + summand.count)
            for (total, count), summand in zip(before, summands, strict=True)
            if summand.value is not None
        ]

    @property
    def has_plain(self) -> bool:
        """Whether a term of the loss counts by samples, although its mean is not known."""
        return any(Kind.PLAIN in kinds for _, *kinds in self._means)

    def run_dummy(self, outputs: Any, targets: Any) -> None:
        """Make the calls of `add` for samples that do not count. Local."""
        if self._criterion is not None:
            self._criterion(outputs, targets)
        for function in self._functions.values():
            function(outputs, targets)

    def result(self, group: Any) -> dict[str, Any]:
        """Compute the result of `DistributedTrainer.evaluate`. Collective, blocks.

        Raises:
            ValueError: No rank has counted a sample. The same on every rank.
        """
        structure = map_tensors(lambda term: term.new_zeros((), device="cpu"), self._loss)
        own = (self._num_samples, structure, self._loss_sums, self._weight, self._means, self._sums)
        gathered = gather_objects(group, own)
        if not any(num_samples for num_samples, *_ in gathered):
            raise ValueError("the loader has no samples, on any rank")
        result = {}
        if self._criterion is not None:
            result["loss"] = self._global_loss(self._criterion, gathered)
        for name in self._functions:
            parts = [sums[name] for *_, sums in gathered]
            result[name] = sum(total for total, _ in parts) / sum(count for _, count in parts)
        for name, metric in self._objects.items():
            with _synchronised(metric, group):
                result[name] = metric.compute()
        return result

    def _global_loss(self, criterion: Callable[..., Any], gathered: list[Any]) -> Any:
        counted = [(structure, sums, weight) for _, structure, sums, weight, *_ in gathered if weight]
        if not counted:  # every target is ignored
            return float("nan")
        total = 1.0 if is_sum(criterion) else sum(weight for *_, weight in counted)
        terms = [sum(parts) / total for parts in zip(*(sums for _, sums, _ in counted), strict=True)]
        for index in range(len(terms)):
            exact = self._global_mean(index, [means for *_, means, _ in gathered])
            terms[index] = terms[index] if exact is None else exact
        remaining = iter(terms)
        return map_tensors(lambda _: next(remaining), counted[0][0])

    @staticmethod
    def _global_mean(term: int, gathered: list[Any]) -> float | None:
        """Return a term of the loss by the counts of its means; None if it counts by the weights of the parts. Local.

        Raises:
            ValueError: The criterion has returned `MeanLoss` for some batches only.
        """
        rows = [(kinds, sums) for means in gathered for (index, *kinds), sums in means.items() if index == term]
        different = {tuple(kinds) for kinds, _ in rows}
        if len(different) > 1 and (Kind.MEAN,) in different:
            raise ValueError("the criterion returns MeanLoss for some batches and not for others")
        if len(different) != 1 or different == {(Kind.PLAIN,)}:
            return None
        columns = zip(*(sums for _, sums in rows), strict=True)
        pairs = [[sum(numbers) for numbers in zip(*column, strict=True)] for column in columns]
        return sum(total / count if count else math.nan for total, count in pairs)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode in the block, without autograd; restore each module's mode after it."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def evaluate(
    replica: Replica,
    parts: Iterable[tuple[Any, Any, int | None]],
    evaluation: Evaluation,
    group: Any,
    device: torch.device,
    dummy: Callable[[Any, Any], tuple[Any, ...]],
) -> dict[str, Any]:
    """Run the model over this rank's parts. Collective, blocks.

    Random numbers that the model draws in evaluation mode come from this rank's own stream.

    Args:
        replica: Replica of the model.
        parts: Inputs, targets and number of samples (None if it is not known) of each part.
        evaluation: Adds up the results.
        group: Process group of the ranks.
        device: Where this rank computes.
        dummy: Called with inputs and targets of an empty part; returns those of a dummy.

    Raises:
        ValueError: There are no samples on any rank. The same on every rank.
        Exception: A part cannot be counted, or the model, the criterion or a metric has raised on any rank. The same on
            every rank.
    """
    calls = replica.script_calls

    def count(number: int, own_inputs: Any, own_targets: Any, num_samples: int | None) -> None:
        is_dummy = num_samples == 0
        if is_dummy and not calls.are_used:
            return
        own = dummy(own_inputs, own_targets)[:2] if is_dummy else (own_inputs, own_targets)
        inputs, targets = to_device(own, device)
        records: list[Record] = []
        with replica.around_evaluation(number, is_dummy):
            with replica.autocast(), recording(records) if finds_means else contextlib.nullcontext():
                outputs = call_model(replica.model, inputs)
            if is_dummy:
                with replica.autocast():
                    evaluation.run_dummy(outputs, targets)
            else:
                evaluation.add(outputs, targets, num_samples, replica.autocast, records, number_of_items(inputs))

    finds_means = evaluation.finds_means and computes_loss(replica.model)
    with evaluating(replica.model), calls.step():
        try:
            for number, part in enumerate(parts):
                try:
                    count(number, *part)
                except Exception as error:
                    if isinstance(error, DistributedTrainerError) and calls.told is None:
                        raise
                    if calls.told is None:
                        evaluation.error = error
                        calls.fail(error)
                calls.finish()
                if evaluation.is_local and (evaluation.error is not None or calls.is_over):
                    break
        except Exception as error:
            if not evaluation.is_local or isinstance(error, DistributedTrainerError):
                raise
            evaluation.error = error
    raise_alike(group, evaluation.error)
    replica.share_changed_buffers()  # a rank with an empty part has not called the model
    return evaluation.result(group)


def check_pair(batch: Any) -> tuple[Any, Any]:
    """Return inputs and targets of a batch.

    Raises:
        ValueError: The batch is no pair.
    """
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise ValueError(
            "evaluate needs batches that are pairs (inputs, targets). Turn other batches into pairs: "
            '((batch["x"], batch["y"]) for batch in loader).'
        )
    return batch[0], batch[1]


def update_bn(model: nn.Module, batches: Iterable[tuple[Any, bool]], group: Any, device: torch.device) -> None:
    """Compute BatchNorm's running statistics again, as means over global batches. Collective, blocks.

    Args:
        model: Model to run, in training mode and without autograd.
        batches: Inputs of this rank's part of each batch, and whether they are a dummy.
        group: Process group of the ranks.
        device: Device of the model.

    Raises:
        MismatchError: Some rank has more batches. The same on every rank.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    before = [(norm, norm.momentum) for norm in norms], [(module, module.training) for module in model.modules()]
    statistics = GlobalBatchNorm(model, group)
    model.train()
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # torch then takes the mean over all batches
        with torch.no_grad():
            for inputs, is_dummy in batches:
                with statistics.active(is_dummy):
                    model(to_device(inputs, device))
        statistics.check_finished()
    finally:
        for norm, momentum in before[0]:
            norm.momentum = momentum
        for module, mode in before[1]:
            module.training = mode


@contextlib.contextmanager
def _synchronised(metric: Any, group: Any) -> Iterator[None]:
    """Make `metric.compute()` count the samples of all ranks in the block, gathered by this package."""

    def gather(tensor: Tensor, group_of_torch: Any = None, **_: Any) -> list[Tensor]:
        gathered = [other.to(tensor.device) for other in gather_objects(group, tensor.cpu())]
        # A rank without samples has an empty tensor, whose dtype may differ from the others'.
        return [other for other in gathered if other.numel()] or gathered

    before = metric.dist_sync_fn, metric.distributed_available_fn
    metric.dist_sync_fn, metric.distributed_available_fn = gather, lambda: True
    try:
        yield
    finally:
        metric.dist_sync_fn, metric.distributed_available_fn = before
