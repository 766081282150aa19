# SPDX-License-Identifier: Apache-2.0
"""Collectives of the shmpi process group, against results by formula. C++ tests cover the kernels separately."""

import itertools
import os
import re
from datetime import timedelta
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ranks import everywhere, mapped_bytes, on_ranks

from distributed_trainer import DistributedTrainerError, MismatchError
from distributed_trainer.backend import staging
from distributed_trainer.backend.gather import gather_bytes, gather_objects, message_device
from distributed_trainer.backend.process_group import ProcessGroupShmpi

pytestmark = pytest.mark.each_mpi

OPS = dist.ReduceOp
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
DTYPES = [*FLOATS, torch.int32, torch.int64, torch.uint8, torch.bool]
several = on_ranks(2, 3, 4, (2, 1), (3, 2), (4, 2))
one_node_several = on_ranks(2, 3, 4)


def counts(size):
    return [0, 1, size - 1, size, size + 1, 10_007]


def options(op, kind=dist.AllreduceOptions):
    result = kind()
    result.reduceOp = op
    return result


def values(rank, count, dtype):
    """Return small numbers whose sums and products are exact in every dtype (and wrap in the same way in uint8)."""
    numbers = (torch.arange(count) * 7 + rank * 3) % 4 + (dtype != torch.bool)
    return (numbers > 1 if dtype == torch.bool else numbers).to(dtype)


def reduced(op, tensors):
    if tensors[0].dtype == torch.bool:
        stacked = torch.stack(tensors)
        return stacked.any(0) if op in (OPS.SUM, OPS.MAX) else stacked.all(0)
    if op in (OPS.MIN, OPS.MAX):
        stacked = torch.stack(tensors)
        return (stacked.amin if op == OPS.MIN else stacked.amax)(0)
    result = tensors[0].clone()
    for tensor in tensors[1:]:
        result = result * tensor if op == OPS.PRODUCT else result + tensor
    if op != OPS.AVG:
        return result
    return torch.div(result, len(tensors), rounding_mode=None if result.is_floating_point() else "trunc")


def ops_of(dtype):
    return [OPS.SUM, OPS.PRODUCT, OPS.MIN, OPS.MAX, *([] if dtype == torch.bool else [OPS.AVG])]


class Staged(ProcessGroupShmpi):
    """Group that copies tensors even if the engine could work on them in place."""

    def allreduce(self, *arguments):
        with mock.patch.object(staging, "needs_copy", lambda tensor: True):
            return super().allreduce(*arguments)


@everywhere
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_reduce(world, dtype):
    """all_reduce is right for all operations and sizes, in ordinary memory, in the group's memory and with copies."""
    group = world.group()
    staged = Staged(group._group, group._operations)
    memory = group.allocate(10_007 * 8).view(dtype)
    for op, count in itertools.product(ops_of(dtype), counts(world.size)):
        expected = reduced(op, [values(rank, count, dtype) for rank in range(world.size)])
        for name, through, tensor in [
            ("ordinary", group, torch.empty(count, dtype=dtype)),
            ("shared", group, memory[:count]),
            ("staged", staged, torch.empty(count, dtype=dtype)),
        ]:
            tensor.copy_(values(world.rank, count, dtype))
            through.allreduce([tensor], options(op)).wait()
            torch.testing.assert_close(tensor, expected, msg=lambda text: f"{name} {op} {count}: {text}")  # noqa: B023


@everywhere
def test_lazy_views(world):
    """Lazy views are reduced by their values: a conjugate is a view of memory that holds other values."""
    group = world.group()
    own = torch.tensor([complex(world.rank, 1)]).conj()
    gathered = torch.empty(world.size, dtype=torch.complex64)
    group._allgather_base(gathered, own).wait()
    assert gathered.tolist() == [complex(rank, -1) for rank in range(world.size)]
    group.broadcast([own]).wait()
    assert own.tolist() == [complex(0, -1)]


