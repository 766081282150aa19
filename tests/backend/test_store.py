# SPDX-License-Identifier: Apache-2.0
"""The store over MPI, torch's own groups started by it, and `mpi://`."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks

from distributed_trainer import LaunchError, create_distributed_trainer
from distributed_trainer.backend import job as jobs
from distributed_trainer.backend.accelerator_group import ProcessGroupShmpiWithAccelerator
from distributed_trainer.backend.store import MPIStore

pytestmark = pytest.mark.each_mpi

some_ranks = on_ranks(2, 3, (3, 2))


@some_ranks
def test_store(world):
    """Each rank gets every value that one rank sets; values of all ranks arrive whole, large ones too."""
    whole = MPIStore(jobs.start(None, None).engine.create_mailbox())
    store = dist.PrefixStore("test", whole)
    store.set(f"key {world.rank}", bytes([world.rank]) * (1 + world.rank * 100_000))
    for rank in range(world.size):
        assert store.get(f"key {rank}") == bytes([rank]) * (1 + rank * 100_000)
    assert not store.check(["other"])


@some_ranks
def test_changes_have_an_order(world):
    """Changes by all ranks happen one after the other, also those through torch's C++."""
    whole = MPIStore(jobs.start(None, None).engine.create_mailbox())
    store = dist.PrefixStore("test", whole)
    counts = world.gather([store.add("count", 1) for _ in range(20)])
    assert sorted(count for one in counts for count in one) == list(range(1, 20 * world.size + 1))
    assert all(one == sorted(one) for one in counts)
    assert store.add("count", 0) == 20 * world.size
    assert store.get("count") == str(20 * world.size).encode()
    store.append("text", str(world.rank))
    world.comm.Barrier()
    store.append("text", "")
    assert sorted(store.get("text")) == sorted(str(rank).encode()[0] for rank in range(world.size))
    winners = set(world.gather(store.compare_set("first", "", str(world.rank))))
    assert len(winners) == 1 and winners.pop().decode() in map(str, range(world.size))
    assert store.compare_set("unset", "held", "wanted") == b"held"
    deleted = world.gather(store.delete_key("first"))
    assert sorted(deleted) == [False] * (world.size - 1) + [True]
    assert not whole.check(["test/first"])


@some_ranks
def test_store_times_out(world):
    store = MPIStore(jobs.start(None, None).engine.create_mailbox())
    with pytest.raises(
        dist.DistStoreError, match=rf"rank {world.rank} waited 0.1 s for missing, which no rank has set"
    ):
        store.wait(["missing"], timedelta(seconds=0.1))


@some_ranks
def test_accelerator_group(world):
    """As on GPUs with NCCL, tensors of one device type go to a group of torch, which starts by our store."""
    job = jobs.start(None, None)
    whole = MPIStore(job.engine.create_mailbox())
    store = dist.PrefixStore("accelerator", whole)
    made = []

    def make_gloo():
        made.append(dist.ProcessGroupGloo(store, world.rank, world.size, timedelta(seconds=20)))
        return made[-1]

    engine_group = job.engine.create_group(list(range(world.size)))
    group = ProcessGroupShmpiWithAccelerator(engine_group, job.module.ReduceOp, "cpu", make_gloo)
    tensor = torch.full((5,), float(world.rank + 1))
    group.allreduce([tensor]).wait()
    assert tensor.tolist() == [sum(range(1, world.size + 1))] * 5
    options = dist.BroadcastOptions()
    options.rootRank = world.size - 1
    group.broadcast([tensor.fill_(world.rank)], options).wait()
    assert tensor.tolist() == [world.size - 1] * 5
    gathered = torch.empty(world.size)
    group._allgather_base(gathered, torch.tensor([float(world.rank)])).wait()
    assert gathered.tolist() == list(range(world.size))
    assert len(made) == 1


@some_ranks
def test_trainer_leaves_the_callers_group(world):
    """A trainer does not close a group of this backend that the caller gave it."""
    dist.init_process_group("shmpi", init_method="mpi://")
    try:
        model = torch.nn.Linear(2, 1)
        with create_distributed_trainer(model, group=dist.group.WORLD) as trainer:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            trainer.train_step(torch.ones(4, 2), torch.ones(4, 1), torch.nn.MSELoss(), optimizer)
        tensor = torch.ones(1)
        dist.all_reduce(tensor)
        assert tensor.item() == world.size
    finally:
        dist.destroy_process_group()


@some_ranks
def test_init_process_group(world):
    """`mpi://` needs no address, port or rank; functions of torch.distributed work, with sub-groups, too."""
    dist.init_process_group("shmpi", init_method="mpi://")
    try:
        assert (dist.get_rank(), dist.get_world_size()) == (world.rank, world.size)
        tensor = torch.tensor([float(world.rank)])
        dist.all_reduce(tensor)
        assert tensor.item() == sum(range(world.size))
        ends = dist.new_group([0, world.size - 1])
        if world.rank in (0, world.size - 1):
            dist.all_reduce(tensor.fill_(1 + world.rank), group=ends)
            assert tensor.item() == 1 + world.size
        parts = [torch.empty(1) for _ in range(world.size)]
        dist.all_gather(parts, torch.tensor([float(world.rank)]))
        assert [part.item() for part in parts] == list(range(world.size))
        dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("how", ["short", "rank and size", "store"])
@some_ranks
def test_ways_to_start(world, how, tmp_path):
    """init_process_group works without an init_method, and with arguments that are not needed."""
    place = {"rank": world.rank, "world_size": world.size}
    path = world.comm.bcast(str(tmp_path / "store"))
    ways = {
        "short": {},
        "rank and size": place,
        "store": {"store": dist.FileStore(path, world.size), **place},
    }
    dist.init_process_group("shmpi", **ways[how])
    try:
        assert (dist.get_rank(), dist.get_world_size()) == (world.rank, world.size)
        tensor = torch.ones(1)
        dist.all_reduce(tensor)
        assert tensor.item() == world.size
    finally:
        dist.destroy_process_group()


@some_ranks
def test_wrong_starts(world):
    """A rank or size other than MPI's, and a mix with other backends, are refused; the message says what is right."""
    with pytest.raises(LaunchError, match=rf"given rank 0 of 9, but MPI says rank {world.rank} of {world.size}\."):
        dist.init_process_group("shmpi", rank=0, world_size=9)
    place = {"store": dist.HashStore(), "rank": world.size, "world_size": world.size + 1}
    with pytest.raises(LaunchError, match=rf"given rank {world.size} of {world.size + 1}, but MPI says"):
        dist.init_process_group("shmpi", **place)
    with pytest.raises(ValueError, match=r'mixes shmpi with others. Pass backend="shmpi"'):
        dist.init_process_group("cpu:shmpi,cuda:gloo", init_method="mpi://")
    assert not dist.is_initialized()
