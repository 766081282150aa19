# SPDX-License-Identifier: Apache-2.0
"""Works of async_op=True: waiting, futures, errors, and tensors to which only the work refers."""

import gc

import pytest
import torch
import torch.distributed as dist
from ranks import everywhere, on_ranks

from distributed_trainer import MismatchError

several = on_ranks(2, 3, 4, (2, 1), (3, 2), (4, 2))


def total(size):
    return sum(range(size))


@several
def test_is_completed(world, group):
    """A work is not completed before every rank has called."""
    tensor = torch.full((5,), float(world.rank))
    if world.rank == 0:
        work = dist.all_reduce(tensor, async_op=True)
        assert not work.is_completed()
        future = work.get_future()
        assert not future.done()
    world.comm.Barrier()
    if world.rank > 0:
        work = dist.all_reduce(tensor, async_op=True)
    assert work.wait()
    assert work.is_completed()
    assert work.is_success()
    assert work.exception() is None
    assert tensor.tolist() == [total(world.size)] * 5
    assert work.wait()


@everywhere
def test_futures(world, group):
    """Futures hold the caller's tensors, filled at the end, also if the engine worked on a contiguous copy."""
    rank, size = world.rank, world.size
    own = torch.full((4,), float(rank))
    strided = torch.full((4, 2), float(rank))[:, 0]
    gathered, part = torch.empty(size * 4), torch.empty(4)
    from_last = torch.full((4,), float(rank))
    futures = [
        dist.all_reduce(own, async_op=True).get_future(),
        dist.all_reduce(strided, async_op=True).get_future(),
        dist.broadcast(from_last, size - 1, async_op=True).get_future(),
        dist.all_gather_into_tensor(gathered, torch.full((4,), float(rank)), async_op=True).get_future(),
        dist.reduce_scatter_tensor(part, torch.full((size * 4,), float(rank)), async_op=True).get_future(),
    ]
    tensors = [own, strided, from_last, gathered, part]
    wanted = [
        torch.full((4,), float(total(size))),
        torch.full((4,), float(total(size))),
        torch.full((4,), size - 1.0),
        torch.arange(float(size)).repeat_interleave(4),
        torch.full((4,), float(total(size))),
    ]
    doubled = [future.then(lambda future: future.value()[0] * 2) for future in futures]
    for future, tensor, want, double in zip(futures, tensors, wanted, doubled, strict=True):
        assert torch.equal(double.wait(), 2 * want)
        assert future.done()
        assert future.value()[0].data_ptr() == tensor.data_ptr()
        assert torch.equal(tensor, want)
    done = torch.futures.collect_all([dist.all_reduce(own, async_op=True).get_future() for _ in range(20)]).wait()
    assert len(done) == 20


@several
def test_future_of_a_failure(world, group):
    """A future has the error that `wait` raises, and a callback gets it."""
    work = dist.all_reduce(torch.ones(2 + (world.rank == 0)), async_op=True)
    future = work.get_future()
    seen = future.then(lambda future: future.value())
    for wait in (future.wait, seen.wait, work.wait):
        with pytest.raises((MismatchError, RuntimeError), match=r"rank 0 calls all_reduce\(sum, 3 float32\)"):
            wait()
    assert work.is_completed()
    assert not work.is_success()
    assert isinstance(work.exception(), MismatchError)


@everywhere
def test_tensors_dropped_by_the_caller(world, group):
    """Work in flight keeps its tensors, contiguous or not."""
    rank, size = world.rank, world.size

    def value(number):
        return float(rank + number)

    works = [dist.all_reduce(torch.full((5000,), value(number)), async_op=True) for number in range(20)]
    works += [dist.all_reduce(torch.full((5000, 2), value(number))[:, 0], async_op=True) for number in range(20)]
    gathers = [
        dist.all_gather_into_tensor(torch.empty(size * 5000), torch.full((5000,), value(number)), async_op=True)
        for number in range(20)
    ]
    sends = [dist.isend(torch.full((5000,), value(number)), (rank + 1) % size) for number in range(20)]
    gc.collect()
    garbage = [torch.full((5000,), -1.0) for _ in range(100)]
    for number, work in enumerate(works):
        (result,) = work.get_future().wait()
        assert (result == total(size) + size * (number % 20)).all()
    for number, work in enumerate(gathers):
        (result,) = work.get_future().wait()
        assert torch.equal(result, torch.arange(float(size)).repeat_interleave(5000) + number)
    received = torch.empty(5000)
    for number in range(20):
        dist.irecv(received, (rank - 1) % size).wait()
        assert (received == (rank - 1) % size + number).all()
    for send in sends:
        send.wait()
    assert len(garbage) == 100


@everywhere
def test_works_that_nobody_waits_for(world, group):
    for _ in range(30):
        dist.all_reduce(torch.ones(1000), async_op=True)
        dist.broadcast(torch.ones(1000), 0, async_op=True).get_future()
    tensor = torch.ones(3)
    dist.all_reduce(tensor)
    assert tensor.tolist() == [world.size] * 3