@everywhere
def test_gather_bytes(world):
    group = world.group()
    for length in (1, 512, (1 << 20) + 3):
        messages = [bytes([rank + 1]) * length for rank in range(world.size)]
        assert gather_bytes(group, messages[world.rank]) == messages


@several
def test_gather_bytes_of_different_lengths(world):
    with pytest.raises(MismatchError, match=r"rank 0 calls all_gather\(1 uint8\), rank 1 calls all_gather\(2 uint8\)"):
        gather_bytes(world.group(), bytes([0] * (1 + (world.rank == 1))))


@everywhere
def test_more_than_scratch(world):
    """Long tensors go in pieces of 1 MiB, the last one shorter, also in the group's memory at several offsets."""
    group = world.group()
    count = (3 << 18) + 5
    memory = group.allocate(8 * count).view(torch.float32)
    expected = reduced(OPS.SUM, [values(rank, count, torch.float32) for rank in range(world.size)])
    for tensor in [torch.empty(count), memory[3 : count + 3], memory[world.rank : world.rank + count]]:
        tensor.copy_(values(world.rank, count, torch.float32))
        group.allreduce([tensor]).wait()
        assert torch.equal(tensor, expected)


@everywhere
def test_shared_memory_on_some_ranks_only(world):
    """Ranks may call one collective with buffers in the group's memory and in ordinary memory."""
    group = world.group()
    memory = group.allocate(4 * 1000).view(torch.float32)
    tensor = memory if world.rank % 2 else torch.empty(1000)
    tensor.copy_(values(world.rank, 1000, torch.float32))
    group.allreduce([tensor]).wait()
    assert torch.equal(tensor, reduced(OPS.SUM, [values(rank, 1000, torch.float32) for rank in range(world.size)]))


def ordered_sum(tensors, dtype):
    """Sum from left to right, 16-bit types in float32 and rounded once."""
    wide = torch.float32 if dtype.itemsize == 2 else dtype
    result = tensors[0].to(wide)
    for tensor in tensors[1:]:
        result = result + tensor.to(wide)
    return result.to(dtype)


@everywhere
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_fixed_order(world, dtype):
    """A sum has the same bits as one in the order of the ranks within a node, and then of the nodes."""
    group = world.group()
    count = 10_007
    generators = [torch.Generator().manual_seed(rank) for rank in range(world.size)]
    tensors = [torch.randn(count, generator=generator).to(dtype) for generator in generators]
    per_node = world.job.ranks_per_node or world.size
    nodes = [ordered_sum(tensors[start : start + per_node], dtype) for start in range(0, world.size, per_node)]
    expected = ordered_sum(nodes, dtype)
    memory = group.allocate(count * dtype.itemsize).view(dtype)
    for tensor in (tensors[world.rank].clone(), memory.copy_(tensors[world.rank])):
        group.allreduce([tensor]).wait()
        assert torch.equal(tensor.view(torch.uint8), expected.view(torch.uint8))


@everywhere
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_nan_propagates(world, dtype):
    group = world.group()
    for op, owner in itertools.product([OPS.SUM, OPS.MIN, OPS.MAX], range(world.size)):
        tensor = torch.full((9,), float(world.rank), dtype=dtype)
        tensor[4] = float("nan") if world.rank == owner else 1
        group.allreduce([tensor], options(op)).wait()
        assert tensor.isnan().tolist() == [False] * 4 + [True] + [False] * 4


@everywhere
def test_broadcast(world):
    """broadcast works for any dtype, from every root."""
    group = world.group()
    for root, count in itertools.product(range(world.size), [*counts(world.size), (1 << 20) + 3]):
        for dtype in (torch.uint8, torch.complex64, torch.int16) if count < 10 else (torch.uint8,):
            tensor = torch.full((count,), world.rank, dtype=dtype)
            opts = dist.BroadcastOptions()
            opts.rootRank = root
            group.broadcast([tensor], opts).wait()
            assert torch.equal(tensor, torch.full((count,), root, dtype=dtype))


