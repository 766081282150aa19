# SPDX-License-Identifier: Apache-2.0
"""Operations of a process group in flight, as torch.distributed hands them out: a `Work` to wait on, or a future."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# How long the futures' thread waits for one operation before it looks at the others.
_WAIT_SECONDS = 0.002


class Work(dist.Work):
    """An operation in flight.

    Args:
        operations: The engine's.
        results: The caller's tensors, which hold the result when it is done.
        finish: Called once when it is done: puts the result into the caller's tensors if it is not there.
        wait: Waits for an operation up to the given number of seconds, None for the group's timeout.
        order: Futures of works with the same one are completed in the order in which they were asked for.
    """

    def __init__(
        self,
        operations: Sequence[Any],
        results: Sequence[Tensor],
        finish: Callable[[], None] | None,
        wait: Callable[[Any, float | None], None],
        order: object = None,
    ) -> None:
        super().__init__()
        self._operations = operations
        self._results = results
        self._finish = finish
        self._wait = wait
        self._order = self if order is None else order
        self._is_waited = False
        self._future: torch.futures.Future | None = None

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Blocks until the result is in the caller's tensors. Local.

        Args:
            timeout: None, or zero as torch's C++ passes it, for the group's.

        Raises:
            MismatchError: Ranks called different collectives. The same on every rank of the group.
            DistributedTrainerError: A rank has left or closed the group, or MPI reports an error.
            DistBackendError: The time is over.
        """
        seconds = timeout.total_seconds() if timeout else None
        for operation in self._operations:
            self._wait(operation, seconds)
        if self._finish is not None:
            with _finishing:
                finish, self._finish = self._finish, None
                if finish is not None:
                    finish()
        self._is_waited = True
        return True

    def __del__(self) -> None:
        # torch's C++ may hold the part of this object that is not Python, and would wait on that for ever.
        if not self._is_waited:
            _not_waited_for.append(self)

    def is_completed(self) -> bool:
        """Whether `wait` would return, or raise, at once. Local."""
        return all([operation.is_done() for operation in self._operations])

    def is_success(self) -> bool:
        """Whether the operation is done and has not failed. Local."""
        return self.is_completed() and self.exception() is None

    def exception(self) -> Exception | None:
        """What a completed operation failed with. Local."""
        try:
            self.wait()
        except Exception as error:
            return error
        return None

    def synchronize(self) -> None:
        """The same as `wait`: there is no stream to put the wait into."""
        self.wait()

    def result(self) -> list[Tensor]:
        """The caller's tensors. Waits."""
        self.wait()
        return list(self._results)

    def source_rank(self) -> int:
        """Of a receive: the rank of the group that sent. Waits."""
        self.wait()
        return self._operations[0].source

    _source_rank = source_rank

    def found_nonfinite(self) -> bool:
        """Whether the sums hold an infinity or NaN. Waits.

        Of `sum_and_check` every rank gets the same answer, of `reduce_shards` each that for its own parts.

        Raises:
            ValueError: The collective was not asked to check.
        """
        self.wait()
        return self._operations[0].found_nonfinite()

    def done_at_ns(self) -> int:
        """When the engine was done, by the clock of time.perf_counter_ns(). Waits."""
        self.wait()
        return max(operation.done_at_ns for operation in self._operations)

    def get_future(self) -> torch.futures.Future:
        """A future of the caller's tensors, completed by a thread of its own. Local; blocks if called in that thread.

        Callbacks run in that thread, in the same order on every rank. What they call on a group is in a sequence of its
        own, beside that of the other threads.
        """
        if self._future is None:
            self._future = _Future()
            if in_callback():
                self.wait()
            if self._is_waited:
                self._future.set_result(list(self._results))
            else:
                _futures.add(self, self._future)
        return self._future


_finishing = threading.Lock()
_not_waited_for: deque[Work] = deque(maxlen=16)  # those that C++ will wait for are among the last


class _Future(torch.futures.Future):
    """A future whose callbacks run in the futures' thread even if it is complete already."""

    def then(self, callback: Callable[[torch.futures.Future], Any]) -> torch.futures.Future:
        following = _Future()
        _futures.add(self, callback, following)
        return following


class _Futures:
    """Completes futures. One thread, started at first use, does it for all groups of the process."""

    def __init__(self) -> None:
        self._added: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        self._start = threading.Lock()
        self._thread: threading.Thread | None = None
        self.thread_id: int | None = None

    def add(self, *what: Any) -> None:
        """Takes a work and its future; or a future, a callback and the future of that."""
        self._added.put(what)
        with self._start:
            if self._thread is None or not self._thread.is_alive():  # a forked child has no threads
                self._thread = threading.Thread(target=self._run, name="dtrain-futures", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        self.thread_id = threading.get_ident()
        works: list[tuple[Work, torch.futures.Future]] = []
        callbacks: deque[tuple[_Future, Callable[[torch.futures.Future], Any], _Future]] = deque()
        while True:
            if not works:
                self._take(works, callbacks, self._added.get())
            while not self._added.empty():
                self._take(works, callbacks, self._added.get())
            if works:
                with contextlib.suppress(Exception):  # it is found again below
                    for operation in works[0][0]._operations:
                        operation.wait(_WAIT_SECONDS)
            works = self._complete(works)
            while callbacks and callbacks[0][0].done():  # in the order of their calls, which all ranks share
                future, callback, following = callbacks.popleft()
                try:
                    following.set_result(callback(future))
                except Exception as error:
                    following.set_exception(error)

    @staticmethod
    def _take(works: list[Any], callbacks: deque[Any], what: tuple[Any, ...]) -> None:
        (works if isinstance(what[0], Work) else callbacks).append(what)

    @staticmethod
    def _complete(works: list[tuple[Work, torch.futures.Future]]) -> list[tuple[Work, torch.futures.Future]]:
        waiting: list[tuple[Work, torch.futures.Future]] = []
        held_up: set[int] = set()
        for work, future in works:
            if id(work._order) in held_up or not work.is_completed():
                held_up.add(id(work._order))
                waiting.append((work, future))
            elif (error := work.exception()) is not None:
                future.set_exception(error)
            else:
                future.set_result(list(work._results))
        return waiting


_futures = _Futures()


def in_callback() -> bool:
    """Whether the caller is a future's callback."""
    return threading.get_ident() == _futures.thread_id
