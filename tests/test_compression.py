# SPDX-License-Identifier: Apache-2.0
"""PowerSGD: the algorithm beside a simulation in one process, what it does with odd steps, and that training holds."""

import functools
import gc
import random
from itertools import pairwise
from pathlib import Path
from runpy import run_path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import mixed, on_ranks
from torch import nn

from distributed_trainer import MismatchError, create_distributed_trainer, gradients
from distributed_trainer.compression import LowRankBucket, PowerSGD

F64 = torch.float64
several = on_ranks(2, 3, (3, 2))


class Net(nn.Module):
    """A convolution and two linear layers whose weights are compressed up to rank 2, and a third's which is not."""

    def __init__(self, dtype=F64, memory_format=torch.contiguous_format):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 16, 3, dtype=dtype)
        self.first = nn.Linear(64, 20, dtype=dtype)
        self.second = nn.Linear(20, 24, dtype=dtype)
        self.last = nn.Linear(24, 3, dtype=dtype)
        self.to(memory_format=memory_format)

    def forward(self, x):
        x = torch.tanh(self.first(torch.tanh(self.conv(x)).flatten(1)))
        return self.last(torch.tanh(self.second(x)))


COMPRESSED = ["conv.weight", "first.weight", "second.weight"]


def batch(num_samples, seed, dtype=F64):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_samples, 2, 4, 4, generator=generator).to(dtype)
    return x, torch.randn(num_samples, 3, generator=generator).to(dtype)


def bits(tensors):
    return [tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() for tensor in tensors]


def assert_close(actual, expected, tolerance, name=""):
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max(), name


class Simulation:
    """All ranks' compression in one process, by projections, which do not depend on the basis that QR chooses."""

    def __init__(self, model, num_ranks, rank):
        self.num_ranks = num_ranks
        self.of = {name: index for index, (name, _) in enumerate(model.named_parameters()) if name in COMPRESSED}
        self.errors = {name: [0.0] * num_ranks for name in self.of}
        self.q = {}
        for name, parameter in model.named_parameters():
            if name in self.of:
                generator = torch.Generator().manual_seed(self.of[name])
                self.q[name] = torch.randn(rank, parameter[0].numel(), generator=generator, dtype=F64).T

    def reduce(self, name, of_ranks):
        """The gradient from those of the ranks."""
        if name not in self.of:
            return sum(of_ranks)
        matrices = [g.flatten(1) + error for g, error in zip(of_ranks, self.errors[name], strict=True)]
        directions = torch.linalg.svd(sum(matrices) @ self.q[name], full_matrices=False)[0]
        projection = directions @ directions.T
        self.errors[name] = [matrix - projection @ matrix for matrix in matrices]
        self.q[name] = sum(matrices).T @ directions
        return (projection @ sum(matrices)).view_as(of_ranks[0])

    def gradients(self, model, x, y):
        """Those of one step, of parts as the trainer cuts them; a rank without samples gives zeros."""
        of_ranks = []
        for start, stop in bounds(len(x), self.num_ranks):
            model.zero_grad()
            if stop > start:
                (F.mse_loss(model(x[start:stop]), y[start:stop]) * ((stop - start) / len(x))).backward()
            of_ranks.append({n: torch.zeros_like(p) if stop == start else p.grad for n, p in model.named_parameters()})
            model.zero_grad()
        return {name: self.reduce(name, [of_rank[name] for of_rank in of_ranks]) for name in of_ranks[0]}


def bounds(num_samples, num_ranks):
    share, longer = divmod(num_samples, num_ranks)
    start = 0
    for rank in range(num_ranks):
        stop = start + share + (rank < longer)
        yield start, stop
        start = stop