@everywhere
def test_all_gather(world):
    group = world.group()
    for count in [*counts(world.size), (1 << 18) + 3]:
        own = values(world.rank, count, torch.float32)
        expected = [values(rank, count, torch.float32) for rank in range(world.size)]
        output = torch.empty(world.size * count)
        group._allgather_base(output, own).wait()
        assert torch.equal(output, torch.cat(expected))
        outputs = [torch.empty(count) for _ in range(world.size)]
        group.allgather([outputs], [own]).wait()
        assert all(map(torch.equal, outputs, expected))


@everywhere
def test_reduce_scatter(world):
    group = world.group()
    for op, count in itertools.product(ops_of(torch.float32), [0, 1, 5, 10_007, (1 << 18) + 3]):
        inputs = [values(rank, world.size * count, torch.float32) for rank in range(world.size)]
        output = torch.empty(count)
        group._reduce_scatter_base(output, inputs[world.rank], options(op, dist.ReduceScatterOptions)).wait()
        start = world.rank * count
        torch.testing.assert_close(output, reduced(op, inputs)[start : start + count])


@everywhere
def test_barrier(world, tmp_path):
    """No rank leaves a barrier before the last one has arrived."""
    group = world.group()
    folders = world.gather(tmp_path)
    for last in range(world.size):
        if world.rank == last:
            (folders[0] / f"{last}").touch()
        group.barrier().wait()
        assert (folders[0] / f"{last}").exists()


@everywhere
def test_non_contiguous(world):
    group = world.group()
    tensor = torch.full((4, 6), float(world.rank))
    view = tensor.t()[1:4]
    group.allreduce([view]).wait()
    total = sum(range(world.size))
    assert (view == total).all()
    assert (tensor[:, 0] == world.rank).all()
    assert (tensor[:, 4:] == world.rank).all()
    target = torch.zeros(world.size, 8)[:, ::2]
    group._allgather_base(target, torch.full((4,), float(world.rank))).wait()
    assert torch.equal(target, torch.arange(world.size).float()[:, None].expand(-1, 4))


@everywhere
def test_many_in_flight(world):
    """More collectives than the ring of announcements holds can be in flight, and be waited for in another order."""
    group = world.group()
    tensors = [torch.full((number % 7,), float(world.rank + number)) for number in range(200)]
    works = [group.allreduce([tensor]) for tensor in tensors]
    for work in [*works[100:], *works[:100]]:
        work.wait()
        assert work.is_completed()
    for number, tensor in enumerate(tensors):
        assert (tensor == sum(rank + number for rank in range(world.size))).all()


@everywhere
def test_buffers_live_until_done(world):
    """The caller may drop tensors and works that are in flight."""
    group = world.group()
    for _ in range(50):
        group.allreduce([torch.full((5000,), 1.0)])
    last = torch.ones(3)
    group.allreduce([last]).wait()
    assert (last == world.size).all()


@everywhere
def test_groups_have_their_own_order(world):
    """Calls of two groups may interleave differently on each rank."""
    groups = [world.group(), world.group()]
    order = [0, 1] if world.rank % 2 else [1, 0]
    for _ in range(20):
        tensors = [torch.full((100,), float(world.rank)), torch.full((70,), float(world.rank * 2))]
        works = {which: groups[which].allreduce([tensors[which]]) for which in order}
        for which in order:
            works[which].wait()
        total = sum(range(world.size))
        assert (tensors[0] == total).all()
        assert (tensors[1] == 2 * total).all()


@on_ranks(3, 4, (3, 2), (4, 2))
def test_subgroups(world):
    """Groups of some ranks work, and one of all ranks in reverse order."""
    backwards = list(reversed(range(world.size)))
    group = world.group(backwards)
    assert (group.rank(), group.size()) == (backwards.index(world.rank), world.size)
    output = torch.empty(world.size)
    group._allgather_base(output, torch.tensor([float(world.rank)])).wait()
    assert output.tolist() == backwards
    members = [world.size - 1, 0]
    if world.rank in members:
        pair = world.group(members)
        tensor = torch.tensor([float(world.rank)])
        opts = dist.BroadcastOptions()
        opts.rootRank = 0
        pair.broadcast([tensor], opts).wait()
        assert tensor.item() == members[0]
        output = torch.empty(1)
        pair._reduce_scatter_base(output, torch.tensor([1.0, 2.0])).wait()
        assert output.item() == 2.0 * (pair.rank() + 1)


