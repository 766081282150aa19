# SPDX-License-Identifier: Apache-2.0
"""Memory of gradients that scripts keep, and models that change between steps: messages, memory, several machines.

tests/compatibility/test_parameters.py has the scripts of users.
"""

import contextlib
import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from internals import buckets_of, session_of
from one_process import assert_same
from ranks import mapped_bytes, on_ranks, same_message
from small_models import F64, mlp, regression_batch, sgd
from torch import nn

from distributed_trainer import MismatchError, create_distributed_trainer

everywhere = on_ranks(1, 2, 3, (3, 2))
several = on_ranks(2, 3, (3, 2))


def net():
    return mlp(5, 6, 5)


def data(seed):
    return regression_batch(7, seed, inputs=5, outputs=5)


def train(trainer, optimizer, *seeds):
    for seed in seeds:
        trainer.train_step(*data(seed), nn.MSELoss(), optimizer)


def backward(trainer, model, seed):
    inputs, targets = trainer.split(data(seed))
    trainer.backward(F.mse_loss(model(inputs), targets), weight=len(targets))


def plain_backward(model, seed):
    inputs, targets = data(seed)
    F.mse_loss(model(inputs), targets).backward()


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Rprop, torch.optim.Adagrad])
@several
def test_memory_stays(world, kind):
    """Where a script keeps no gradients, each step writes the memory of the last one."""
    model = net()
    trainer = create_distributed_trainer(model)
    optimizer = kind(model.parameters(), lr=0.01)
    train(trainer, optimizer, 0)
    memory = buckets_of(trainer)[0].memory.current
    for seed in range(1, 4):
        trainer.train_step(*data(seed), nn.MSELoss(), optimizer, clip_norm=1.0)
        optimizer.zero_grad()
        backward(trainer, model, seed)
        trainer.step(optimizer)
    assert buckets_of(trainer)[0].memory.current is memory
    trainer.close()


@several
def test_memory_takes_turns(world):
    """A script that keeps each gradient until the next step, on one rank, makes every rank use two memories."""
    model = net()
    trainer = create_distributed_trainer(model)
    optimizer = sgd(model)
    train(trainer, optimizer, 0)
    gc.collect()
    before, seen, kept = mapped_bytes(), set(), None
    for seed in range(6):
        train(trainer, optimizer, seed)
        if world.rank == 1:
            kept = [parameter.grad.view(-1) for parameter in model.parameters()]
        seen.add(buckets_of(trainer)[0].memory.current)
    assert len(seen) == 2
    seen.clear()
    del kept
    train(trainer, optimizer, 0, 1)
    gc.collect()
    assert mapped_bytes() == before
    trainer.close()


@everywhere
def test_same_tensors(world):
    """`backward` adds to the tensors that are in `.grad`, as autograd does; a script may have made them."""
    model, reference = net(), net()
    trainer = create_distributed_trainer(model)
    of_script = torch.ones(6, 5, dtype=F64)
    model[0].weight.grad, reference[0].weight.grad = of_script, torch.ones(6, 5, dtype=F64)
    for seed in range(4):
        backward(trainer, model, seed)
        plain_backward(reference, seed)
        gradients = [parameter.grad for parameter in model.parameters()]
        if seed == 0:
            first = gradients
        assert all(one is other for one, other in zip(first, gradients, strict=True))
        assert gradients[0] is of_script
        torch.testing.assert_close(gradients, [parameter.grad for parameter in reference.parameters()])
    trainer.close()


@everywhere
def test_changes_in_no_sync(world):
    """Gradients that are added up before a change count, moved or not; those that the script clears do not."""
    model, reference = net(), net()
    trainer = create_distributed_trainer(model)
    change_in_no_sync(model, trainer.no_sync, lambda seed: backward(trainer, model, seed))
    change_in_no_sync(reference, contextlib.nullcontext, lambda seed: plain_backward(reference, seed))
    gradients = [parameter.grad for parameter in model.parameters()]
    torch.testing.assert_close(gradients, [parameter.grad for parameter in reference.parameters()])
    trainer.close()


def change_in_no_sync(model, no_sync, run):
    run(0)
    model.zero_grad()
    with no_sync():
        run(1)
        for parameter in model.parameters():
            parameter.grad.data = parameter.grad.data * 2
        model.append(nn.Linear(5, 5, dtype=F64).requires_grad_(False))
        nn.init.eye_(model[3].weight)
        nn.init.zeros_(model[3].bias)
        run(2)
        model[2].bias.grad = None
        model[3].requires_grad_(True)
        model[0].requires_grad_(False)
    run(3)


