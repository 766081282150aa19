# SPDX-License-Identifier: Apache-2.0
"""Weighted parts of a batch, compared with torch's mean over the whole batch, for every loss of torch."""

import functools
import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import loss as losses

from distributed_trainer.data.loss_weight import (
    criterion_name,
    is_known,
    local_loss,
    local_weight,
    split_criterion,
)

NUM_SAMPLES, NUM_CLASSES = 10, 4
PARTS = [slice(0, 7), slice(7, 10)]
TOLERANCE = 1e-12


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def integers(high, *shape, low=0):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(1))


def signs(*shape):
    return integers(2, *shape) * 2.0 - 1.0


N, C = NUM_SAMPLES, NUM_CLASSES
CLASS_WEIGHTS = torch.tensor([0.1, 2.0, 0.7, 5.0], dtype=torch.float64)
LABELS = integers(C, N)
SOME_IGNORED = torch.where(torch.arange(N) % 3 == 0, -100, LABELS)
PART_IGNORED = torch.where(torch.arange(N) >= 7, -100, LABELS)
# Class 0 has weight 0, and the second part has only class 0: its mean is 0/0, or loss/0 with label smoothing.
PART_ZERO_WEIGHT = torch.where(torch.arange(N) >= 7, 0, LABELS)
ZERO_WEIGHT = torch.tensor([0.0, 2.0, 0.7, 5.0], dtype=torch.float64)
PROBABILITIES = random(N, C, seed=6).softmax(1)
LOG_PROBABILITIES = random(N, C, seed=3).log_softmax(1)

# Losses that take outputs and targets: criterion, outputs, targets.
TWO_ARGUMENTS = [
    (nn.L1Loss(), random(N, 3), random(N, 3, seed=2)),
    (nn.L1Loss(), random(N), random(N, seed=2)),
    (nn.MSELoss(), random(N, 3, 2), random(N, 3, 2, seed=2)),
    (nn.MSELoss(), random(N, 3), random(N, 1, seed=2)),  # broadcasts, but within samples
    (nn.SmoothL1Loss(beta=0.3), random(N, 3), random(N, 3, seed=2)),
    (nn.HuberLoss(delta=0.7), random(N, 3), random(N, 3, seed=2)),
    (nn.PoissonNLLLoss(), random(N, 3), random(N, 3, seed=2).abs()),
    (nn.SoftMarginLoss(), random(N, 3), signs(N, 3)),
    (nn.HingeEmbeddingLoss(), random(N, 3), signs(N, 3)),
    (nn.KLDivLoss(), LOG_PROBABILITIES, PROBABILITIES),
    (nn.KLDivLoss(reduction="batchmean"), LOG_PROBABILITIES, PROBABILITIES),
    (nn.BCELoss(), random(N, 3).sigmoid(), integers(2, N, 3).double()),
    (nn.BCELoss(weight=torch.tensor([0.2, 3.0, 1.0])), random(N, 3).sigmoid(), integers(2, N, 3).double()),
    (nn.BCELoss(weight=torch.tensor([[0.2, 3.0, 1.0]])), random(N, 3).sigmoid(), integers(2, N, 3).double()),
    (nn.BCELoss(weight=random(N, 1, seed=5).abs()), random(N, 3).sigmoid(), integers(2, N, 3).double()),
    (nn.BCEWithLogitsLoss(), random(N), integers(2, N).double()),
    (nn.BCEWithLogitsLoss(weight=random(N, seed=5).abs()), random(N), integers(2, N).double()),
    (
        nn.BCEWithLogitsLoss(pos_weight=torch.tensor([0.2, 3.0, 1.0])),
        random(N, 3),
        integers(2, N, 3).double(),
    ),
    (nn.MultiLabelMarginLoss(), random(N, C), integers(C, N, C, low=-1)),
    (nn.MultiLabelSoftMarginLoss(), random(N, C), integers(2, N, C)),
    (nn.MultiLabelSoftMarginLoss(weight=CLASS_WEIGHTS), random(N, C), integers(2, N, C)),
    (nn.MultiMarginLoss(), random(N, C), LABELS),
    (nn.MultiMarginLoss(p=2, weight=CLASS_WEIGHTS), random(N, C), LABELS),
    (nn.NLLLoss(), LOG_PROBABILITIES, SOME_IGNORED),
    (nn.NLLLoss(weight=CLASS_WEIGHTS, ignore_index=1), LOG_PROBABILITIES, LABELS),
    (nn.NLLLoss(weight=CLASS_WEIGHTS), random(N, C, 2, 3), integers(C, N, 2, 3)),
    (nn.CrossEntropyLoss(), random(N, C), LABELS),
    (nn.CrossEntropyLoss(), random(N, C), SOME_IGNORED),
    (nn.CrossEntropyLoss(weight=CLASS_WEIGHTS, ignore_index=2), random(N, C), LABELS),
    (nn.CrossEntropyLoss(weight=CLASS_WEIGHTS), random(N, C, 2, 3), integers(C, N, 2, 3)),
    (nn.CrossEntropyLoss(weight=CLASS_WEIGHTS, label_smoothing=0.2), random(N, C), SOME_IGNORED),
    (nn.CrossEntropyLoss(label_smoothing=0.2, ignore_index=0), random(N, C, 3), integers(C, N, 3)),
    (nn.CrossEntropyLoss(), random(N, C), PROBABILITIES),
    (nn.CrossEntropyLoss(weight=CLASS_WEIGHTS, label_smoothing=0.1), random(N, C), PROBABILITIES),
    (nn.CrossEntropyLoss(weight=CLASS_WEIGHTS), random(N, C, 5), random(N, C, 5, seed=6).softmax(1)),
    (nn.CrossEntropyLoss(), random(N, C), PART_IGNORED),
    (nn.CrossEntropyLoss(weight=CLASS_WEIGHTS, label_smoothing=0.1), random(N, C), PART_IGNORED),
    (nn.CrossEntropyLoss(weight=ZERO_WEIGHT), random(N, C), PART_ZERO_WEIGHT),
    (nn.CrossEntropyLoss(weight=ZERO_WEIGHT, label_smoothing=0.1), random(N, C), PART_ZERO_WEIGHT),
    (nn.CrossEntropyLoss(reduction="sum"), random(N, C), PART_IGNORED),
    (nn.MSELoss(reduction="sum"), random(N, 3), random(N, 3, seed=2)),
    (F.cross_entropy, random(N, C), PART_IGNORED),
    (functools.partial(F.cross_entropy, weight=CLASS_WEIGHTS, ignore_index=0), random(N, C), LABELS),
    (functools.partial(F.cross_entropy, reduction="sum"), random(N, C), LABELS),
    (functools.partial(F.nll_loss, ignore_index=1), LOG_PROBABILITIES, LABELS),
    (F.mse_loss, random(N, 3), random(N, 3, seed=2)),
    (
        functools.partial(F.binary_cross_entropy, weight=random(N, 3, seed=5).abs()),
        random(N, 3).sigmoid(),
        integers(2, N, 3).double(),
    ),
]
if hasattr(nn, "LinearCrossEntropyLoss"):  # in torch 2.13 and newer
    TWO_ARGUMENTS += [
        (nn.LinearCrossEntropyLoss(6, C, weight=CLASS_WEIGHTS, dtype=torch.float64), random(N, 6), SOME_IGNORED),
        (nn.LinearCrossEntropyLoss(6, C, dtype=torch.float64), random(N, 6), PART_IGNORED),
    ]

