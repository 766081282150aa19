# SPDX-License-Identifier: Apache-2.0
"""Gradients that are infinite or NaN: every rank treats them in the same way, which is that of one process."""

import contextlib
import copy
import functools
import gc
import logging

import pytest
import torch
import torch.distributed as dist
from internals import buckets_of, session_of
from one_process import assert_same
from powersgd_simulation import COMPRESSED, Net, Simulation, assert_close
from powersgd_simulation import batch as images
from ranks import mixed, on_ranks, one_node, same_message
from small_models import F64, adam, regression_batch
from torch import nn

from distributed_trainer import MismatchError, PowerSGD, create_distributed_trainer
from distributed_trainer.gradients import layout
from distributed_trainer.gradients.buckets import is_finite

several = on_ranks(2, 3, (3, 2))
MODES = {"plain": {}, "sharded": {"shard": "optimizer"}, "compressed": {"compression": PowerSGD(rank=1)}}
MEAN = nn.MSELoss()
batch = functools.partial(regression_batch, num_samples=9, inputs=8, outputs=3)


class WithNorm(nn.Module):
    """Linear layers, some of whose weights are compressed, a BatchNorm, and a buffer that counts the forwards.

    The gradient of the bias before the BatchNorm consists of rounding errors: compare it with an absolute tolerance.
    """

    def __init__(self, dtype=F64, width=16):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            *(nn.Linear(8, width), nn.BatchNorm1d(width), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 3))
        ).to(dtype)
        self.register_buffer("num_calls", torch.zeros((), dtype=torch.int64))
        self.increment = 1

    def forward(self, x):
        self.num_calls += self.increment
        return self.layers(x)


def spoiled(seed, sample, value, **options):
    """Return a batch in which one sample makes the loss and all gradients not finite; model outputs stay finite."""
    x, y = batch(seed=seed, **options)
    y[sample, 0] = value
    return x, y


def plain_step(model, optimizer, x, y):
    """Run a step of one process that skips it if gradients are not finite; return the loss."""
    optimizer.zero_grad()
    loss = MEAN(model(x), y)
    loss.backward()
    if all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None):
        optimizer.step()
    return loss.detach()


def bits(model):
    return [tensor.detach().reshape(-1).view(torch.uint8).tolist() for tensor in model.state_dict().values()]


def spoil(parameter, value=torch.nan):
    """Set one element of the parameter's gradient on this rank to `value`, until the returned hook is removed.

    The hook writes to the memory itself, since the trainer refuses hooks that change a gradient.
    """

    def hook(gradient):
        gradient.data.view(-1)[-1] = value

    return parameter.register_hook(hook)


@contextlib.contextmanager
def gloo(world, tmp_path):
    store = dist.FileStore(world.comm.bcast(str(tmp_path / "store")), world.size)
    dist.init_process_group("gloo", store=store, rank=world.rank, world_size=world.size)
    try:
        yield {"group": dist.group.WORLD}
    finally:
        dist.destroy_process_group()
        gc.collect()


# ---- a group's check of its sums


