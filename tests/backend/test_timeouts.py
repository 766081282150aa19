# SPDX-License-Identifier: Apache-2.0
"""Timeouts of waits for an absent rank: the message, the time, and the group's state afterwards."""

import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks

from distributed_trainer import DistributedTrainerError

some_ranks = on_ranks(2, (3, 1), (4, 2))

LIMIT = timedelta(seconds=1.5)


def late_group(world):
    """Return a group with a timeout of 1.5 s, whose ranks have made two calls."""
    group = world.group()
    group.set_timeout(LIMIT)
    group.allreduce([torch.zeros(3)]).wait()
    group.broadcast([torch.zeros(5)]).wait()
    world.comm.Barrier()
    return group


@some_ranks
def test_absent_rank(world):
    """The message says where the absent rank was last seen; afterwards no rank can use the group."""
    group = late_group(world)
    absent = world.size - 1
    seen = f"rank {absent} was last seen in collective 1, broadcast(root 0, 5 float32), which it called"
    start = time.monotonic()
    if world.rank != absent:
        with pytest.raises((dist.DistBackendError, DistributedTrainerError)) as error:
            group.allreduce([torch.zeros(4)]).wait()
        assert LIMIT.total_seconds() <= time.monotonic() - start + 0.3 < LIMIT.total_seconds() + 3
        assert f"all_reduce(sum, 4 float32), collective 2 of a group of {world.size} ranks; {seen}" in str(error.value)
        assert "The timeout of 1.5 s is over" in str(error.value)
    world.comm.Barrier()
    for _ in range(2):
        start = time.monotonic()
        with pytest.raises(DistributedTrainerError, match=f"given up (this|the) group: .*{seen.split('(')[0]}"):
            group.allreduce([torch.zeros(4)]).wait()
        assert time.monotonic() - start < 1
    world.group().barrier().wait()  # other groups still work


@some_ranks
def test_message_that_does_not_come(world):
    group = late_group(world)
    if world.rank == 0:
        with pytest.raises(
            dist.DistBackendError, match=r"waits in receive\(from rank 1, 3 float32\); rank 1 was last seen in"
        ):
            group.recv([torch.zeros(3)], 1).wait()
    world.comm.Barrier()
    if world.rank == 1:
        with pytest.raises(DistributedTrainerError, match="rank 0 has given up this group"):
            group.barrier().wait()


@some_ranks
def test_monitored_barrier(world):
    group = late_group(world)
    group.monitored_barrier(timedelta(seconds=30))
    world.comm.Barrier()
    if world.rank == 0:
        with pytest.raises(dist.DistBackendError) as error:
            group.monitored_barrier(timedelta(seconds=0.2))
        for rank in range(1, world.size):
            assert f"; rank {rank} was last seen in collective 2, barrier()" in str(error.value)
    world.comm.Barrier()


@some_ranks
@pytest.mark.slow
def test_buffers_outlive_the_timeout(world):
    """Buffers of operations that were given up may still be written to, so their memory is not reused."""
    group = late_group(world)
    if world.rank == 0:
        addresses = []
        for _ in range(3):
            tensor = torch.zeros(100_003)
            addresses.append(tensor.data_ptr())
            work = group.allreduce([tensor], None)
            del tensor
        with pytest.raises(dist.DistBackendError):
            work.wait()
        del work
        assert not {torch.zeros(100_003).data_ptr() for _ in range(3)} & set(addresses)
    world.comm.Barrier()
