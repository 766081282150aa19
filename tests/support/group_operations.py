# SPDX-License-Identifier: Apache-2.0
"""Operations of torch.distributed without a tensor of the caller: barriers, objects, groups."""

import re
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from operations import Call, Operation


def wait_for_the_last(call: Call, barrier) -> None:
    """Check that no rank leaves before the last rank has arrived. All ranks are on one machine, with one clock."""
    for last in range(call.size):
        if call.rank == last:
            time.sleep(0.03)
        came = time.monotonic()
        barrier()
        left = time.monotonic()
        times: list = [None] * call.size
        dist.all_gather_object(times, came, call.group)
        assert left >= max(times)


def barrier(call: Call) -> None:
    wait_for_the_last(call, lambda: dist.barrier(call.group))
    wait_for_the_last(call, lambda: dist.barrier(call.group, async_op=True).wait())


def monitored_barrier(call: Call) -> None:
    """Call the group's own method: torch's function refuses any backend that is not called gloo."""
    group = dist.new_group()
    wait_for_the_last(call, lambda: group.monitored_barrier(timedelta(seconds=10)))
    missing = call.size - 1
    if call.rank < missing:
        with pytest.raises(RuntimeError) as error:
            group.monitored_barrier(timedelta(seconds=0.3 if call.rank == 0 else 5))
        assert call.rank > 0 or re.search(rf"(?i)ranks? {missing}\b", str(error.value))
    dist.barrier(call.group)
    dist.destroy_process_group(group)


def monitored_barrier_names_all(call: Call) -> None:
    group = dist.new_group()
    if call.rank == 0 and call.size > 1:
        with pytest.raises(RuntimeError) as error:
            group.monitored_barrier(timedelta(seconds=0.3), wait_all_ranks=True)
        numbers = re.findall(r"\d+", str(error.value))
        assert all(str(missing) in numbers for missing in range(1, call.size))
    dist.barrier(call.group)
    dist.destroy_process_group(group)


def of_rank(rank: int) -> dict:
    return {"rank": rank, "text": "x" * (1000 * rank), "tensor": torch.full((rank,), rank), "nothing": None}


def same(objects: list, ranks) -> bool:
    wanted = [of_rank(rank) for rank in ranks]
    return all(
        {**one, "tensor": one["tensor"].tolist()} == {**other, "tensor": other["tensor"].tolist()}
        for one, other in zip(objects, wanted, strict=True)
    )


def broadcast_object_list(call: Call) -> None:
    for root in range(call.size):
        objects = [of_rank(root), of_rank(root + 1)] if call.rank == root else [None, None]
        dist.broadcast_object_list(objects, root, call.group)
        assert same(objects, [root, root + 1])


def all_gather_object(call: Call) -> None:
    objects: list = [None] * call.size
    dist.all_gather_object(objects, of_rank(call.rank), call.group)
    assert same(objects, range(call.size))


def gather_object(call: Call) -> None:
    for root in range(call.size):
        objects: list | None = [None] * call.size if call.rank == root else None
        dist.gather_object(of_rank(call.rank), objects, root, call.group)
        assert objects is None or same(objects, range(call.size))


def scatter_object_list(call: Call) -> None:
    for root in range(call.size):
        objects = [of_rank(rank) for rank in range(call.size)] if call.rank == root else None
        output: list = [None]
        dist.scatter_object_list(output, objects, root, call.group)
        assert same(output, [call.rank])


def send_object_list(call: Call) -> None:
    """Send objects from each rank to the next."""
    if call.rank > 0:
        objects: list = [None, None]
        assert dist.recv_object_list(objects, call.rank - 1, call.group) == call.rank - 1
        assert same(objects, [call.rank - 1, call.rank])
    if call.rank < call.size - 1:
        dist.send_object_list([of_rank(call.rank), of_rank(call.rank + 1)], call.rank + 1, call.group)


def total(group: dist.ProcessGroup, value: float) -> float:
    tensor = torch.tensor([value])
    dist.all_reduce(tensor, group=group)
    return tensor.item()


def new_group(call: Call) -> None:
    """Make a group that lacks some ranks. A root is a rank of the whole job; `group_src` is a rank of the group."""
    ends = sorted({0, call.size - 1})
    group = dist.new_group(ends)
    if call.rank in ends:
        assert dist.get_process_group_ranks(group) == ends
        assert total(group, 1.0 + call.rank) == sum(1 + rank for rank in ends)
        tensor = torch.tensor([call.rank])
        dist.broadcast(tensor, ends[-1], group)
        assert tensor.item() == ends[-1]
        dist.broadcast(tensor.fill_(call.rank), group=group, group_src=0)
        assert tensor.item() == ends[0]
    else:
        assert group is dist.GroupMember.NON_GROUP_MEMBER
    dist.destroy_process_group(group)


def new_group_by_members(call: Call) -> None:
    """Make a group with use_local_synchronization: only its members call."""
    members = list(range(1, call.size)) or [0]
    if call.rank in members:
        group = dist.new_group(members, use_local_synchronization=True)
        assert total(group, 1.0 + call.rank) == sum(1 + rank for rank in members)
        dist.destroy_process_group(group)


def new_subgroups(call: Call) -> None:
    group_size = 2 if call.size % 2 == 0 else call.size
    own, groups = dist.new_subgroups(group_size)
    assert len(groups) == call.size // group_size
    first = call.rank // group_size * group_size
    assert total(own, 1.0 + call.rank) == sum(1 + rank for rank in range(first, first + group_size))
    for group in groups:
        dist.destroy_process_group(group)


def new_subgroups_by_enumeration(call: Call) -> None:
    odd = [rank for rank in range(call.size) if rank % 2]
    lists = [ranks for ranks in ([rank for rank in range(call.size) if rank % 2 == 0], odd) if ranks]
    own, groups = dist.new_subgroups_by_enumeration(lists)
    assert total(own, 1.0 + call.rank) == sum(1 + rank for rank in range(call.rank % 2, call.size, 2))
    for group in groups:
        dist.destroy_process_group(group)


def split_group(call: Call) -> None:
    """Call the group's own method: torch's function refuses groups without an accelerator."""
    own = [rank for rank in range(call.size) if rank % 2 == call.rank % 2]
    part = call.group.split_group(own, timeout=timedelta(seconds=10), group_name=f"split-{call.rank % 2}")
    assert (part.rank(), part.size()) == (own.index(call.rank), len(own))
    tensor = torch.tensor([1.0 + call.rank])
    part.allreduce([tensor]).wait()
    assert tensor.item() == sum(1 + rank for rank in own)


OPERATIONS = [
    Operation("barrier", barrier, "barrier"),
    Operation("monitored_barrier", monitored_barrier),
    Operation("monitored_barrier, wait_all_ranks", monitored_barrier_names_all),
    Operation("broadcast_object_list", broadcast_object_list),
    Operation("all_gather_object", all_gather_object),
    Operation("gather_object", gather_object),
    Operation("scatter_object_list", scatter_object_list),
    Operation("send_object_list, recv_object_list", send_object_list),
    Operation("new_group", new_group),
    Operation("new_group, use_local_synchronization", new_group_by_members),
    Operation("new_subgroups", new_subgroups),
    Operation("new_subgroups_by_enumeration", new_subgroups_by_enumeration),
    Operation("split_group", split_group),
]
