# SPDX-License-Identifier: Apache-2.0
"""Several groups in one job: in threads, of some ranks only, many at once, one after another."""

import inspect
import threading
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from ranks import everywhere, on_ranks

pytestmark = pytest.mark.each_mpi

several = on_ranks(2, 3, 4, (2, 1), (3, 2), (4, 2))


@everywhere
def test_two_threads(world, group):
    """Two threads use one group each, and their calls interleave in any order."""
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
    """Calls on a rank that is not in the group do nothing but warn."""
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
    """Each rank is in two pairs of neighbours, and each calls its pairs in a different order."""
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
    """With sort_ranks=False the group keeps the given order, and results follow it."""
    backwards = list(reversed(range(world.size)))
    turned = dist.new_group(backwards, sort_ranks=False)
    assert dist.get_rank(turned) == backwards.index(world.rank)
    gathered = torch.empty(world.size)
    dist.all_gather_into_tensor(gathered, torch.tensor([float(world.rank)]), turned)
    assert gathered.tolist() == backwards


@pytest.mark.skipif(
    "sort_ranks" not in inspect.signature(dist.new_group).parameters,
    reason="new_group(sort_ranks=) is not there before torch 2.12",
)
@several
def test_split_of_a_group(world, group):
    """The ranks given to split_group are numbers in the group that is split, not in the job."""
    turned = dist.new_group(list(reversed(range(world.size))), sort_ranks=False)
    others = list(range(1, world.size))  # all but the group's rank 0, which is the job's last
    part = turned.split_group(others, timeout=timedelta(seconds=10), group_name="others")
    if world.rank == world.size - 1:
        assert part is None
        return
    tensor = torch.tensor([1.0 + world.rank])
    part.allreduce([tensor]).wait()
    assert tensor.item() == sum(range(1, world.size))
    assert part.rank() == world.size - 2 - world.rank


@several
def test_many_groups(world, group):
    """Many groups can be made, used and destroyed, at once and one after another."""
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
    """init_process_group works again after destroy_process_group."""
    for number in range(3):
        dist.init_process_group("shmpi", init_method="mpi://")
        tensor = torch.tensor([float(world.rank + number)])
        dist.all_reduce(tensor, group=dist.new_group())
        assert tensor.item() == sum(rank + number for rank in range(world.size))
        dist.destroy_process_group()
