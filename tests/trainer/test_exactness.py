# SPDX-License-Identifier: Apache-2.0
"""N ranks give the results of one process on the same global batch."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from one_process import assert_same, plain_step, relative_difference
from ranks import everywhere, on_ranks
from small_models import F64, Net, NormNet, batch, regression_batch, sgd
from torch import nn

from distributed_trainer import create_distributed_trainer
from distributed_trainer.trainer import step as computation

pytestmark = pytest.mark.each_mpi

SIZES = [12, 7, 2, 1]  # a multiple of 1 to 4 ranks, not a multiple, fewer than the ranks, one
F32 = torch.float32
several = on_ranks(2, 3, 4, (2, 1), (3, 2), (4, 2))


def check_steps(make, batches, criterion, make_optimizer, gradient_tolerance, final_tolerance):
    """Train beside plain torch. Compare gradients in the first step only: later the parameters differ by rounding."""
    model, reference = make(), make()
    trainer = create_distributed_trainer(model)
    optimizer, plain_optimizer = make_optimizer(model.parameters()), make_optimizer(reference.parameters())
    for step, (x, y) in enumerate(batches):
        loss = trainer.train_step(x, y, criterion, optimizer)
        expected_loss = plain_step(reference, x, y, criterion, plain_optimizer)
        assert loss.shape == ()
        assert loss.dtype == expected_loss.dtype
        assert not loss.requires_grad
        if step == 0:
            assert relative_difference(loss, expected_loss) <= gradient_tolerance
            for (name, parameter), other in zip(model.named_parameters(), reference.parameters(), strict=True):
                assert relative_difference(parameter.grad, other.grad) <= gradient_tolerance, name
    named = [*model.named_parameters(), *model.named_buffers()]
    for (name, tensor), other in zip(named, [*reference.parameters(), *reference.buffers()], strict=True):
        assert relative_difference(tensor.detach(), other.detach()) <= final_tolerance, name
    trainer.close()


OPTIMIZERS = {
    "sgd": functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9),
    "adam": functools.partial(torch.optim.Adam, lr=0.01),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@on_ranks(1, 2, 3, 4, (3, 2))
def test_fifty_steps(world, optimizer):
    """Train in float64, with batches of all sizes in turn."""
    batches = [batch(SIZES[step % 4], F64, step) for step in range(50)]
    check_steps(lambda: Net(F64), batches, nn.CrossEntropyLoss(), OPTIMIZERS[optimizer], 1e-12, 1e-9)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@on_ranks(1, 2, 3, 4, (3, 2))
def test_fifty_steps_with_batchnorm(world, optimizer):
    """BatchNorm uses the statistics of the global batch; running statistics are compared too."""
    batches = [batch([12, 7, 3, 2][step % 4], F64, step) for step in range(50)]
    check_steps(lambda: NormNet(F64), batches, nn.CrossEntropyLoss(), OPTIMIZERS[optimizer], 1e-12, 1e-9)


@pytest.mark.parametrize("num_samples", SIZES)
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@everywhere
def test_one_step(world, dtype, num_samples):
    tolerance = 1e-5 if dtype == F32 else 1e-12
    steps = [batch(num_samples, dtype)]
    check_steps(lambda: Net(dtype), steps, nn.CrossEntropyLoss(), OPTIMIZERS["sgd"], tolerance, tolerance)


@several
def test_one_percent_is_noticed(world, monkeypatch):
    """The checks of this file fail if one rank's weight is 1 % wrong."""
    exact = computation.local_loss

    def wrong(criterion, outputs, targets, weight, total):
        return exact(criterion, outputs, targets, weight * (1.01 if world.rank == 0 else 1), total)

    monkeypatch.setattr(computation, "local_loss", wrong)
    with pytest.raises(AssertionError):
        check_steps(lambda: Net(F32), [batch(7, F32)], nn.CrossEntropyLoss(), OPTIMIZERS["sgd"], 1e-5, 1e-5)


CLASS_WEIGHTS = torch.tensor([0.1, 2.0, 0.7, 1.3], dtype=F64)


def squared(outputs, targets):
    return (outputs[:, 0] - targets).square().mean()


CRITERIA = {
    "cross entropy, sum": nn.CrossEntropyLoss(reduction="sum"),
    "class weights": nn.CrossEntropyLoss(weight=CLASS_WEIGHTS),
    "class weights, ignore_index": nn.CrossEntropyLoss(weight=CLASS_WEIGHTS, ignore_index=2),
    "label smoothing": nn.CrossEntropyLoss(weight=CLASS_WEIGHTS, ignore_index=2, label_smoothing=0.1),
    "functional": F.cross_entropy,
    "partial": functools.partial(F.cross_entropy, weight=CLASS_WEIGHTS, ignore_index=1),
    "own": squared,
}


@pytest.mark.parametrize("criterion", CRITERIA)
@everywhere
def test_criteria(world, criterion):
    for num_samples in (7, 2):
        steps = [batch(num_samples, F64, seed=3)]
        check_steps(lambda: Net(F64), steps, CRITERIA[criterion], OPTIMIZERS["sgd"], 1e-12, 1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@everywhere
def test_elementwise_criterion(world, reduction):
    x, _ = batch(7, F64)
    y = torch.randn(7, 4, generator=torch.Generator().manual_seed(2), dtype=F64)
    check_steps(lambda: Net(F64), [(x, y)], nn.MSELoss(reduction=reduction), OPTIMIZERS["sgd"], 1e-12, 1e-12)


@everywhere
def test_no_reduction(world):
    """Every rank refuses reduction="none" before any communication; the trainer stays usable."""
    model = Net(F64)
    trainer = create_distributed_trainer(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for criterion in (nn.CrossEntropyLoss(reduction="none"), functools.partial(F.nll_loss, reduction="none")):
        with pytest.raises(ValueError, match='reduction="none"'):
            trainer.train_step(*batch(7, F64), criterion, optimizer)
    trainer.train_step(*batch(7, F64), nn.CrossEntropyLoss(), optimizer)
    trainer.close()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64], ids=str)