@mixed
@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16, torch.float16], ids=str)
def test_sum_and_check(world, dtype):
    """The sums equal those of allreduce, and every rank reports a value that is not finite on any rank."""
    group = world.group()
    memory = group.allocate(10_007 * 8).view(dtype)
    for count in (1, 5, 10_007):
        for culprit, value in [(None, 0), *((rank, v) for rank in range(world.size) for v in (torch.inf, torch.nan))]:
            own = torch.randn(count, generator=torch.Generator().manual_seed(world.rank)).to(dtype)
            if world.rank == culprit:
                own[count // 2] = value
            expected = own.clone()
            group.allreduce([expected]).wait()
            for buffer in (own.clone(), memory[:count].copy_(own)):
                work = group.sum_and_check(buffer)
                work.wait()
                assert work.found_nonfinite() == (culprit is not None)
                assert torch.equal(buffer.view(torch.uint8), expected.view(torch.uint8))


@mixed
def test_not_asked(world):
    group = world.group()
    work = group.allreduce([torch.ones(3)])
    work.wait()
    with pytest.raises(ValueError, match=r"all_reduce\(sum, 3 float32\) is not done, or was not asked"):
        work.found_nonfinite()


@several
def test_disagreement(world):
    group = world.group()
    call = group.sum_and_check if world.rank == 1 else lambda buffer: group.allreduce([buffer])
    with pytest.raises(MismatchError) as error:
        call(torch.ones(4)).wait()
    message = same_message(world, error)
    assert "rank 0 calls all_reduce(sum, 4 float32), rank 1 calls all_reduce(sum, 4 float32, checked)" in message


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16, torch.float16], ids=str)
def test_is_finite(dtype, value):
    for count in (1, 7, 64, 1001):
        tensor = torch.full((count,), torch.finfo(dtype).max, dtype=dtype)
        assert is_finite(tensor)
        assert is_finite(-tensor)
        for position in {0, count // 2, count - 1}:
            spoiled_one = tensor.clone()
            spoiled_one[position] = value
            assert not is_finite(spoiled_one)
            assert not is_finite(spoiled_one.view(1, -1).T)
    assert is_finite(torch.empty(0, dtype=dtype))
    assert not is_finite(torch.tensor(value, dtype=dtype, requires_grad=True))


# ---- "skip"


@pytest.mark.parametrize("bucket_bytes", [1, 4 << 20])
@pytest.mark.parametrize("mode", ["plain", "sharded"])
@mixed
def test_skip(world, monkeypatch, mode, bucket_bytes):
    """A NaN or infinity in one sample: all ranks end with the parameters, state, buffers of one process that skips."""
    monkeypatch.setattr(layout, "BUCKET_BYTES", bucket_bytes)
    model, reference = WithNorm(), WithNorm()
    trainer = create_distributed_trainer(model, nonfinite_gradients="skip", **MODES[mode])
    optimizer, expected = adam(model), adam(reference)
    # They include the first step, which fills no bucket before its end, two steps in a row, and samples of every rank.
    steps = {0: 0, 3: 8, 4: 4, 6: 3, 8: 6}  # the sample by step
    for step in range(11):
        x, y = batch(seed=step, num_samples=2 if step == 9 else 9)
        if step in steps:
            x, y = spoiled(step, steps[step], (torch.nan, torch.inf)[step % 2])
        before = bits(model.layers[0])
        loss = trainer.train_step(x, y, MEAN, optimizer)
        torch.testing.assert_close(loss, plain_step(reference, expected, x, y), rtol=1e-9, atol=0, equal_nan=True)
        assert (bits(model.layers[0]) == before) == (step in steps)
    assert trainer.num_skipped_steps == len(steps)
    assert len({str(other) for other in world.gather(bits(model))}) == 1
    assert_same(model, reference, 1e-9, atol=1e-9)
    state = optimizer.state_dict()["state"]
    assert all(entry["step"] == 11 - len(steps) for entry in state.values())
    trainer.close()


@several
def test_one_warning(world, caplog):
    """Rank 0 warns once, with the number of the step and the first parameter's name."""
    model = WithNorm()
    trainer = create_distributed_trainer(model, nonfinite_gradients="skip")
    optimizer = adam(model)
    with caplog.at_level(logging.WARNING, logger="distributed_trainer"):
        for step in range(5):
            hooks = []
            if step in (2, 4) and world.rank == world.size - 1:
                hooks = [spoil(model.layers[2].bias), spoil(model.layers[4].weight)]
            trainer.train_step(*batch(seed=step), MEAN, optimizer)
            for hook in hooks:
                hook.remove()
    assert trainer.num_skipped_steps == 2
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == (world.rank == 0)
    assert all("step 3: the gradient of layers.2.bias is infinite or NaN" in message for message in messages)
    trainer.close()


@pytest.mark.parametrize("mode", ["plain", "sharded"])
@several
def test_direct_gradients(world, mode):
    """Weight gradients that are computed in their places in the buckets are checked too."""
    model, reference = WithNorm(torch.float32, width=256), WithNorm(torch.float32, width=256)
    trainer = create_distributed_trainer(model, nonfinite_gradients="skip", **MODES[mode])
    assert session_of(trainer).replica._direct._weights[0] is model.layers[2].weight
    optimizer, expected = (torch.optim.SGD(m.parameters(), lr=0.01) for m in (model, reference))
    for step in range(6):
        options = {"seed": step, "dtype": torch.float32}
        x, y = spoiled(sample=step, value=torch.inf, **options) if step in (1, 4) else batch(**options)
        trainer.train_step(x, y, MEAN, optimizer)
        plain_step(reference, expected, x, y)
    assert trainer.num_skipped_steps == 2
    assert_same(model, reference, 1e-5, atol=1e-5)
    trainer.close()


@several
def test_compressed(world):
    """A skipped step leaves nothing behind in any matrix: the next steps are those of a run that begins there."""
    model, reference = Net(), Net()
    trainer = create_distributed_trainer(model, compression=PowerSGD(rank=2), nonfinite_gradients="skip")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer.train_step(*images(12, seed=0), MEAN, optimizer)
    for number, (name, value) in enumerate([("first.weight", torch.nan), ("last.bias", torch.inf)]):
        before = bits(model)
        hook = spoil(model.get_parameter(name), value) if world.rank == 1 else None
        x, y = images(12, seed=1)
        trainer.train_step(x, y * 1e9, MEAN, optimizer)
        if hook is not None:
            hook.remove()
        assert trainer.num_skipped_steps == number + 1
        assert bits(model) == before
        again = Simulation(reference, world.size, rank=2)
        for seed in (2, 3):
            reference.load_state_dict(model.state_dict())
            trainer.train_step(*images(12, seed=seed), MEAN, optimizer)
            for other, expected in again.gradients(reference, *images(12, seed=seed)).items():
                assert_close(model.get_parameter(other).grad, expected, 1e-11, other)
    assert COMPRESSED[1] == "first.weight"
    trainer.close()


class Overflow(nn.Module):
    """Model whose gradients are exactly `value` times the number of samples, in float16."""

    def __init__(self, value, shape=(64, 64)):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape, dtype=torch.float16))
        self.value = value

    def forward(self, x):
        return (self.weight * self.value).sum() + 0 * x.sum()