@one_node_several
@pytest.mark.parametrize("kind", ["count", "dtype", "op", "collective", "root"])
def test_mismatch(world, kind):
    """Every rank gets the same message, which names both calls."""
    group = world.group()
    odd = world.rank == world.size - 1

    def call():
        if kind == "collective" and odd:
            return group.barrier()
        if kind == "root":
            opts = dist.BroadcastOptions()
            opts.rootRank = int(odd)
            return group.broadcast([torch.zeros(4, dtype=torch.uint8)], opts)
        tensor = torch.zeros(5 if odd and kind == "count" else 4)
        if odd and kind == "dtype":
            tensor = tensor.double()
        return group.allreduce([tensor], options(OPS.MAX if odd and kind == "op" else OPS.SUM))

    with pytest.raises(MismatchError) as error:
        call().wait()
    messages = set(world.gather(str(error.value)))
    assert len(messages) == 1
    message = messages.pop()
    assert f"rank {world.size - 1} calls" in message
    assert "rank 0 calls" in message
    expected = {
        "count": "5 float32",
        "dtype": "4 float64",
        "op": "all_reduce(max",
        "collective": "barrier()",
        "root": "root 1",
    }
    assert expected[kind] in message
    with pytest.raises(MismatchError):  # the group is unusable now, and raises
        group.barrier().wait()


@several
def test_wrong_arguments(world):
    """Wrong arguments are refused by the calling rank before anything is sent; the group stays usable."""
    group = world.group()
    with pytest.raises(TypeError, match="float32, float64"):
        group.allreduce([torch.zeros(3, dtype=torch.uint16)])
    with pytest.raises(ValueError, match="average of bool"):
        group.allreduce([torch.zeros(3, dtype=torch.bool)], options(OPS.AVG))
    with pytest.raises(ValueError, match="bxor of float32: only integers and booleans have it"):
        group.allreduce([torch.zeros(3)], options(OPS.BXOR))
    with pytest.raises(ValueError, match=r"root is 9, the group has ranks 0 to"):
        opts = dist.BroadcastOptions()
        opts.rootRank = 9
        group.broadcast([torch.zeros(3)], opts)
    twelve = torch.zeros(12)
    with pytest.raises(ValueError, match=rf"all_gather: {world.size} outputs .* bytes and should have 48"):
        group._allgather_base(twelve, torch.zeros(12))
    with pytest.raises(ValueError, match=rf"reduce_scatter: {world.size} inputs .* bytes and should have 48"):
        group._reduce_scatter_base(torch.zeros(12), twelve)
    with pytest.raises(ValueError, match=rf"13 elements can't be cut into equal parts for {world.size} ranks"):
        group._reduce_scatter_base(torch.zeros(12), torch.zeros(13))
    with pytest.raises(ValueError, match=rf"destination is {world.size}, the group has ranks 0 to"):
        group.send([twelve], world.size)
    with pytest.raises(ValueError, match="the tag is -1"):
        group.recv([twelve], 0, -1)
    tensor = torch.ones(1)
    group.allreduce([tensor]).wait()
    assert tensor.item() == world.size


@several
def test_timeout(world):
    """A wait with a timeout ends, while the collective continues."""
    group = world.group()
    tensor = torch.ones(1)
    if world.rank == 0:
        work = group.allreduce([tensor])
        text = re.escape("after 0.2 s rank 0 waits in all_reduce(sum, 1 float32)")
        with pytest.raises(dist.DistBackendError, match=text):
            work.wait(timedelta(seconds=0.2))
        assert not work.is_completed()
    world.comm.Barrier()
    if world.rank > 0:
        work = group.allreduce([tensor])
    assert work.wait(timedelta(seconds=20))
    assert tensor.item() == world.size


