# SPDX-License-Identifier: Apache-2.0
"""A list of optimizers makes one step: all of them or none, with one norm, in checkpoints and logs by position."""

import copy
import logging
import math

import pytest
import torch
from one_process import assert_same
from ranks import on_ranks, same_message
from small_models import F64, mlp, regression_batch
from torch import nn

from distributed_trainer import create_distributed_trainer

some = on_ranks(1, 2, 3)
SIZES = [7, 2, 1]
MEAN = nn.MSELoss()
OPTIM = torch.optim


class Words(nn.Module):
    """Model whose embedding has sparse gradients."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(30, 6, sparse=True, dtype=F64)
        self.linear = nn.Linear(18, 4, dtype=F64)

    def forward(self, x):
        return self.linear(self.embedding(x).flatten(1))


def words(num_samples, seed):
    generator = torch.Generator().manual_seed(seed)
    sizes = [(num_samples, 3), (num_samples,)]
    return [torch.randint(high, size, generator=generator) for high, size in zip((30, 4), sizes, strict=True)]


def small_mlp():
    return mlp(9, 13, 3)


def batches(count, first=0):
    return [regression_batch(SIZES[step % 3], 1 + step, inputs=9, outputs=3) for step in range(first, first + count)]


def muon_and_adamw(model):
    matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    others = [parameter for parameter in model.parameters() if parameter.dim() != 2]
    return [OPTIM.Muon(matrices, lr=0.05), OPTIM.AdamW(others, lr=0.02)]


def sgd_and_adam(model):
    return [OPTIM.SGD(model[0].parameters(), lr=0.1, momentum=0.9), OPTIM.Adam(model[2].parameters(), lr=0.02)]


def sparse_and_adam(model):
    return OPTIM.SparseAdam(model.embedding.parameters(), lr=0.1), OPTIM.Adam(model.linear.parameters(), lr=0.1)


def plain_step(model, x, y, criterion, optimizers, clip_norm=None):
    """Step in one process; return the gradients' norm if they are clipped."""
    model.zero_grad()
    criterion(model(x), y).backward()
    norm = None if clip_norm is None else nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    for optimizer in optimizers:
        optimizer.step()
    return norm


@pytest.mark.parametrize("kind", ["muon", "sparse", "clipped", "sharded", "several batches"])
@some
def test_same_as_one_process(world, kind):
    """Steps of two optimizers equal those in one process, at any batch size."""
    if kind == "muon" and not hasattr(OPTIM, "Muon"):
        pytest.skip("torch has no Muon before 2.9")
    make = {"muon": muon_and_adamw, "sparse": sparse_and_adam}.get(kind, sgd_and_adam)
    model = Words() if kind == "sparse" else small_mlp()
    reference = copy.deepcopy(model)
    criterion = nn.CrossEntropyLoss() if kind == "sparse" else MEAN
    trainer = create_distributed_trainer(model, shard="optimizer" if kind == "sharded" else None)
    optimizers, expected = make(model), make(reference)
    clip_norm = None if kind in ("muon", "sparse") else 0.1
    data = [words(SIZES[step % 3], step) for step in range(6)] if kind == "sparse" else batches(6)
    for x, y in data:
        norm = plain_step(reference, x, y, criterion, expected, clip_norm)
        if kind == "several batches":
            own = trainer.split((x, y))
            is_empty = not len(own[1])
            inputs, targets = (x[:1], y[:1]) if is_empty else own
            model.zero_grad()
            trainer.backward(criterion(model(inputs), targets), weight=0 if is_empty else len(targets))
            found = trainer.step(optimizers, clip_norm=clip_norm)
        else:
            trainer.train_step(x, y, criterion, optimizers, clip_norm=clip_norm)
            found = trainer.gradient_norm
        if norm is not None:
            assert norm > clip_norm
            torch.testing.assert_close(found, norm, rtol=1e-12, atol=0)
    assert_same(model, reference, rtol=1e-11)
    trainer.close()