@pytest.mark.parametrize("mode", MODES)
@several
def test_overflow(world, mode):
    """Every rank's gradient is finite, and their sum is either still finite or not."""
    for value, skips in [(60_000.0, False), (70_000.0, True)]:
        model = Overflow(value / world.size)
        trainer = create_distributed_trainer(model, nonfinite_gradients="skip", split_batches=False, **MODES[mode])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.25)

        def total(outputs, _):
            return outputs

        total.reduction = "sum"
        trainer.train_step(torch.zeros(1, 1), torch.zeros(1, 1), total, optimizer)
        assert trainer.num_skipped_steps == skips
        assert bool(model.weight.any()) != skips
        trainer.close()


@on_ranks((2, 1), (3, 1), (4, 2))
def test_overflow_between_nodes(world):
    """The check is on the final sums: float16 between nodes does not hold this sum."""
    for compression, skips in [("float16", True), ("bfloat16", False), (None, False)]:
        model = Overflow(70_000.0 / world.size).float()
        trainer = create_distributed_trainer(
            model, nonfinite_gradients="skip", split_batches=False, compression=compression
        )

        def total(outputs, _):
            return outputs

        total.reduction = "sum"
        optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
        trainer.train_step(torch.zeros(1, 1), torch.zeros(1, 1), total, optimizer)
        assert trainer.num_skipped_steps == skips
        trainer.close()