LENGTHS = integers(4, N, low=1)
# Losses with other arguments: criterion, the outputs, the remaining arguments by sample.
MORE_ARGUMENTS = [
    (nn.GaussianNLLLoss(), [random(N, 3)], [random(N, 3, seed=2), random(N, 3, seed=4).exp()]),
    (nn.CosineEmbeddingLoss(margin=0.1), [random(N, 3), random(N, 3, seed=2)], [signs(N)]),
    (nn.MarginRankingLoss(margin=0.1), [random(N), random(N, seed=2)], [signs(N)]),
    (nn.TripletMarginLoss(), [random(N, 3), random(N, 3, seed=2), random(N, 3, seed=4)], []),
    (nn.TripletMarginWithDistanceLoss(), [random(N, 3), random(N, 3, seed=2), random(N, 3, seed=4)], []),
    (
        nn.CTCLoss(),
        [random(N, 12, C).log_softmax(2)],
        [integers(C, N, 4, low=1), torch.full((N,), 12), LENGTHS],
    ),
]


def assert_close(actual, expected):
    assert torch.isfinite(expected).all()
    assert (actual - expected).abs().max() <= TOLERANCE * expected.abs().max()


def split_loss(criterion, outputs, targets, error=0.0):
    """Return the sum of the losses of two ranks. `error` makes the first rank's weight wrong."""
    total = local_weight(criterion, targets, NUM_SAMPLES)
    loss = 0.0
    for index, part in enumerate(PARTS):
        num_samples = part.stop - part.start
        weight = local_weight(criterion, targets[part], num_samples) * (1 + error * (index == 0))
        local = split_criterion(criterion, targets, part.start, part.stop)
        loss = loss + local_loss(local, outputs[part], targets[part], weight, total)
    return loss


