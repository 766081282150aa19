# SPDX-License-Identifier: Apache-2.0
"""Several groups in one job: threads, members and others, many of them, one after another."""

import inspect
import threading

import pytest
import torch
import torch.distributed as dist
from ranks import everywhere, on_ranks

several = on_ranks(2, 3, 4, (2, 1), (3, 2), (4, 2))


@everywhere
def test_two_threads(world, group):
    """Each with a group of its own; their calls meet in any order."""
    groups = [dist.new_group(), dist.new_group()]
    failures = []

    def run(which):
        try:
            own = groups[which]
            for number in range(100):
                tensor = torch.full((1 + 700 * (number % 3),), float(world.rank + which))
                work = dist.all_reduce(tensor, group=own, async_op=True)
                received = torch.empty(3)
                receive = dist.irecv(received, (world.rank - 1) % world.size, own)
                send = dist.isend(torch.full((3,), float(number)), (world.rank + 1) % world.size, own)
                for one in (receive, send, work):
                    one.wait()
                assert received.tolist() == [number] * 3
                assert (tensor == sum(range(world.size)) + which * world.size).all()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(which,), daemon=True) for which in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not failures
    assert not any(thread.is_alive() for thread in threads)


@on_ranks(3, 4, (3, 2), (4, 2))
def test_not_a_member(world, group):
    """Calls with the group do nothing and say so."""
    others = dist.new_group([0, 1])
    tensor = torch.ones(2)
    if world.rank < 2:
        dist.all_reduce(tensor, group=others)
        assert tensor.tolist() == [2, 2]
    else:
        with pytest.warns(UserWarning, match="does not belong to"):
            assert dist.all_reduce(tensor, group=others) is None
        assert tensor.tolist() == [1, 1]
        assert dist.get_rank(others) == -1


@several
def test_overlapping_groups(world, group):
    """Pairs of neighbours, of which each rank is in two, called in an order of its own."""
    pairs = [dist.new_group([rank, rank + 1]) for rank in range(world.size - 1)]
    own = [rank for rank in range(world.size - 1) if world.rank in (rank, rank + 1)]
    tensors = {rank: torch.tensor([float(world.rank)]) for rank in own}
    works = [dist.all_reduce(tensors[rank], group=pairs[rank], async_op=True) for rank in own[:: 1 - 2 * (own[0] % 2)]]
    for work in works:
        work.wait()
    for rank, tensor in tensors.items():
        assert tensor.item() == 2 * rank + 1


@pytest.mark.skipif(
    "sort_ranks" not in inspect.signature(dist.new_group).parameters,
    reason="new_group(sort_ranks=) is not there before torch 2.12",
)
@several
def test_order_of_ranks(world, group):
    """sort_ranks=False keeps the order given; results follow it."""
    backwards = list(reversed(range(world.size)))
    turned = dist.new_group(backwards, sort_ranks=False)
    assert dist.get_rank(turned) == backwards.index(world.rank)
    gathered = torch.empty(world.size)
    dist.all_gather_into_tensor(gathered, torch.tensor([float(world.rank)]), turned)
    assert gathered.tolist() == backwards


@several
def test_many_groups(world, group):
    """Made, used and destroyed; alive at once, and one after another."""
    groups = [dist.new_group() for _ in range(20)]
    for number, one in enumerate(groups):
        tensor = torch.tensor([float(world.rank + number)])
        dist.all_reduce(tensor, group=one)
        assert tensor.item() == sum(rank + number for rank in range(world.size))
    for one in groups:
        dist.destroy_process_group(one)
    for _ in range(20):
        one = dist.new_group()
        dist.barrier(one)
        dist.destroy_process_group(one)
    dist.barrier()


@several
def test_started_again(world):
    """init_process_group after destroy_process_group."""
    for number in range(3):
        dist.init_process_group("shmpi", init_method="mpi://")
        tensor = torch.tensor([float(world.rank + number)])
        dist.all_reduce(tensor, group=dist.new_group())
        assert tensor.item() == sum(rank + number for rank in range(world.size))
        dist.destroy_process_group()