def check_steps(world, sizes, rank=2, **options):
    """Trains beside the simulation, comparing each step's gradients, and the parameters at the end."""
    model, reference = Net(), Net()
    trainer = create_distributed_trainer(model, compression=PowerSGD(rank=rank), **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    simulation = Simulation(reference, world.size, rank)
    for step, num_samples in enumerate(sizes):
        x, y = batch(num_samples, seed=step)
        trainer.train_step(x, y, nn.MSELoss(), optimizer)
        if world.size == 1:
            reference.zero_grad()
            F.mse_loss(reference(x), y).backward()
            expected = {name: parameter.grad for name, parameter in reference.named_parameters()}
        else:
            expected = simulation.gradients(reference, x, y)
        for name, parameter in model.named_parameters():
            assert_close(parameter.grad, expected[name], 1e-11, f"step {step}: {name}")
            reference.get_parameter(name).data -= 0.1 * expected[name]
    for name, parameter in model.named_parameters():
        assert_close(parameter.detach(), reference.get_parameter(name).detach(), 1e-11, name)
    buckets = [
        index for b in trainer._replica.gradients._buckets if isinstance(b, LowRankBucket) for index in b.indices
    ]
    assert sorted(buckets) == (sorted(simulation.of.values()) if world.size > 1 else [])
    trainer.close()


@pytest.mark.parametrize("bucket_bytes", [1, 4 << 20])
@mixed
def test_simulation(world, monkeypatch, bucket_bytes):
    """Several steps with error feedback. One rank alone does not compress."""
    monkeypatch.setattr(gradients, "BUCKET_BYTES", bucket_bytes)
    check_steps(world, [12, 13, 14, 15, 16, 17])


@mixed
def test_ranks_without_samples(world):
    """They give what they kept of earlier steps."""
    check_steps(world, [13, 1, 14, 1, 15, 2, 3])


@several
def test_error_feedback_is_noticed(world, monkeypatch):
    """The comparison fails if errors are forgotten."""
    finish = LowRankBucket.finish

    def forget(bucket, unused):
        finish(bucket, unused)
        for error in bucket._errors:
            error.zero_()

    monkeypatch.setattr(LowRankBucket, "finish", forget)
    with pytest.raises(AssertionError, match="step 1"):
        check_steps(world, [12, 13])


@several
def test_enough_columns(world):
    """A batch of 2 samples has gradients of linear layers of rank 2 at most, which the factors hold."""
    model, reference = Net(), Net()
    trainer = create_distributed_trainer(model, compression=PowerSGD(rank=2))
    for step in range(4):
        x, y = batch(2, seed=step)
        trainer.train_step(x, y, nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=0.0))
        reference.zero_grad()
        F.mse_loss(reference(x), y).backward()
        for name in ("first.weight", "second.weight", "last.weight", "last.bias", "conv.bias"):
            assert_close(model.get_parameter(name).grad, reference.get_parameter(name).grad, 1e-10, name)
    trainer.close()


