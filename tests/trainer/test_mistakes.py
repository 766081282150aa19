# SPDX-License-Identifier: Apache-2.0
"""Mistakes of beginners: each has a message in the user's words, on every rank, before any weight changes."""

import copy
import logging
import re

import pytest
import torch
from one_process import assert_same
from ranks import mixed, on_ranks, same_message
from scripts import START_SECONDS, TRAINER
from small_models import F64, Net, batch, mlp, sgd
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset

from distributed_trainer import MismatchError, create_distributed_trainer

some = on_ranks(1, 2)
several = on_ranks(2, 3)


class Log:
    def __init__(self):
        self.steps = []

    def log(self, figures, step):
        self.steps.append(step)


@pytest.mark.parametrize(
    ("criterion", "change", "options", "kind", "message"),
    [
        (nn.CrossEntropyLoss, None, {}, TypeError, r"criterion is the class CrossEntropyLoss: .* CrossEntropyLoss\(\)"),
        (
            nn.CrossEntropyLoss(),
            torch.Tensor.float,
            {},
            ValueError,
            r"targets of torch.float32 and shape \[\d\]. Class numbers are integers: pass targets.long\(\)",
        ),
        (nn.CrossEntropyLoss(), None, {"clip_norm": "1"}, TypeError, "clip_norm must be a number, not str"),
    ],
    ids=["class", "float-labels", "clip-text"],
)
@some
def test_arguments(world, criterion, change, options, kind, message):
    model = Net(F64)
    trainer = create_distributed_trainer(model)
    x, y = batch(3 * world.size, F64)
    with pytest.raises(kind, match=message) as raised:
        trainer.train_step(x, y if change is None else change(y), criterion, sgd(model), **options)
    same_message(world, raised)
    assert_same(model, Net(F64), 0)
    trainer.close()


@some
def test_wrapped_model(world):
    for model in (nn.DataParallel(nn.Linear(2, 2)), nn.Sequential(nn.DataParallel(nn.Linear(2, 2)))):
        with pytest.raises(TypeError, match=r"(the model|0) is wrapped by DataParallel, .* Pass the model without it"):
            create_distributed_trainer(model)
    group = world.group()
    with pytest.raises(TypeError, match="the model is wrapped by DistributedDataParallel"):
        create_distributed_trainer(DistributedDataParallel(nn.Linear(2, 2), process_group=group))


@some
def test_lbfgs(world):
    """An optimizer that needs a closure is refused by train_step, and trained by `step`, as the message says."""
    model, reference = mlp(3, 2), mlp(3, 2)
    trainer = create_distributed_trainer(model)
    optimizer, plain = torch.optim.LBFGS(model.parameters()), torch.optim.LBFGS(reference.parameters())
    torch.manual_seed(1)
    x, y = torch.randn(6, 3, dtype=F64), torch.randn(6, 2, dtype=F64)
    with pytest.raises(
        ValueError, match=r"LBFGS computes the loss several times .* trainer.step\(optimizer, closure\)"
    ):
        trainer.train_step(x, y, nn.MSELoss(), optimizer)
    own_x, own_y = trainer.split((x, y))

    def closure():
        optimizer.zero_grad()
        return trainer.backward(nn.functional.mse_loss(model(own_x), own_y), weight=len(own_x))

    def plain_closure():
        plain.zero_grad()
        loss = nn.functional.mse_loss(reference(x), y)
        loss.backward()
        return loss

    trainer.step(optimizer, closure)
    plain.step(plain_closure)
    assert_same(model, reference, 1e-9)
    trainer.close()