def transpose_in_memory(model):
    model[0].weight.data = model[0].weight.data.T.contiguous().T


def replace(model):
    model[0] = copy.deepcopy(model[0])


def remove(model):
    del model[2]


CHANGES = {
    "dtype": (lambda model: model.float(), r"0\.weight \[6, 5\] float64"),
    "strides": (transpose_in_memory, r"strides \[1, 6\]"),
    "frozen": (lambda model: model[0].requires_grad_(False), "without gradient"),
    "added": (lambda model: model.append(nn.Linear(5, 5, dtype=F64)), r"3\.weight \[5, 5\] float64, which is new"),
    "replaced": (replace, r"0\.weight \[6, 5\] float64, which is new"),
    "removed": (remove, r"2\.weight"),
}


@pytest.mark.parametrize("way", ["train_step", "backward", "forward"])
@pytest.mark.parametrize("change", CHANGES)
@several
def test_one_rank_changes(world, change, way):
    """A change of one rank's model is an error on every rank before any weight has changed, and no hang."""
    model = net()
    trainer = create_distributed_trainer(model)
    optimizer = torch.optim.SGD([model[0].bias], lr=0.1)
    train(trainer, optimizer, 0)
    changes, match = CHANGES[change]
    if way == "forward":
        match = f"model has changed on rank {world.size - 1}, which is in forward"
    if change == "replaced":
        optimizer = torch.optim.SGD([model[2].bias], lr=0.1)
    inputs, _ = trainer.split(data(1))
    loss = model(inputs).sum()
    if world.rank == world.size - 1:
        changes(model)
    before = copy.deepcopy(model.state_dict())
    # A graph of before the change may have parameters that are no longer the model's: this is seen first.
    match += "|is not a parameter of the trainer's model"
    with pytest.raises((MismatchError, ValueError), match=match) as error:
        if way == "train_step":
            train(trainer, optimizer, 1)
        elif way == "backward" or world.rank != world.size - 1:
            trainer.backward(loss, weight=1)
        else:
            with trainer.forward():
                pass
    assert len({text.partition("The ranks' last calls")[0] for text in world.gather(str(error.value))}) == 1
    assert_same(model.state_dict(), before, rtol=0)
    with contextlib.suppress(MismatchError):  # the weights do differ
        trainer.close()


@several
def test_new_values_differ(world):
    """Without `forward`, `backward` refuses new parameters that have other values on each rank."""
    model = net()
    trainer = create_distributed_trainer(model)
    train(trainer, sgd(model), 0)
    model.append(nn.Linear(5, 5, dtype=F64))
    nn.init.constant_(model[3].weight, world.rank)
    with pytest.raises(MismatchError, match=r"3\.weight is new, and does not have the same values on rank 0") as error:
        backward(trainer, model, 1)
    same_message(world, error)
    with trainer.forward():
        assert not model[3].weight.any()
    backward(trainer, model, 1)
    trainer.close()


@everywhere
def test_lazy(world):
    """A new parameter without a shape is refused by name; after a call of the model it is one like others."""
    model = net()
    trainer = create_distributed_trainer(model)
    optimizer = sgd(model)
    train(trainer, optimizer, 0)
    model.append(nn.LazyLinear(5, dtype=F64))
    with pytest.raises(ValueError, match=r"3\.weight is new and has no shape yet"):
        train(trainer, optimizer, 1)
    model(data(0)[0])
    optimizer.add_param_group({"params": model[3].parameters()})
    train(trainer, optimizer, 1)
    assert model[3].weight.grad is not None
    trainer.close()


@everywhere
def test_many_parameters(world):
    """Thousands of parameters are laid out in a time that grows with their number."""
    model = nn.Sequential(*[nn.Linear(1, 1, dtype=F64) for _ in range(1500)])
    trainer = create_distributed_trainer(model)
    optimizer = sgd(model)
    inputs, targets = regression_batch(6, inputs=1, outputs=1)
    for _ in range(2):
        trainer.train_step(inputs, targets, nn.MSELoss(), optimizer)
    assert session_of(trainer).progress.num_steps == 2
    trainer.close()