class SometimesUsed(nn.Module):
    """`extra` is used for samples whose first feature is large; `never` is not used."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.main, self.extra, self.never = (nn.Linear(8, 3, dtype=F64) for _ in range(3))

    def forward(self, x):
        is_large = x[:, :1] > 50
        return self.main(x) + is_large * self.extra(x) if is_large.any() else self.main(x)


@pytest.mark.parametrize("mode", ["plain", "sharded"])
@mixed
def test_unused(world, mode):
    """A value that is not finite counts in a parameter that one rank uses, but not in one that no rank uses."""
    model, reference = SometimesUsed(), SometimesUsed()
    trainer = create_distributed_trainer(model, nonfinite_gradients="skip", **MODES[mode])
    optimizer, expected = adam(model), adam(reference)
    for step in range(8):
        x, y = batch(seed=step)
        if step % 2:
            x[step, 0] = 60.0
        hooks = [spoil(m.extra.weight) for m in (model, reference)] if step in (1, 2, 5) else []
        trainer.train_step(x, y, MEAN, optimizer)
        plain_step(reference, expected, x, y)
        for hook in hooks:
            hook.remove()
    assert trainer.num_skipped_steps == 2
    assert_same(model, reference, 1e-9, atol=1e-9)
    trainer.close()


# ---- "raise"


@pytest.mark.parametrize("mode", MODES)
@mixed
def test_raise(world, mode):
    """For each parameter there is one message on all ranks; parameters and state do not change; training continues."""
    model = WithNorm()
    model.increment += world.rank  # the buffer becomes rank 0's after each step
    trainer = create_distributed_trainer(model, nonfinite_gradients="raise", **MODES[mode])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    trainer.train_step(*batch(seed=0), MEAN, optimizer)
    for number, (name, parameter) in enumerate(model.named_parameters()):
        before, state = bits(model.layers[0]), copy.deepcopy(optimizer.state_dict())
        hook = spoil(parameter, -torch.inf) if world.rank == number % world.size else None
        with pytest.raises(FloatingPointError) as error:
            trainer.train_step(*batch(seed=number), MEAN, optimizer)
        if hook is not None:
            hook.remove()
        step = 2 + 2 * number
        message = same_message(world, error)
        assert message == f"step {step}: the gradient of {name} is infinite or NaN, so no parameter was changed."
        assert bits(model.layers[0]) == before
        assert str(optimizer.state_dict()) == str(state)
        assert len({str(other) for other in world.gather(bits(model))}) == 1
        trainer.train_step(*batch(seed=number + 1), MEAN, optimizer)
        assert bits(model.layers[0]) != before
        assert len({str(other) for other in world.gather(bits(model))}) == 1
    assert trainer.num_skipped_steps == 0
    trainer.close()


# ---- "ignore", other process groups, one rank


@pytest.mark.parametrize("mode", ["plain", "sharded"])
@mixed
def test_ignore(world, mode):
    """As in plain torch, the NaN reaches the parameters. Nothing is checked."""
    model = WithNorm()
    trainer = create_distributed_trainer(model, **MODES[mode])
    trainer.train_step(*spoiled(0, 4, torch.nan), MEAN, adam(model))
    assert all(parameter.isnan().any() for parameter in model.parameters())
    assert trainer.num_skipped_steps == 0
    for bucket in buckets_of(trainer):
        with pytest.raises(ValueError, match="was not asked to check"):
            bucket._work.found_nonfinite()
    trainer.close()


@one_node
def test_process_group_of_torch(world, tmp_path):
    """gloo does not check sums, so the trainer does; skip and raise work as with the shmpi backend."""
    with gloo(world, tmp_path) as options:
        model, reference = WithNorm(), WithNorm()
        trainer = create_distributed_trainer(model, nonfinite_gradients="skip", **options)
        optimizer, expected = adam(model), adam(reference)
        for step in range(6):
            x, y = spoiled(step, 4 * (step == 1), torch.inf) if step in (1, 4) else batch(seed=step)
            trainer.train_step(x, y, MEAN, optimizer)
            plain_step(reference, expected, x, y)
        assert trainer.num_skipped_steps == 2
        assert_same(model, reference, 1e-9, atol=1e-9)
        trainer.close()
        trainer = create_distributed_trainer(model, nonfinite_gradients="raise", **options)
        with pytest.raises(FloatingPointError) as error:
            trainer.train_step(*spoiled(0, 8, torch.nan), MEAN, optimizer)
        assert "step 1: the gradient of layers.0.weight is" in same_message(world, error)
        trainer.close()


@on_ranks(1)
def test_sparse_gradient(world):
    """With one rank, gradients stay as torch makes them."""
    model = nn.Embedding(5, 3, sparse=True)
    trainer = create_distributed_trainer(model, nonfinite_gradients="skip")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for targets, num_skipped in [(torch.zeros(2, 3), 0), (torch.full((2, 3), torch.inf), 1), (torch.zeros(2, 3), 1)]:
        trainer.train_step(torch.tensor([1, 1]), targets, MEAN, optimizer)
        assert trainer.num_skipped_steps == num_skipped
    trainer.close()
