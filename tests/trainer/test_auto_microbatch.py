# SPDX-License-Identifier: Apache-2.0
"""microbatches="auto": a step is repeated in smaller pieces when memory runs out; compared with one process."""

import contextlib
import copy
import logging
import random
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from internals import buckets_of
from one_process import accumulated_step, assert_same
from ranks import on_ranks
from small_models import F64, NormNet, batch, sgd
from torch import nn

from distributed_trainer import PowerSGD, create_distributed_trainer

some = on_ranks(1, 2, (3, 2))
PLACES = ["after conv", "after norm", "after linear", "end"]


class _Hungry(torch.autograd.Function):
    """Raise an allocator's error, in forward or in backward, if there are more samples than fit."""

    @staticmethod
    def forward(ctx, x, limit, in_backward):
        ctx.is_too_large = len(x) > limit
        if ctx.is_too_large and not in_backward:
            raise torch.OutOfMemoryError("out of memory: wanted 1 TiB\nand more")
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        if ctx.is_too_large:
            raise MemoryError
        return gradient, None, None


class HungryNet(NormNet):
    """NormNet that runs out of memory at one place, with more than `limit` samples."""

    def __init__(self, place, in_backward, limit):
        super().__init__(F64)
        self.place, self.in_backward, self.limit = place, in_backward, limit

    def hungry(self, place, x):
        return _Hungry.apply(x, self.limit, self.in_backward) if place == self.place else x

    def forward(self, x):
        x = self.hungry("after conv", self.conv(x))
        x = self.hungry("after norm", torch.tanh(self.norm(x)))
        x = self.hungry("after linear", self.linear(x.view(x.size(0), -1)))
        return self.hungry("end", self.last(torch.tanh(self.norm1(x))))


LOSS = nn.CrossEntropyLoss()


