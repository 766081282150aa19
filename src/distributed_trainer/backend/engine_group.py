# SPDX-License-Identifier: Apache-2.0
"""Collectives that torch's process groups lack: sums in shared memory, sums with a check, sums of parts.

Other rooms ask `isinstance(group, EngineGroup)` before they use them: users may pass any process group of torch.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from .work import Work, in_callback

if TYPE_CHECKING:
    from .._engine import Group, Operation, ReduceOp, WireDtype


class _Refusal(threading.local):
    is_on = False


_refusal = _Refusal()


@contextlib.contextmanager
def no_collectives() -> Iterator[None]:
    """Make collectives of this thread raise RuntimeError in the block, where other ranks may not call them. Local."""
    _refusal.is_on = True
    try:
        yield
    finally:
        _refusal.is_on = False


class EngineGroup(dist.ProcessGroup):
    """A group of ranks whose collectives the engine runs, in the order in which this rank calls them.

    This class has the collectives that torch does not have. Its subclass `ProcessGroupShmpi` adds torch's own.

    Args:
        group: The engine's group.
        operations: The engine's `ReduceOp`.
        wire_dtype: The engine's `WireDtype` in which all_reduce sends sums of float32 between nodes, None for float32.
            Each node's sum is rounded to it, the rounded sums are added in float32, and the result is rounded to it.
        timeout: How long `Work.wait` waits.
        callback_group: A second group of the same engine and ranks, for collectives that callbacks of futures call.
            None for `group`.
    """

    def __init__(
        self,
        group: Group,
        operations: type[ReduceOp],
        wire_dtype: WireDtype | None = None,
        timeout: timedelta = dist.default_pg_timeout,
        callback_group: Group | None = None,
    ) -> None:
        super().__init__(group.rank, group.size)  # type: ignore[call-arg]  # torch's stub lacks (rank, size)
        self._main_group = group
        self._callback_group = callback_group or group
        self._operations = operations
        self._wire_dtype = wire_dtype
        self._timeout = timeout
        self._in_flight: deque[tuple[Operation, tuple[Tensor, ...]]] = deque()
        self._coalesced: list[Work] | None = None

    def allocate(self, num_bytes: int) -> Tensor:
        """Allocate zeroed, page-aligned memory in which this group's collectives need no copies.

        Collective, blocks. The memory is shared by the node's ranks. It is freed with the last tensor that views it.

        Returns:
            uint8 tensor of shape [num_bytes] on the CPU.
        """
        return from_dlpack(self._group.allocate(num_bytes))

    def release(self, memory: Tensor) -> None:
        """Make the group forget memory from `allocate`. Local; no collective on it may be in flight."""
        self._group.release(memory)

    def allocate_shared(self, num_bytes: int) -> Tensor:
        """Allocate one zeroed, page-aligned block on each node, which all ranks of the node read and write.

        Collective, blocks. The block is freed with the last tensor that views it, on any rank.

        Returns:
            uint8 tensor of shape [num_bytes] on the CPU.
        """
        return from_dlpack(self._group.allocate_shared(num_bytes))

    def sum_and_check(self, buffer: Tensor) -> Work:
        """Sum over all ranks, in place, as `allreduce` does, and check the sums. Collective.

        `Work.found_nonfinite` says whether the sums hold an infinity or NaN.

        Args:
            buffer: Contiguous, on the CPU, of a floating type.
        """
        operation = self._group.all_reduce(buffer, self._operations.SUM, self._wire_dtype, check_finite=True)
        return self._start(operation, (buffer,))

    def reduce_shards(self, buffer: Tensor, blocks: Sequence[tuple[int, int]], check_finite: bool = False) -> Work:
        """Sum blocks of a buffer over all ranks; rank r gets the sum of each block's part r. Collective.

        `shard_bounds` says where the parts of a block begin and end.

        Args:
            buffer: 1-dimensional, in memory from `allocate`. Afterwards this rank's parts hold the sums; the contents
                of the others are undefined. Other ranks read the buffer until a later all_reduce of this group is done;
                only then may it be written again.
            blocks: (offset, length) in bytes, the same lengths on every rank.
            check_finite: Whether to check the sums for `Work.found_nonfinite`; the same on every rank.
        """
        operation = self._group.reduce_shards(buffer, blocks, check_finite=check_finite)
        return self._start(operation, (buffer,))

    def gather_shards(self, buffer: Tensor, blocks: Sequence[tuple[int, int]]) -> Work:
        """Gather every rank's part (`shard_bounds`) of each block into the buffer of every rank. Collective.

        On one node this is a barrier, since the ranks share the buffer; nothing is copied.

        Args:
            buffer: uint8 tensor from `allocate_shared`.
            blocks: (offset, length) in bytes, the same on every rank.
        """
        return self._start(self._group.gather_shards(buffer, blocks), (buffer,))

    def gather_bytes(self, message: bytes) -> bytes:
        """Return the messages of all ranks, which have the same length, one after the other, by rank.

        Collective, blocks; takes a few microseconds.
        """
        return self._group.gather_bytes(message)

    def close(self) -> None:
        """End this rank's part in the group. Local; ranks of this machine that still wait for this one get an error."""
        self._main_group.close()
        self._callback_group.close()

    @property
    def _group(self) -> Group:
        """The engine's group to call: `callback_group` in callbacks of futures, the main group elsewhere.

        All ranks run the collectives of callbacks in the same order, but at different places among the main thread's
        collectives. So the two groups order their collectives separately.
        """
        if _refusal.is_on:
            raise RuntimeError("it calls other ranks")
        return self._callback_group if in_callback() else self._main_group

    def _start(
        self,
        operation: Operation,
        buffers: tuple[Tensor, ...],
        finish: Callable[[], None] | None = None,
        results: Sequence[Tensor] = (),
        is_message: bool = False,
    ) -> Work:
        # The engine works on bare memory, so the buffers are kept here until it is done, even if the caller drops them.
        while self._in_flight and self._in_flight[0][0].is_done():
            self._in_flight.popleft()
        self._in_flight.append((operation, buffers))
        work = Work((operation,), results, finish, self._wait, order=None if is_message else self)
        if self._coalesced is not None:
            self._coalesced.append(work)
        return work

    def _join(
        self,
        works: Sequence[Work],
        results: Sequence[Tensor] | None = None,
        then: Callable[[], None] | None = None,
    ) -> Work:
        """Return one `Work` for several of this group, by `Work.join`."""
        return Work.join(works, self._wait, self, results, then)

    def _wait(self, operation: Operation, timeout_seconds: float | None) -> None:
        if timeout_seconds is not None:  # a timeout that the caller gave: it may wait again, so the group stays usable
            if not operation.wait(timeout_seconds):
                text = self._group.describe_wait(operation)
                raise dist.DistBackendError(f"after {timeout_seconds:g} s {text}")
            return
        self._wait_or_give_up(operation, self._timeout.total_seconds())

    def _wait_or_give_up(self, operation: Operation, limit_seconds: float) -> None:
        if operation.wait(limit_seconds):
            return
        text = self._group.describe_wait(operation)
        if operation.is_done():  # or another rank has given up meanwhile
            operation.wait(0)
            return
        text += f". The timeout of {limit_seconds:g} s is over: this group can't be used any more"
        self._group.give_up(text)
        raise dist.DistBackendError(text)
