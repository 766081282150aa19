# SPDX-License-Identifier: Apache-2.0
"""send and recv: tags, any source, and messages beside collectives."""

import itertools

import pytest
import torch
import torch.distributed as dist
from ranks import everywhere, on_ranks

pytestmark = pytest.mark.each_mpi

several = on_ranks(2, 3, 4, (2, 1), (3, 2), (4, 2))
LENGTHS = [0, 1, 1000, (1 << 20) + 3]  # the last one is sent in several pieces


def message(sender, receiver, number, length):
    return torch.arange(length, dtype=torch.float32) + 100 * sender + 10 * receiver + number


@several
def test_tags_out_of_order(world, group):
    """A receive takes the message with its tag, whichever arrived first; messages of one tag keep their order."""
    peers = [rank for rank in range(world.size) if rank != world.rank]
    tags = [5, 0, 7, 5]
    for length in LENGTHS:
        sends = [
            dist.isend(message(world.rank, peer, number, length), peer, tag=tag)
            for peer in peers
            for number, tag in enumerate(tags)
        ]
        for peer in peers:
            for number in (2, 0, 3, 1):
                received = torch.empty(length)
                assert dist.recv(received, peer, tag=tags[number]) == peer
                assert torch.equal(received, message(peer, world.rank, number, length))
        for send in sends:
            send.wait()


@several
def test_receives_before_sends(world, group):
    """Receives may be posted before the sends, and in a different order."""
    source, target = (world.rank - 1) % world.size, (world.rank + 1) % world.size
    for length in LENGTHS:
        received = [torch.empty(length) for _ in range(4)]
        receives = [dist.irecv(received[tag], source, tag=tag) for tag in range(4)]
        world.comm.Barrier()
        sends = [dist.isend(message(world.rank, target, tag, length), target, tag=tag) for tag in (3, 1, 0, 2)]
        for work in [*receives[::-1], *sends]:
            work.wait()
            assert work.is_completed()
        for tag in range(4):
            assert torch.equal(received[tag], message(source, world.rank, tag, length))


@several
def test_several_of_one_tag_in_flight(world, group):
    """Messages of one tag arrive in the order in which they were sent, whether sent or received first."""
    source, target = (world.rank - 1) % world.size, (world.rank + 1) % world.size
    for length, receives_first in itertools.product(LENGTHS, [True, False]):
        received = [torch.empty(length) for _ in range(4)]
        receives = [dist.irecv(tensor, source) for tensor in received] if receives_first else []
        world.comm.Barrier()
        sends = [dist.isend(message(world.rank, target, number, length), target) for number in range(4)]
        if not receives_first:
            world.comm.Barrier()
            receives = [dist.irecv(tensor, source) for tensor in received]
        for work in [*receives, *sends]:
            work.wait()
        for number, tensor in enumerate(received):
            assert torch.equal(tensor, message(source, world.rank, number, length))


@several
def test_any_source(world, group):
    """Each rank receives one message from every other rank, with its sender; messages of another tag are not taken."""
    peers = [rank for rank in range(world.size) if rank != world.rank]
    for length in LENGTHS:
        sends = [dist.isend(message(world.rank, peer, tag, length), peer, tag=tag) for peer in peers for tag in (9, 4)]
        for tag in (4, 9):
            sources = []
            for _ in peers:
                received = torch.empty(length)
                sources.append(dist.recv(received, tag=tag))
                assert torch.equal(received, message(sources[-1], world.rank, tag, length))
            assert sorted(sources) == peers
        for send in sends:
            send.wait()
        dist.barrier()  # messages of different ranks have no order


@several
def test_receives_from_any_source_in_flight(world, group):
    """If several receives are in flight, each takes one whole message."""
    peers = [rank for rank in range(world.size) if rank != world.rank]
    for length in LENGTHS:
        received = [torch.empty(length) for _ in peers]
        receives = [dist.irecv(tensor) for tensor in received]
        world.comm.Barrier()
        sends = [dist.isend(message(world.rank, peer, 0, length), peer) for peer in peers]
        for work in [*receives, *sends]:
            work.wait()
        sources = [work._source_rank() for work in receives]  # as dist.recv does
        assert sorted(sources) == peers
        for source, tensor in zip(sources, received, strict=True):
            assert torch.equal(tensor, message(source, world.rank, 0, length))
        dist.barrier()