def names(cases):
    return [criterion_name(criterion) for criterion, *_ in cases]


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides", "ignore:Using a target size")
@pytest.mark.parametrize(("criterion", "outputs", "targets"), TWO_ARGUMENTS, ids=names(TWO_ARGUMENTS))
def test_parts_give_the_mean_of_the_whole(criterion, outputs, targets):
    """Values and gradients of a 7+3 split equal those of the whole; a weight that is 1 % wrong is noticed."""
    assert is_known(criterion)
    whole, parts, wrong = (outputs.clone().requires_grad_() for _ in range(3))
    expected = criterion(whole, targets)
    expected.backward()
    loss = split_loss(criterion, parts, targets)
    loss.backward()
    assert_close(loss.detach(), expected.detach())
    assert_close(parts.grad, whole.grad)
    if getattr(criterion, "reduction", "mean") != "sum" and "sum" not in getattr(criterion, "keywords", {}).values():
        split_loss(criterion, wrong, targets, error=0.01).backward()
        with pytest.raises(AssertionError):
            assert_close(wrong.grad, whole.grad)


@pytest.mark.parametrize(("criterion", "outputs", "rest"), MORE_ARGUMENTS, ids=names(MORE_ARGUMENTS))
def test_weights_of_losses_with_more_arguments(criterion, outputs, rest):
    """Losses with other arguments are called in a function of the user's; their weights are right too."""
    assert is_known(criterion)
    targets = rest[0] if rest else None

    def loss_of(part, tensors):
        if isinstance(criterion, nn.CTCLoss):  # the first dimension of CTCLoss's input is time
            tensors = [tensor.transpose(0, 1) for tensor in tensors]
            return criterion(*(tensor[:, part] for tensor in tensors), *(tensor[part] for tensor in rest))
        middle = 1 if isinstance(criterion, nn.GaussianNLLLoss) else len(tensors)
        arguments = [*tensors[:middle], *rest]
        return criterion(*(argument[part] for argument in arguments))

    whole, parts = ([tensor.clone().requires_grad_() for tensor in outputs] for _ in range(2))
    expected = loss_of(slice(None), whole)
    expected.backward()
    total = local_weight(criterion, targets, NUM_SAMPLES)
    loss = 0.0
    for part in PARTS:
        part_targets = None if targets is None else targets[part]
        loss = loss + loss_of(part, parts) * (local_weight(criterion, part_targets, part.stop - part.start) / total)
    loss.backward()
    assert_close(loss.detach(), expected.detach())
    for actual, reference in zip(parts, whole, strict=True):
        assert_close(actual.grad, reference.grad)


def test_every_loss_of_torch_is_covered():
    """A loss that torch adds in the future makes this test fail."""
    tested = {type(criterion) for criterion, *_ in [*TWO_ARGUMENTS, *MORE_ARGUMENTS]}
    classes = {
        value
        for _, value in inspect.getmembers(losses, inspect.isclass)
        if issubclass(value, losses._Loss) and not value.__name__.startswith("_")
    }
    assert classes - tested == {losses.NLLLoss2d}  # NLLLoss2d is deprecated
    with pytest.warns(FutureWarning):
        assert is_known(losses.NLLLoss2d())


def test_parts_of_other_shapes():
    """Parts that each rank passes itself may have different numbers of elements per sample."""
    assert local_weight(nn.MSELoss(), torch.ones(3, 5), 3) == 15
    assert local_weight(nn.KLDivLoss(reduction="batchmean"), torch.ones(3, 5), 3) == 3
    assert local_weight(nn.CrossEntropyLoss(), torch.full((3, 5), 1), 3) == 15
    assert local_weight(nn.CrossEntropyLoss(), torch.ones(3, 4, 5), 3) == 15
    assert local_weight(nn.MultiMarginLoss(), torch.ones(3), 3) == 3
    assert local_weight(nn.MSELoss(reduction="sum"), torch.ones(3, 5), 3) == 1


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_all_targets_ignored(reduction):
    """One process gets NaN from a mean, 0 from a sum, and a zero gradient; two ranks get the same."""
    criterion = nn.CrossEntropyLoss(reduction=reduction)
    outputs, targets = random(N, C).requires_grad_(), torch.full((N,), -100)
    expected = criterion(outputs, targets)
    loss = split_loss(criterion, outputs, targets)
    loss.backward()
    assert torch.equal(loss.isnan(), expected.isnan())
    assert torch.equal(outputs.grad, torch.zeros(N, C))