@several
def test_two_collectives(world):
    """For all matrices of a bucket; the first is on its way before backward comes to the first layer."""
    widths = [5, 2, 63, 63, 63, 63]
    model = nn.Sequential(*(nn.Linear(n, m, dtype=F64) for n, m in pairwise(widths)))
    trainer = create_distributed_trainer(model, compression=PowerSGD(rank=1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    events = []
    group = trainer._replica.gradients._group
    all_reduce = group.allreduce
    group.allreduce = lambda tensors, *options: events.append(tensors[0].numel()) or all_reduce(tensors, *options)
    model[0].weight.register_hook(lambda gradient: events.append("first layer"))
    x, y = torch.randn(8, 5, dtype=F64), torch.randn(8, 63, dtype=F64)
    for _ in range(3):
        events.clear()
        trainer.train_step(x, y, nn.MSELoss(), optimizer)
    others = sum(parameter.numel() for parameter in model.parameters()) - 3 * 63 * 63
    factors = 64 + 64 + 63  # each begins a cache line
    assert events[:2] + events[3:] == [factors, "first layer", factors, 4]  # the last: loss and flags
    assert others <= events[2] < others + 8 * len(list(model.parameters()))
    trainer.close()


class Dense(nn.Module):
    """Layers wide enough for QR to run on several threads."""

    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(30000, 24, dtype=dtype)
        self.linear = nn.Linear(24, 40, dtype=dtype)

    def forward(self, tokens):
        return self.linear(self.embedding(tokens))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@several
def test_same_bits(world, dtype):
    """On ranks with different numbers of threads, in autocast as well; factors of 16-bit types are float32."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1 + world.rank)
    try:
        model = Dense(dtype)
        trainer = create_distributed_trainer(model, compression=PowerSGD(rank=2))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        tokens = torch.randint(30000, (4000,), generator=torch.Generator().manual_seed(1))
        for step in range(4):
            with torch.autocast("cpu", enabled=step > 1):
                trainer.train_step(tokens, tokens % 40, nn.CrossEntropyLoss(), optimizer)
            mine = bits(parameter.grad for parameter in model.parameters()) + bits(model.parameters())
            assert len(set(world.gather(tuple(mine)))) == 1
            assert {parameter.grad.dtype for parameter in model.parameters()} == {dtype}
        compressed = [bucket for bucket in trainer._replica.gradients._buckets if isinstance(bucket, LowRankBucket)]
        assert sum(len(bucket.indices) for bucket in compressed) == 2
        assert {q.dtype for bucket in compressed for q in bucket._q.views} <= {torch.float32, torch.float64}
        trainer.close()
    finally:
        torch.set_num_threads(num_threads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@on_ranks(2, (3, 2))
def test_sixteen_bits(world, dtype):
    """The sum of what some steps gave is near that of the exact gradients: nothing is lost to rounding."""
    model, reference = Net(dtype), Net(dtype)
    trainer = create_distributed_trainer(model, compression=PowerSGD(rank=1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    x, y = batch(12, seed=1, dtype=dtype)
    total = {name: 0.0 for name in COMPRESSED}
    for _ in range(60):
        trainer.train_step(x, y, nn.MSELoss(), optimizer)
        total = {name: total[name] + model.get_parameter(name).grad.float() for name in COMPRESSED}
    F.mse_loss(reference(x), y).backward()
    for name in COMPRESSED:
        assert_close(total[name] / 60, reference.get_parameter(name).grad.float(), 0.15, name)
    trainer.close()


@several
def test_layouts(world):
    """Channels-last and transposed weights: gradients of their strides, the sum of several steps near the exact one."""

    def make():
        model = Net(memory_format=torch.channels_last)
        model.first.weight = nn.Parameter(model.first.weight.detach().T.contiguous().T)
        return model

    model, reference = make(), make()
    trainer = create_distributed_trainer(model, compression=PowerSGD(rank=2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    x, y = batch(12, seed=1)
    total = {name: 0.0 for name in COMPRESSED}
    for _ in range(200):
        trainer.train_step(x, y, nn.MSELoss(), optimizer)
        total = {name: total[name] + model.get_parameter(name).grad for name in COMPRESSED}
    F.mse_loss(reference(x), y).backward()
    for name in COMPRESSED:
        assert model.get_parameter(name).grad.stride() == model.get_parameter(name).stride()
        assert_close(total[name] / 200, reference.get_parameter(name).grad, 0.05, name)
    trainer.close()


class Experts(nn.Module):
    """A step uses one layer; on rank 0's part at most, if `only_first` is set."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList(nn.Linear(12, 12, dtype=F64) for _ in range(3))

    def forward(self, x, choice):
        parts = [expert(x[choice == i]) for i, expert in enumerate(self.experts) if (choice == i).any()]
        order = torch.cat([(choice == i).nonzero().flatten() for i in range(len(self.experts))])
        return torch.cat(parts)[order.argsort()]


@several
def test_unused(world):
    """A parameter that no rank used has no gradient, and its errors wait; one that some used gets the gradient."""
    model = Experts()
    trainer = create_distributed_trainer(model, compression=PowerSGD(rank=2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(16, 12, generator=generator, dtype=F64) for _ in range(2))
    errors = {}
    total = {0: 0.0, 1: 0.0}
    exact = {0: 0.0, 1: 0.0}
    for choice in [[0] * 16, [1] * 16, [0, *[1] * 15], [1] * 16, [0] * 8 + [1] * 8] * 3:
        choice = torch.tensor(choice)
        trainer.train_step((x, choice), y, nn.MSELoss(), optimizer)
        reference = Experts()
        F.mse_loss(reference(x, choice), y).backward()
        (bucket,) = (b for b in trainer._replica.gradients._buckets if isinstance(b, LowRankBucket))
        for index, expert in enumerate(model.experts):
            error = bucket._errors[bucket.indices.index(2 * index)]
            if not (choice == index).any():
                assert expert.weight.grad is None
                assert torch.equal(error, errors.get(index, torch.zeros_like(error)))
            else:
                total[index] = total[index] + expert.weight.grad
                exact[index] = exact[index] + reference.experts[index].weight.grad
            errors[index] = error.clone()
    for index in (0, 1):  # what was given and what waits are all that there was
        waiting = sum(world.gather(errors[index]))
        assert_close(total[index] + waiting, exact[index], 1e-12)
    trainer.close()


@several
def test_not_finite(world):
    """One rank's NaN or infinity is everybody's gradient of the step, and gone in the next."""
    model, reference = Net(), Net()
    trainer = create_distributed_trainer(model, compression=PowerSGD(rank=2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    trainer.train_step(*batch(12, seed=0), nn.MSELoss(), optimizer)
    for value in (torch.nan, torch.inf):
        x, y = batch(12, seed=1)
        y[-1] = value
        trainer.train_step(x, y, nn.MSELoss(), optimizer)
        assert all(model.get_parameter(name).grad.isnan().all() for name in COMPRESSED)
        model.load_state_dict(Net().state_dict())  # the optimizer has added 0 x NaN to it
        again = Simulation(reference, world.size, rank=2)  # nothing is left of the steps before
        for seed in (2, 3):
            trainer.train_step(*batch(12, seed=seed), nn.MSELoss(), optimizer)
            for name, expected in again.gradients(reference, *batch(12, seed=seed)).items():
                assert_close(model.get_parameter(name).grad, expected, 1e-11, name)
    trainer.close()


@several
def test_freezing(world):
    """Errors begin anew with the buckets."""
    model, reference = Net(), Net()
    trainer = create_distributed_trainer(model, compression=PowerSGD(rank=2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for frozen in (False, True, False):
        model.second.weight.requires_grad_(not frozen)
        simulation = Simulation(reference, world.size, rank=2)
        for seed in range(2):
            trainer.train_step(*batch(12, seed), nn.MSELoss(), optimizer)
            expected = simulation.gradients(reference, *batch(12, seed))
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    assert_close(parameter.grad, expected[name], 1e-11, name)
                else:
                    assert parameter.grad is None
    trainer.close()


@on_ranks(2, 3)
def test_process_group_of_torch(world, tmp_path):
    """The same over gloo."""
    file = world.comm.bcast(str(tmp_path / "store"))
    store = dist.FileStore(file, world.size)
    dist.init_process_group("gloo", store=store, rank=world.rank, world_size=world.size)
    try:
        check_steps(world, [12, 1, 13], process_group=dist.group.WORLD)
    finally:
        dist.destroy_process_group()
        gc.collect()


@several
def test_ranks_disagree(world):
    compression = PowerSGD(rank=2) if world.rank == 0 else None
    model = Net()
    trainer = create_distributed_trainer(model, compression=compression)
    with pytest.raises(MismatchError) as error:
        trainer.train_step(*batch(12, 0), nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=0.1))
    (message,) = set(world.gather(str(error.value)))
    assert "rank 0 has PowerSGD(rank=2), rank 1 has None" in message
    trainer.close()


def test_refused():
    for rank in (0, -1):
        with pytest.raises(ValueError, match=f"at least 1, not {rank}"):
            PowerSGD(rank=rank)
    for rank in (1.5, "4", True, None):
        with pytest.raises(TypeError, match=f"must be an int, not {type(rank).__name__}"):
            PowerSGD(rank=rank)
    for compression in (4, "PowerSGD", PowerSGD):
        with pytest.raises(TypeError, match="compression must be PowerSGD"):
            create_distributed_trainer(nn.Linear(2, 2), compression=compression)
    assert PowerSGD() == PowerSGD(rank=4)


@on_ranks(2)
def test_user_random_streams(world):
    """Compression draws from none of them."""
    draws = []
    for compression in (None, PowerSGD(rank=2)):
        torch.manual_seed(3)
        random.seed(3)
        model = Net()
        trainer = create_distributed_trainer(model, compression=compression)
        trainer.train_step(*batch(12, 0), nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=0.1))
        draws.append((torch.rand(3).tolist(), random.random()))
        trainer.close()
    assert draws[0] == draws[1]


# ---- training, as the benchmark does


@functools.cache
def benchmark():
    """Its functions; not at the import, since ranks that run other tests import this file as well."""
    return run_path(str(Path(__file__).parents[1] / "benchmarks" / "compression.py"))


@pytest.mark.long
@on_ranks(2, 4)
def test_digits(world):
    """At least 97 % of the test images, as without compression, and no more than 1 % fewer than there."""
    exact, compressed = (benchmark()["train_digits"](compression) for compression in (None, PowerSGD(rank=4)))
    assert exact >= 0.97
    assert compressed >= max(0.97, exact - 0.01)


@pytest.mark.long
@on_ranks(2)
def test_transformer(world):
    """On Python's own documentation: after 400 steps the loss on text held back is at most 5 % above that without."""
    losses = [benchmark()["train_characters"](compression, 400)[0] for compression in (None, PowerSGD(rank=4))]
    exact, compressed = losses
    assert exact < 2.2  # it has learned: guessing by frequency costs 3
    assert compressed < 1.05 * exact