@pytest.mark.parametrize("in_backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("place", PLACES)
@on_ranks(2, (4, 2))
def test_every_place(world, small_buckets, place, in_backward):
    """Memory runs out at any place between collectives: on rank 0, on the last rank, on all ranks; in any step."""
    for hungry_ranks, first_step in [({0}, 0), ({world.size - 1}, 2), (set(range(world.size)), 1)]:
        model = HungryNet(place, in_backward, limit=100)
        reference = copy.deepcopy(model)
        trainer = create_distributed_trainer(model)
        optimizer, plain_optimizer = sgd(model), sgd(reference)
        for step, rest in enumerate([0, 1, 0, 2]):
            if step == first_step and world.rank in hungry_ranks:
                model.limit = 3
            tensors = batch(12 * world.size - rest, F64, step)
            loss = trainer.train_step(*tensors, LOSS, optimizer, microbatches="auto")
            num_pieces = 1 if step < first_step else 4
            expected, _ = accumulated_step(reference, tensors, num_pieces, len, LOSS, plain_optimizer)
            assert abs(loss - expected) < 1e-11, (hungry_ranks, step)
        assert_same(model, reference, 1e-10)
        trainer.close()


@on_ranks(2)
def test_order_of_buckets(world, small_buckets):
    """A first step that fails does not show the order of all gradients; the next step determines it."""
    orders = []
    for limit in (100, 2 if world.rank == 0 else 100):
        model = HungryNet("end", False, limit)
        trainer = create_distributed_trainer(model)
        trainer.train_step(*batch(8 * world.size, F64), LOSS, sgd(model), microbatches="auto")
        orders.append([bucket.indices for bucket in buckets_of(trainer)])
        trainer.close()
    assert orders[0] == orders[1]


@some
def test_clean_state(world, caplog):
    """Random states, buffers of any kind and dropout are those of a step that begins in small pieces."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layers = nn.Sequential(nn.Linear(4, 8), nn.Dropout(), nn.Linear(8, 4))
            self.register_buffer("count", torch.zeros((), dtype=torch.int64))
            self.register_buffer("mean", torch.zeros(4))
            self.limit = 100

        def forward(self, x):
            self.count += 1
            self.mean = self.mean + x.detach().mean(0)
            random.random(), np.random.rand()
            return _Hungry.apply(self.layers(x), self.limit, False)

    def states():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    results = []
    start = states()
    for microbatches, limit in [(4, 100), ("auto", 2 if world.rank == world.size - 1 else 100)]:
        random.setstate(start[0])
        np.random.seed(1)
        torch.manual_seed(1)
        model = Net()
        model.limit = limit
        trainer = create_distributed_trainer(model, buffers={"mean": "mean"})
        optimizer = sgd(model)
        x, y = torch.randn(8 * world.size, 4), torch.randint(4, (8 * world.size,))
        for _ in range(3):
            trainer.train_step(x, y, LOSS, optimizer, microbatches=microbatches)
        results.append((list(model.state_dict().values()), states()))
        trainer.close()
    for one, other in zip(*(values for values, _ in results), strict=True):
        assert torch.equal(one, other)
    assert results[0][1] == results[1][1]
    if world.rank == 0:
        texts = [record.message for record in caplog.records]
        last = world.size - 1
        assert texts == [
            f"rank {last} ran out of memory in a piece of {num_samples} sample(s) (out of memory: wanted 1 TiB): the "
            f"step is repeated in {num_pieces} microbatches, and later steps use as many."
            for num_samples, num_pieces in [(8, 2), (4, 4)]
        ]


@pytest.mark.parametrize("options", [{"shard": "optimizer"}, {"nonfinite_gradients": "raise"}], ids=str)
@some
def test_options(world, small_buckets, options):
    model = HungryNet("after norm", True, limit=2 if world.rank == 0 else 100)
    reference = copy.deepcopy(model)
    reference.limit = 100
    trainer = create_distributed_trainer(model, **options)
    optimizer, plain_optimizer = sgd(model), sgd(reference)
    for step in range(3):
        tensors = batch(8 * world.size, F64, step)
        trainer.train_step(*tensors, LOSS, optimizer, microbatches="auto", clip_norm=0.5)
        accumulated_step(reference, tensors, 4, len, LOSS, plain_optimizer, clip_norm=0.5)
    assert_same(model, reference, 1e-10)
    trainer.close()


@some
def test_parts(world, small_buckets):
    """The longest part decides the number of pieces; some ranks have no samples."""
    model = HungryNet("after linear", False, limit=3 if world.rank == 0 else 100)
    reference = copy.deepcopy(model)
    reference.limit = 100
    for net in (model, reference):
        net.norm, net.norm1 = nn.Identity(), nn.Identity()  # so that the size of the pieces does not matter
    trainer = create_distributed_trainer(model, split_batches=False)
    optimizer, plain_optimizer = sgd(model), sgd(reference)
    for step in range(3):
        own = batch(11 if world.rank == 0 else 0 if step == 1 else world.rank, F64, 10 * step + world.rank)
        union = [torch.cat(tensors) for tensors in zip(*world.gather(own), strict=True)]
        trainer.train_step(*own, LOSS, optimizer, microbatches="auto")
        accumulated_step(reference, union, 1, len, LOSS, plain_optimizer)
    assert_same(model, reference, 1e-10)
    trainer.close()


@some
def test_terms(world):
    """A rank that never computed its loss still knows the number of its terms."""

    def criterion(outputs, targets):
        return {"first": outputs.square().mean(), "second": LOSS(outputs, targets)}

    model = HungryNet("after conv", False, limit=2 if world.rank == world.size - 1 else 100)
    trainer = create_distributed_trainer(model)
    tensors = batch(8 * world.size, F64)
    x, y = tensors
    expected = dict.fromkeys(("first", "second"), 0)
    reference = NormNet(F64)
    for start in range(0, len(x), len(x) // 4):
        piece = slice(start, start + len(x) // 4)
        for name, term in criterion(reference(x[piece]), y[piece]).items():
            expected[name] += term.detach() / 4
    loss = trainer.train_step(*tensors, criterion, sgd(model), microbatches="auto")
    for name, term in loss.items():
        assert abs(term - expected[name]) < 1e-11, name
    trainer.close()


@some
def test_single_sample(world):
    """Every rank raises the same error; nothing has changed, and training can continue."""
    model = HungryNet("after conv", False, limit=0 if world.rank == world.size - 1 else 100)
    model.norm, model.norm1 = nn.Identity(), nn.Identity()
    trainer = create_distributed_trainer(model)
    reference = copy.deepcopy(model)
    optimizer, plain_optimizer = sgd(model), sgd(reference)
    tensors = batch(2 * world.size, F64)
    expected = rf"rank {world.size - 1} ran out of memory in a piece of 1 sample\(s\), and there is no smaller one: out"
    with pytest.raises(torch.OutOfMemoryError, match=expected):
        trainer.train_step(*tensors, LOSS, optimizer, microbatches="auto")
    assert_same(model, reference, 0)
    model.limit = reference.limit = 100
    trainer.train_step(*tensors, LOSS, optimizer, microbatches="auto")
    accumulated_step(reference, tensors, 1, len, LOSS, plain_optimizer)
    assert_same(model, reference)
    trainer.close()


def test_refused():
    trainer = create_distributed_trainer(nn.Linear(4, 4), compression=PowerSGD(rank=1))
    arguments = (torch.zeros(2, 4), torch.zeros(2, 4), nn.MSELoss(), sgd(trainer.model))
    with pytest.raises(ValueError, match='microbatches="auto" does not go with PowerSGD'):
        trainer.train_step(*arguments, microbatches="auto")
    with pytest.raises(ValueError, match="microbatches must be an int of at least 1, or \"auto\", not 'many'"):
        trainer.train_step(*arguments, microbatches="many")
    trainer.close()


@contextlib.contextmanager
def room(num_bytes):
    """Allow this process to map `num_bytes` more memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@on_ranks(1, 2)
@pytest.mark.slow
def test_memory_limit(world, caplog):
    """With a real limit of memory, the last rank has too little for its part, and enough for a piece of it."""

    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.narrow, self.wide = nn.Linear(4, 8), nn.Linear(1, 1)

        def forward(self, x):
            wide = self.narrow(x)[:, :, None].expand(-1, -1, 1 << 16)  # 2 MiB for each sample and tensor
            return torch.tanh(torch.sin(wide * self.wide.weight) + self.wide.bias).mean(2)

    model = Wide()
    reference = copy.deepcopy(model)
    trainer = create_distributed_trainer(model)
    optimizer, plain_optimizer = sgd(model), sgd(reference)
    x, y = torch.randn(32 * world.size, 4), torch.randn(32 * world.size, 8)
    # Its pieces take up to 120 MiB, since freed memory stays mapped; the rest is for the buckets.
    with room(136 << 20) if world.rank == world.size - 1 else contextlib.nullcontext(), caplog.at_level(logging.INFO):
        for _ in range(3):
            trainer.train_step(x, y, nn.MSELoss(), optimizer, microbatches="auto")
    for _ in range(3):
        accumulated_step(reference, (x, y), 8, len, nn.MSELoss(), plain_optimizer)
    assert_same(model, reference, 1e-4)
    assert world.rank or "DefaultCPUAllocator: can't allocate memory" in caplog.text
    trainer.close()


@on_ranks(1, 2)
def test_save_in_a_repeated_step(world, shared_folder):
    """The first attempt of the step makes the save; the second attempt does not make it again."""
    model = HungryNet("end", False, limit=100)
    with create_distributed_trainer(model) as trainer:
        optimizer = sgd(model)
        trainer.train_step(*batch(12 * world.size, F64), LOSS, optimizer, microbatches="auto")
        trainer.save(shared_folder, optimizer=optimizer)
        model.limit = 3
        trainer.train_step(*batch(12 * world.size, F64), LOSS, optimizer, microbatches="auto")
    other = HungryNet("end", False, limit=100)
    with create_distributed_trainer(other) as trainer:
        assert trainer.load(shared_folder, optimizer=sgd(other)) == 1