def test_weight_zero_keeps_the_graph():
    """A rank whose targets are all ignored must still run backward, since BatchNorm exchanges sums there."""
    outputs = random(3, C).requires_grad_()
    targets = torch.full((3,), -100)
    loss = local_loss(nn.CrossEntropyLoss(), outputs, targets, local_weight(nn.CrossEntropyLoss(), targets, 3), 5.0)
    assert loss.item() == 0
    loss.backward()
    assert torch.equal(outputs.grad, torch.zeros(3, C))


def test_options_are_changed_in_a_copy_only():
    """Cutting the weight does not change the user's criterion."""
    weight = random(N, 3).abs()
    criterion = nn.BCELoss(weight=weight)
    local = split_criterion(criterion, torch.ones(N, 3), 7, 10)
    assert torch.equal(local.weight, weight[7:10])
    assert criterion.weight is weight
    assert criterion.state_dict().keys() == {"weight"}
    plain = nn.BCELoss(weight=torch.ones(3))
    assert split_criterion(plain, torch.ones(N, 3), 7, 10) is plain


class OwnForward(nn.CrossEntropyLoss):
    """Loss whose mean is not that of its parent class."""

    def forward(self, outputs, targets):
        return outputs.mean()


class OwnReduction(nn.Module):
    """Loss with its own `reduction`, as in many other libraries."""

    def __init__(self, reduction):
        super().__init__()
        self.reduction = reduction

    def forward(self, outputs, targets):
        losses = (outputs - targets).abs()
        return losses.sum() if self.reduction == "sum" else losses.mean()


UNKNOWN = [
    lambda outputs, targets: F.cross_entropy(outputs, targets),
    OwnForward(),
    OwnReduction("mean"),
    functools.partial(F.cross_entropy, size_average=False),
    functools.partial(F.mse_loss, weight=torch.ones(3)),
]


@pytest.mark.parametrize("criterion", UNKNOWN, ids=map(criterion_name, UNKNOWN))
def test_others_count_samples(criterion):
    """Unknown losses count as means over samples, and `is_known` is False for them."""
    assert not is_known(criterion)
    assert local_weight(criterion, PART_IGNORED[7:], 3) == 3


def test_other_sums_are_sums():
    """A module with `reduction="sum"` counts as a sum."""
    assert is_known(OwnReduction("sum"))
    outputs, targets = random(N, 3), random(N, 3, seed=2)
    assert_close(split_loss(OwnReduction("sum"), outputs, targets), OwnReduction("sum")(outputs, targets))


def test_compiled_criterion():
    """torch.compile wraps a module, whose mean stays the same. (Not run, since that would need a compiler.)"""
    criterion = torch.compile(nn.CrossEntropyLoss(weight=CLASS_WEIGHTS))
    assert is_known(criterion)
    assert local_weight(criterion, LABELS, N) == pytest.approx(float(CLASS_WEIGHTS[LABELS].sum()))
    assert criterion_name(criterion) == "CrossEntropyLoss"


@pytest.mark.parametrize(
    "criterion",
    [
        nn.MSELoss(reduction="none"),
        functools.partial(F.cross_entropy, reduction="none"),
        OwnReduction("none"),
    ],
    ids=criterion_name,
)
def test_no_reduction_is_refused(criterion):
    """A criterion with reduction="none" is refused, since it returns no single loss."""
    with pytest.raises(ValueError, match=f'{criterion_name(criterion)} has reduction="none".*use reduction="mean"'):
        local_weight(criterion, LABELS, N)


@pytest.mark.parametrize(
    ("criterion", "outputs", "targets", "what"),
    [
        (nn.MSELoss(), random(N, 1), random(N), "each sample with every other sample"),
        (nn.MSELoss(reduction="sum"), random(N, 1), random(N), "each sample with every other sample"),
        (nn.CrossEntropyLoss(), random(N), random(N).softmax(0), "the batch for a single sample"),
        (nn.MultiMarginLoss(), random(N), integers(C, 1), "the batch for a single sample"),
    ],
)
def test_losses_across_samples_are_refused(criterion, outputs, targets, what):
    """A mean over pairs of samples is not a mean of the parts' means. The message is the same on all ranks."""
    with pytest.raises(ValueError, match=what) as first:
        local_loss(criterion, outputs[:7], targets[:7], 7, 10)
    with pytest.raises(ValueError, match="outputs of shape \\[batch") as second:
        local_loss(criterion, outputs[7:], targets[7:], 3, 10)
    if targets.size(0) == N:
        assert str(first.value) == str(second.value)