@mixed
def test_complex_parameters(world):
    """Complex gradients are looked at for infinite and NaN parts, too."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2, dtype=torch.complex64)
    trainer = create_distributed_trainer(model, nonfinite_gradients="skip")
    reference, optimizer = copy.deepcopy(model), sgd(model)
    x, y = torch.randn(2 * world.size, 3, dtype=torch.complex64), torch.randn(2 * world.size, 2)

    def loss(outputs, targets):
        return (outputs.abs() - targets).square().sum()

    loss.reduction = "sum"
    plain = sgd(reference)
    loss(reference(x), y).backward()
    plain.step()
    trainer.train_step(x, y, loss, optimizer)
    assert_same(model, reference, 1e-5)
    x[-1, 0] = complex(0, float("inf"))
    trainer.train_step(x, y, loss, optimizer)
    assert trainer.num_skipped_steps == 1
    assert_same(model, reference, 1e-5)
    trainer.close()


@mixed
def test_log_to_on_rank_0(world):
    """Only rank 0 has to call log_to; another rank's writer gets nothing."""
    model = Net(F64)
    trainer = create_distributed_trainer(model)
    optimizer, log, other = sgd(model), Log(), Log()
    if trainer.is_main:
        trainer.log_to(log, every=2)
    if world.rank == 1:
        trainer.log_to(other)
    for step in range(4):
        trainer.train_step(*batch(6, F64, step), nn.CrossEntropyLoss(), optimizer)
    assert log.steps == ([2, 4] if world.rank == 0 else [])
    assert other.steps == []
    trainer.close()


@mixed
def test_evaluate_generator(world):
    """A generator around trainer.loader yields this rank's parts; one around a plain loader yields whole batches."""
    model = mlp(3, 2)
    trainer = create_distributed_trainer(model)
    torch.manual_seed(1)
    x, y = torch.randn(7, 3, dtype=F64), torch.randn(7, 2, dtype=F64)
    loader = trainer.loader(TensorDataset(x, y), 3)  # the last batch has one sample
    expected = nn.functional.mse_loss(model(2 * x), y).item()
    metrics = {"error": lambda outputs, targets: (outputs - targets).square()}
    for batches in (((2 * a, b) for a, b in loader), ((2 * a, b) for a, b in zip(x.split(3), y.split(3), strict=True))):
        result = trainer.evaluate(batches, nn.MSELoss(), metrics)
        assert abs(result["loss"] - expected) < 1e-12
        assert abs(result["error"] - expected) < 1e-12
    trainer.close()


@pytest.mark.parametrize("reads_parts", [False, True], ids=["whole", "parts"])
@several
def test_evaluate_raises(world, reads_parts):
    """An exception of one rank's metric is every rank's, and no rank waits."""
    model = mlp(3, 2)
    trainer = create_distributed_trainer(model)
    x, y = torch.zeros(12, 3, dtype=F64), torch.arange(24, dtype=F64).view(12, 2)

    def metric(outputs, targets):
        if (targets > 22).any():  # the last rank's, in the last batch
            raise KeyError("unknown class")
        return targets

    batches = list(zip(x.split(4), y.split(4), strict=True))
    for number in range(2):  # the last batch is also the first
        loader = trainer.loader(TensorDataset(x[-4:], y[-4:]), 4) if reads_parts else batches[-1:]
        with pytest.raises(KeyError, match="unknown class"):
            trainer.evaluate(loader if number else [*batches, *batches[:2]], None, {"m": metric})
    trainer.close()


@several
def test_different_calls(world):
    """Ranks in different calls get an error at once, with their places in the script first."""
    trainer = create_distributed_trainer(mlp(3, 2))
    x, y = torch.zeros(6, 3, dtype=F64), torch.zeros(6, 2, dtype=F64)
    with pytest.raises(MismatchError, match=r"same order, but these differ: rank 0: evaluate, .*\.py:\d+;") as raised:
        if world.rank == 0:
            trainer.evaluate([(x, y)], nn.MSELoss())
        else:
            trainer.train_step(x, y, nn.MSELoss(), sgd(trainer.model))
    message = same_message(world, raised)
    assert "train_step, " in message
    assert ".." not in message.replace("../", "")


@several
def test_leaving_batches(world):
    """A rank that leaves the loop over `batches` early is named, with the call that it makes instead."""
    model = mlp(3, 2)
    trainer = create_distributed_trainer(model, split_batches=False)
    optimizer, pair = sgd(model), (torch.zeros(2, 3, dtype=F64), torch.zeros(2, 2, dtype=F64))
    with pytest.raises(MismatchError, match=r"rank 1: evaluate, .*test_mistakes\.py:\d+") as raised:
        for number, (x, y) in enumerate(trainer.batches([pair] * 4)):
            if number == 2 and world.rank == 1:
                break
            trainer.train_step(x, y, nn.MSELoss(), optimizer)
        trainer.evaluate([pair], nn.MSELoss())
    assert re.search(r"ranks? 0( and 2)?: train_step, ", same_message(world, raised))