@everywhere
def test_gather_objects(world):
    group = world.group()
    objects = gather_objects(group, {"rank": world.rank, "text": "x" * world.rank * 1000})
    assert objects == [{"rank": rank, "text": "x" * rank * 1000} for rank in range(world.size)]
    assert message_device(group) == torch.device("cpu")


@everywhere
def test_allocate(world):
    """Memory is zeroed and each rank's own; `release` makes the group copy again; its last view frees the memory."""
    group = world.group()
    before = mapped_bytes()
    memory = group.allocate(40 << 20)
    assert (memory.dtype, memory.shape) == (torch.uint8, (40 << 20,))
    assert not memory.any()
    assert mapped_bytes() - before >= 40 << 20
    memory[:] = world.rank
    world.comm.Barrier()
    assert (memory == world.rank).all()
    view = memory[10:20]
    group.release(memory)
    del memory
    assert (view == world.rank).all()
    group.allreduce([view]).wait()
    assert (view == sum(range(world.size))).all()
    del view
    group.barrier().wait()  # the group keeps the buffers of its last call until the next one
    assert mapped_bytes() - before < 1 << 20


@everywhere
def test_fork(world):
    """A forked child has none of the shared memory and descriptors, and does no harm when it ends."""
    group = world.group()
    memory = group.allocate(1 << 20)
    assert memory.numel() == 1 << 20
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        threads = [open(f"/proc/self/task/{task}/comm").read().strip() for task in os.listdir("/proc/self/task")]
        os.write(writer, f"{mapped_bytes()} {[name for name in threads if name.startswith('dtrain')]}".encode())
        del memory, group
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        assert pipe.read() == "0 []"
    assert os.waitpid(child, 0)[1] == 0
    tensor = torch.ones(1)
    group.allreduce([tensor]).wait()
    assert tensor.item() == world.size
    assert not [fd for fd in os.listdir("/proc/self/fd") if is_inherited_memory(fd)]


@on_ranks(3, 4)
def test_domains(world):
    """With two simulated NUMA nodes, each sums its own ranks first, in place and in ordinary memory."""
    from distributed_trainer.backend import job

    started = job.start(None, None)
    engine = started.module.Engine(numa_node=world.rank // 2)
    group = ProcessGroupShmpi(engine.create_group(list(range(world.size))), started.module.ReduceOp)
    data = [torch.randn(100_003, generator=torch.Generator().manual_seed(r)).bfloat16() for r in range(world.size)]
    ordinary, in_place = data[world.rank].clone(), group.allocate(2 * 100_003).view(torch.bfloat16)
    in_place.copy_(ordinary)
    for tensor in (ordinary, in_place):
        group.allreduce([tensor]).wait()
        assert torch.equal(tensor, data[0] + data[1] + sum(data[3:], data[2]))  # each rounded to bfloat16
        assert not torch.equal(tensor, sum(tensor.float() for tensor in data).bfloat16())
    engine.close()


def is_inherited_memory(fd):
    try:
        target = os.readlink(f"/proc/self/fd/{fd}")
    except FileNotFoundError:  # the descriptor that listdir itself had open
        return False
    return "memfd:" in target and "dtrain" in target and os.get_inheritable(int(fd))


@several
def test_closed_engine(world):
    """When one rank closes a communicator's engine, the others' collectives fail and name the rank that has left."""
    from distributed_trainer.backend import job

    engine = job.start(None, None).module.Engine(0, world.job.ranks_per_node)
    group = ProcessGroupShmpi(engine.create_group(list(range(world.size))), job.start(None, None).module.ReduceOp)
    if world.job.ranks_per_node:
        return
    if world.rank == 0:
        world.comm.Barrier()
        with pytest.raises(DistributedTrainerError, match=f"rank {world.size - 1} has left the job"):
            for _ in range(3):
                group.allreduce([torch.ones(1)]).wait()
    else:
        if world.rank == world.size - 1:
            engine.close()
        world.comm.Barrier()