@everywhere
def test_class_weights(world, dtype):
    """As many classes as samples of a part, so that uint8 targets could be taken for a mask."""
    criterion = nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 3.0], dtype=F64))
    model, reference = nn.Linear(4, 3, dtype=F64), nn.Linear(4, 3, dtype=F64)
    reference.load_state_dict(model.state_dict())
    trainer = create_distributed_trainer(model)
    reference.load_state_dict(model.state_dict())
    x = torch.randn(3 * world.size, 4, dtype=F64)
    y = (torch.arange(3 * world.size) % 7 % 3).to(dtype)
    loss = trainer.train_step(x, y, criterion, sgd(model))
    assert relative_difference(loss, plain_step(reference, x, y, criterion, sgd(reference))) < 1e-12
    trainer.close()


@everywhere
def test_ignored_targets(world):
    """All targets of one rank are ignored; all but one sample's; all."""
    criterion = nn.CrossEntropyLoss(ignore_index=-1, weight=CLASS_WEIGHTS)
    for kept in ([slice(6)], [slice(3, 4)]):
        x, y = batch(8, F64)
        ignored = torch.full_like(y, -1)
        for part in kept:
            ignored[part] = y[part]
        check_steps(lambda: Net(F64), [(x, ignored)], criterion, OPTIMIZERS["sgd"], 1e-12, 1e-12)
    model = Net(F64)
    trainer = create_distributed_trainer(model)
    loss = trainer.train_step(x, torch.full_like(y, -1), criterion, torch.optim.SGD(model.parameters(), lr=0.1))
    assert loss.isnan()  # one process gets NaN too
    trainer.close()


@everywhere
def test_loss_bits(world):
    """The loss has the same bits on every rank, in every dtype."""
    for dtype in (F32, F64, torch.bfloat16):
        model = Net(dtype)
        trainer = create_distributed_trainer(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for num_samples in (7, 2):
            loss = trainer.train_step(*batch(num_samples, dtype), nn.CrossEntropyLoss(), optimizer)
            assert len(set(world.gather(loss.view(1).view(torch.uint8).numpy().tobytes()))) == 1
        states = [tuple(p.detach().view(torch.uint8).numpy().tobytes() for p in model.parameters())]
        assert len(set(world.gather(states[0]))) == 1
        trainer.close()


class SmallNorm(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)).double()

    def forward(self, x):
        return self.layers(x)


@everywhere
def test_batchnorm_with_empty_parts(world):
    """There are 3 samples on 4 ranks, and 2, where one process may train but a rank with one sample alone may not."""
    for num_samples in (3, 2):
        generator = torch.Generator().manual_seed(5)
        x = torch.randn(num_samples, 3, generator=generator, dtype=F64)
        y = torch.arange(num_samples) % 2
        check_steps(SmallNorm, [(x, y)] * 3, nn.CrossEntropyLoss(), OPTIMIZERS["sgd"], 1e-12, 1e-10)


@everywhere
def test_batchnorm_with_samples_of_weight_0(world):
    """Samples to which `weight=` gives 0 count in the statistics of BatchNorm, as in one process; their loss is NaN."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 2)).double()
    reference = copy.deepcopy(model)
    optimizer, plain = sgd(model), sgd(reference)

    def labelled(y):
        return ~y.isnan().any(1)

    def mean(outputs, y):
        return (outputs - y)[labelled(y)].square().sum(1).mean()

    trainer = create_distributed_trainer(model)
    for step in range(3):
        x, y = regression_batch(9, step, inputs=4, outputs=2)
        y[:7] = torch.nan
        loss = trainer.train_step(x, y, mean, optimizer, weight=lambda y: labelled(y).sum())
        expected = plain_step(reference, x, y, mean, plain)
        assert relative_difference(loss, expected) < 1e-11
    assert_same(model, reference, 1e-10)
    trainer.close()


@everywhere
def test_sync_batchnorm_off(world):
    """Each rank normalises by its own part, and rank 0's statistics are copied to all ranks."""
    model = SmallNorm()
    reference = copy.deepcopy(model)
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(5), dtype=F64)
    y = torch.arange(8) % 2
    trainer = create_distributed_trainer(model, sync_batchnorm=False)
    trainer.train_step(x, y, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.1))
    bounds = [divmod(8, world.size)] * world.size
    start, sums = 0, None
    for rank, (share, longer) in enumerate(bounds):
        stop = start + share + (rank < longer)
        part = copy.deepcopy(reference)
        (nn.CrossEntropyLoss()(part(x[start:stop]), y[start:stop]) * (stop - start) / 8).backward()
        gradients = [parameter.grad for parameter in part.parameters()]
        sums = gradients if sums is None else [a + b for a, b in zip(sums, gradients, strict=True)]
        if rank == 0:
            for tensor, expected in zip(model.buffers(), part.buffers(), strict=True):
                assert torch.equal(tensor, expected)
        start = stop
    for parameter, expected in zip(model.parameters(), sums, strict=True):
        assert relative_difference(parameter.grad, expected) <= 1e-12
    trainer.close()