@several
def test_any_source_in_a_group(world, group):
    """The sender is given by its rank in the whole job."""
    members = [0, world.size - 1]
    pair = dist.new_group(members)
    if world.rank == members[1]:
        dist.send(torch.tensor([7.0]), group=pair, group_dst=0)
    elif world.rank == 0:
        received = torch.empty(1)
        assert dist.recv(received, group=pair) == members[1]
        assert received.item() == 7


@everywhere
def test_to_oneself(world, group):
    """A rank can send to itself; torch allows it for isend and irecv."""
    for length in LENGTHS:
        received = torch.empty(length)
        receive = dist.irecv(received, world.rank, tag=1)
        send = dist.isend(message(world.rank, world.rank, 0, length), world.rank, tag=1)
        receive.wait()
        send.wait()
        assert torch.equal(received, message(world.rank, world.rank, 0, length))


@several
def test_beside_collectives(world, group):
    """Messages and collectives of one group do not wait for each other."""
    source, target = (world.rank - 1) % world.size, (world.rank + 1) % world.size
    for length in LENGTHS:
        received = torch.empty(length)
        tensor = torch.full((length,), float(world.rank))
        receive = dist.irecv(received, source)
        work = dist.all_reduce(tensor, async_op=True)
        dist.barrier()
        send = dist.isend(message(world.rank, target, 0, length), target)
        gathered = torch.empty(world.size)
        dist.all_gather_into_tensor(gathered, torch.tensor([float(world.rank)]))
        for one in (receive, work, send):
            one.wait()
        assert torch.equal(received, message(source, world.rank, 0, length))
        assert (tensor == sum(range(world.size))).all()
        assert gathered.tolist() == list(range(world.size))


@several
def test_received_before_the_others_join_a_collective(world, group):
    """A rank in a collective still answers a message from a rank that joins the collective only after the answer."""
    if world.rank == 0:
        answer = torch.empty(1)
        receive = dist.irecv(answer, 1)
        work = dist.barrier(async_op=True)
        receive.wait()
        dist.send(answer + 1, 1)
        work.wait()
    else:
        if world.rank == 1:
            answer = torch.tensor([5.0])
            dist.send(answer, 0)
            dist.recv(answer, 0)
            assert answer.item() == 6
        dist.barrier()


@several
def test_batch_of_all_pairs(world, group):
    """One batch sends messages of every length between all pairs of ranks."""
    peers = range(world.size)
    received = {(peer, length): torch.empty(length) for peer in peers for length in LENGTHS}
    operations = []
    for peer, (number, length) in itertools.product(peers, enumerate(LENGTHS)):
        operations.append(dist.P2POp(dist.isend, message(world.rank, peer, number, length), peer, tag=number))
        operations.append(dist.P2POp(dist.irecv, received[peer, length], peer, tag=number))
    works = dist.batch_isend_irecv(operations[world.rank :] + operations[: world.rank])
    for work in works:
        work.wait()
    for (peer, length), tensor in received.items():
        assert torch.equal(tensor, message(peer, world.rank, LENGTHS.index(length), length))


@several
def test_non_contiguous(world, group):
    """A receive into a view writes only the elements of the view."""
    source, target = (world.rank - 1) % world.size, (world.rank + 1) % world.size
    matrix = torch.full((6, 4), -1.0)
    receive = dist.irecv(matrix.t()[1], source)
    send = dist.isend(message(world.rank, target, 0, 12)[::2], target)
    receive.wait()
    send.wait()
    wanted = torch.full((6, 4), -1.0)
    wanted[:, 1] = message(source, world.rank, 0, 12)[::2]
    assert torch.equal(matrix, wanted)