@pytest.mark.parametrize("shard", [None, "optimizer"])
@some
def test_not_finite(world, shard):
    """No optimizer steps, if a gradient of any of them is infinite or NaN."""
    for mode in ("skip", "raise"):
        model = small_mlp()
        trainer = create_distributed_trainer(model, nonfinite_gradients=mode, shard=shard)
        optimizers = sgd_and_adam(model)
        x, y = regression_batch(6, inputs=9, outputs=3)
        trainer.train_step(x, y, MEAN, optimizers)
        before = copy.deepcopy(model.state_dict())
        states = [copy.deepcopy(optimizer.state_dict()) for optimizer in optimizers]

        def only_last_layer(outputs, targets, last=model[2]):
            return (outputs.detach() * last.bias * math.inf).sum()

        only_last_layer.reduction = "sum"
        if mode == "raise":
            with pytest.raises(FloatingPointError, match=r"the gradient of 2\.bias is infinite or NaN"):
                trainer.train_step(x, y, only_last_layer, optimizers)
        else:
            trainer.train_step(x, y, only_last_layer, optimizers)
            assert trainer.num_skipped_steps == 1
        assert_same(model.state_dict(), before, rtol=0)
        torch.testing.assert_close([optimizer.state_dict() for optimizer in optimizers], states, rtol=0, atol=0)
        trainer.close()


@some
def test_refused(world):
    """Lists that cannot make a step are refused by name before any communication."""
    model = small_mlp()
    trainer = create_distributed_trainer(model)
    first, second = sgd_and_adam(model)
    both = OPTIM.SGD(model.parameters(), lr=0.1)
    foreign = OPTIM.SGD(small_mlp().parameters(), lr=0.1)
    lbfgs = OPTIM.LBFGS(model[2].parameters())
    wrong = [
        ([], TypeError, "a list of at least one, not an empty list"),
        ([first, 0.1], TypeError, r"each optimizer of the list must be a torch\.optim\.Optimizer, not float"),
        ({first, second}, TypeError, r"optimizer must be a torch\.optim\.Optimizer, not set"),
        ([first, both], ValueError, r"0\.weight is a parameter of optimizer\[1\] and of one before it in the list"),
        ([second, second], ValueError, r"2\.weight is a parameter of optimizer\[1\]"),
        ([first, foreign], ValueError, "4 parameter\\(s\\) that are not the model's"),
        ([first, lbfgs], ValueError, "LBFGS computes the loss several times"),
    ]
    x, y = regression_batch(6, inputs=9, outputs=3)
    for optimizers, kind, message in wrong:
        if world.rank == 0:
            with pytest.raises(kind, match=message):
                trainer.train_step(x, y, MEAN, optimizers)
    with pytest.raises(ValueError, match="a closure goes with one optimizer"):
        trainer.step([first, second], lambda: None)
    trainer.train_step(x, y, MEAN, [first, second])
    trainer.close()
    sharded = create_distributed_trainer(model, shard="optimizer")
    with pytest.raises(ValueError, match=r'shard="optimizer" does not work with SparseAdam'):
        sharded.train_step(x, y, MEAN, [first, OPTIM.SparseAdam(model[2].parameters())])
    sharded.close()


@on_ranks(2)
def test_warnings(world, caplog):
    """A new optimizer for the parameters of any of the last ones loses its state; the same list does not."""
    model = small_mlp()
    trainer = create_distributed_trainer(model)
    first, second = sgd_and_adam(model)
    x, y = regression_batch(6, inputs=9, outputs=3)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            trainer.train_step(x, y, MEAN, [first, second])
        assert not caplog.records
        trainer.train_step(x, y, MEAN, [first, OPTIM.Adam(model[2].parameters())])
    messages = [record.getMessage() for record in caplog.records]
    assert ["new Adam, so the state of the last one" in message for message in messages] == [True] * (world.rank == 0)
    trainer.close()