@several
def test_own_backward_and_step(world, caplog):
    """Ranks that train by themselves beside a trainer are warned in the first step, and found different at the end."""
    model = Net(F64)
    trainer = create_distributed_trainer(model)
    optimizer = sgd(model)
    with caplog.at_level(logging.WARNING):
        for step in range(2):
            x, y = batch(2, F64, world.size * step + world.rank)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    text = "SGD made a step on gradients of loss.backward(), which the ranks do not add"
    assert sum(text in record.message for record in caplog.records) == (world.rank == 0)
    with pytest.raises(MismatchError, match="weights have drifted apart at the end"):
        trainer.close()


@several
def test_no_false_warning(world, caplog):
    """Steps of the trainer, and of optimizers of other models, are as they should be."""
    model, other = Net(F64), mlp(3, 2)
    trainer = create_distributed_trainer(model)
    optimizer, others = sgd(model), sgd(other)
    with caplog.at_level(logging.WARNING):
        for step in range(2):
            x, y = batch(6, F64, step)
            trainer.train_step(x, y, nn.CrossEntropyLoss(), optimizer)
            other(torch.ones(1, 3, dtype=F64)).sum().backward()
            others.step()
            own_x, own_y = trainer.split((x, y))
            optimizer.zero_grad()
            trainer.backward(nn.functional.cross_entropy(model(own_x), own_y), weight=len(own_y))
            optimizer.step()
        trainer.close()
    assert not caplog.records


SCRIPTS = {
    "unused": (
        "trainer = create_distributed_trainer(model)\ntrainer.loader([1, 2], 1)\n",
        0,
        "a trainer and an optimizer were made, but no step",
    ),
    "evaluated": (
        "trainer = create_distributed_trainer(model)\n"
        "trainer.evaluate([(torch.ones(4, 3), torch.tensor([0, 1, 0, 1]))], nn.CrossEntropyLoss())\n",
        0,
        None,
    ),
    "own steps": (
        TRAINER
        + "for _ in range(2):\n"
        + "    nn.functional.cross_entropy(model(torch.ones(1, 3) * rank), torch.tensor([rank])).backward()\n"
        + "    the_optimizer.step()\n",
        1,
        "MismatchError: weights have drifted apart at the end",
    ),
    "resume": (
        TRAINER + "print('from', trainer.resume('empty', optimizer=the_optimizer))\n",
        0,
        "empty yet, so training starts at its beginning",
    ),
    "exception": (
        TRAINER
        + "def loss(outputs, y):\n"
        + "    if rank == 1:\n        raise KeyError('broken sample')\n"
        + "    return outputs.sum()\n"
        + "loss.reduction = 'sum'\nfault()\nstep(trainer, criterion=loss)\n",
        1,
        "rank 1 of 2 on ",
    ),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_script(run, name):
    """A whole job prints the message once, and ends with the exit code."""
    script, exit_code, message = SCRIPTS[name]
    job = run(script)
    code = job.process.wait(START_SECONDS)
    assert (code != 0) == (exit_code != 0), job.err
    printed = job.out + job.err
    assert printed.count(message) == 1 if message else not job.err, printed
    if name == "exception":
        assert "KeyError: 'broken sample'" in job.err
        assert "rank 0 of 2" not in job.err


@some
def test_compiled_step(world):
    """A compiled function may call train_step."""
    model, reference = mlp(3, 2), mlp(3, 2)
    trainer = create_distributed_trainer(model)
    x, y = torch.ones(6, 3, dtype=F64), torch.zeros(6, 2, dtype=F64)
    optimizer, plain = sgd(model), sgd(reference)
    loss = torch.compile(lambda: trainer.train_step(x, y, nn.MSELoss(), optimizer))()
    expected = nn.functional.mse_loss(reference(x), y)
    expected.backward()
    plain.step()
    assert abs(loss - expected) < 1e-12
    assert_same(model, reference, 1e-12)
    trainer.close()