@on_ranks(2)
def test_logged(world):
    """The writers get the learning rate of each optimizer."""

    class Log:
        def log(self, figures, step):
            rates.append({name: value for name, value in figures.items() if name.startswith("learning_rate")})

    rates = []
    model = small_mlp()
    trainer = create_distributed_trainer(model)
    trainer.log_to(Log())
    optimizers = sgd_and_adam(model)
    schedule = OPTIM.lr_scheduler.ExponentialLR(optimizers[1], 0.5)
    for x, y in batches(2):
        trainer.train_step(x, y, MEAN, optimizers)
        schedule.step()
    assert (
        rates
        == [
            {"learning_rate": 0.1, "learning_rate_1": 0.02},
            {"learning_rate": 0.1, "learning_rate_1": 0.01},
        ][: 2 * (world.rank == 0)]
    )
    trainer.close()


class Run:
    """Training with a list of optimizers, and a list of schedulers."""

    def __init__(self, **options):
        self.model = small_mlp()
        self.trainer = create_distributed_trainer(self.model, **options)
        self.optimizers = sgd_and_adam(self.model)
        self.schedules = [OPTIM.lr_scheduler.ExponentialLR(optimizer, 0.8) for optimizer in self.optimizers]
        self.objects = {"optimizer": self.optimizers, "schedules": tuple(self.schedules)}

    def train(self, data):
        for x, y in data:
            self.trainer.train_step(x, y, MEAN, self.optimizers, clip_norm=0.5)
            for schedule in self.schedules:
                schedule.step()


@pytest.mark.parametrize("shard", [None, "optimizer"])
@on_ranks(3)
def test_checkpoint(world, shared_folder, shard):
    """A checkpoint of 2 ranks continues on 3 ranks and on 1, as a run in one process that was not interrupted."""
    reference = small_mlp()
    expected = sgd_and_adam(reference)
    schedules = [OPTIM.lr_scheduler.ExponentialLR(optimizer, 0.8) for optimizer in expected]
    for x, y in batches(7):
        plain_step(reference, x, y, MEAN, expected, 0.5)
        for schedule in schedules:
            schedule.step()

    is_alone = world.rank == 2
    two_and_one = world.comm.Split(is_alone)
    run = Run(group=two_and_one, shard=shard)
    run.train(batches(4))
    if not is_alone:
        run.trainer.save(shared_folder, **run.objects)
    run.trainer.close()
    world.comm.Barrier()
    for group in (world.comm, two_and_one):
        run = Run(group=group, shard=shard)
        assert run.trainer.resume(shared_folder, **run.objects) == 4
        run.train(batches(3, first=4))
        run.trainer.close()
        assert_same(run.model, reference)
        assert [optimizer.param_groups[0]["lr"] for optimizer in run.optimizers] == [
            optimizer.param_groups[0]["lr"] for optimizer in expected
        ]


@on_ranks(2)
def test_checkpoint_refused(world, shared_folder):
    """Lists of another length, or of other optimizers at a position, are refused on every rank; nothing has changed."""
    run = Run()
    run.train(batches(1))
    run.trainer.save(shared_folder, **run.objects)
    run.trainer.close()
    run = Run()
    first, second = run.optimizers
    wrong = [
        ([first], r"optimizer is a list of 2 in .*, but a list of 1 is to be loaded. Pass as many"),
        ([first, second, first], r"optimizer is a list of 2 in .*, but a list of 3 is to be loaded"),
        ([second, first], r"optimizer\[0\] is a SGD in .*, but a Adam is to be loaded"),
        (first, r"holds the model and optimizer\[0\], optimizer\[1\], .*, but the model and optimizer, .* are to be"),
    ]
    before = copy.deepcopy(run.model.state_dict())
    for optimizers, message in wrong:
        with pytest.raises(ValueError, match=message) as error:
            run.trainer.load(shared_folder, **{**run.objects, "optimizer": optimizers})
        same_message(world, error)
    assert_same(run.model.state_dict(), before, rtol=0)
    with pytest.raises(TypeError, match=r"optimizer\[1\] must have state_dict and load_state_dict"):
        run.trainer.save(shared_folder, optimizer=[first, 3])
    run.trainer.close()
