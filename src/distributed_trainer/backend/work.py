# SPDX-License-Identifier: Apache-2.0
"""Operations of a process group in flight, as torch.distributed returns them: a `Work` to wait on, or a future."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from .._engine import Operation

# Time that the thread for futures waits for one operation before it looks at the others.
_WAIT_SECONDS = 0.002


class Work(dist.Work):
    """An operation in flight.

    Args:
        operations: The engine's operations; this one is done when all of them are.
        results: The caller's tensors, which hold the result afterwards.
        finish: Function that copies the result to the caller's tensors; called once, when the operations are done. None
            if the result is there already.
        wait: Function that waits for an operation for up to a number of seconds, None for the group's timeout.
        order: Key by which futures are ordered: those of works with the same `order` are completed in the order in
            which `get_future` was called. None if this work's future need not be ordered.
    """

    def __init__(
        self,
        operations: Sequence[Operation],
        results: Sequence[Tensor],
        finish: Callable[[], None] | None,
        wait: Callable[[Operation, float | None], None],
        order: object = None,
    ) -> None:
        super().__init__()
        self._operations = operations
        self._results = results
        self._finish = finish
        self._wait = wait
        self._order = self if order is None else order
        self._is_waited = False
        self._future: _Future | None = None

    @classmethod
    def join(
        cls,
        works: Sequence[Work],
        wait: Callable[[Operation, float | None], None],
        order: object,
        results: Sequence[Tensor] | None = None,
        then: Callable[[], None] | None = None,
    ) -> Work:
        """Return one operation for several, done when all of them are. Local.

        Args:
            works: The operations to join. Wait for none of them separately.
            wait: As for `Work`.
            order: As for `Work`.
            results: As for `Work`; None for the results of all works.
            then: Function that is called once, when all results are in the caller's tensors.
        """

        def finish() -> None:
            for work in works:
                if work._finish is not None:
                    work._finish()
            if then is not None:
                then()

        operations = [operation for work in works for operation in work._operations]
        if results is None:
            results = [tensor for work in works for tensor in work._results]
        return cls(operations, results, finish, wait, order)

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Block until the result is in the caller's tensors. Local.

        Args:
            timeout: How long to wait. None, or zero (which torch's C++ passes), for the group's timeout.

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
        # torch's C++ may keep only the C++ part of this object alive, and would then wait for ever.
        if not self._is_waited:
            _not_waited_for.append(self)

    def is_completed(self) -> bool:
        """Return whether `wait` would return or raise without waiting. Local."""
        return all([operation.is_done() for operation in self._operations])

    def is_success(self) -> bool:
        """Return whether the operation is done and has not failed. Local."""
        return self.is_completed() and self.exception() is None

    def exception(self) -> Exception | None:
        """Wait, and return the error with which the operation failed; None if it has not failed. Local."""
        try:
            self.wait()
        except Exception as error:
            return error
        return None

    def synchronize(self) -> None:
        """Do what `wait` does: there is no stream that could wait instead."""
        self.wait()

    def result(self) -> list[Tensor]:
        """Wait, and return the caller's tensors."""
        self.wait()
        return list(self._results)

    def source_rank(self) -> int:
        """Wait for a receive, and return the sender's rank in the group."""
        self.wait()
        return self._operations[0].source

    _source_rank = source_rank

    def found_nonfinite(self) -> bool:
        """Wait, and return whether the sums hold an infinity or NaN.

        After `sum_and_check` every rank gets the same answer. After `reduce_shards` each rank gets the answer for its
        own parts.

        Raises:
            ValueError: The collective was not asked to check.
        """
        self.wait()
        return self._operations[0].found_nonfinite()

    def done_at_ns(self) -> int:
        """Wait, and return the time in ns when the engine was done, by the clock of time.perf_counter_ns()."""
        self.wait()
        return max(when for operation in self._operations if (when := operation.done_at_ns) is not None)

    def get_future(self) -> torch.futures.Future[Any]:
        """Return a future of the caller's tensors, which a thread completes. Local; blocks if called in that thread.

        Callbacks run in that thread, in the same order on every rank. Collectives that they call on a group are ordered
        separately from those of other threads.
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
_not_waited_for: deque[Work] = deque(maxlen=16)  # works that C++ still waits for are among the last 16


class _Future(torch.futures.Future[Any]):
    """Future whose callbacks run in the thread for futures, even if the future is complete already."""

    def then(self, callback: Callable[[torch.futures.Future[Any]], Any]) -> torch.futures.Future[Any]:
        following = _Future()
        _futures.add(self, callback, following)
        return following


class _Futures:
    """Thread that completes the futures of all groups of this process; started at first use."""

    def __init__(self) -> None:
        self._added: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        self._start = threading.Lock()
        self._thread: threading.Thread | None = None
        self.thread_id: int | None = None

    def add(self, *what: Any) -> None:
        """Add a work and its future; or a future, a callback and the future of the callback's result. Local."""
        self._added.put(what)
        with self._start:
            if self._thread is None or not self._thread.is_alive():  # a forked child has no threads
                self._thread = threading.Thread(target=self._run, name="dtrain-futures", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        self.thread_id = threading.get_ident()
        works: list[tuple[Work, torch.futures.Future[Any]]] = []
        callbacks: deque[tuple[_Future, Callable[[torch.futures.Future[Any]], Any], _Future]] = deque()
        while True:
            if not works:
                self._take(works, callbacks, self._added.get())
            while not self._added.empty():
                self._take(works, callbacks, self._added.get())
            if works:
                with contextlib.suppress(Exception):  # `_complete` gets the same error and sets it in the future
                    for operation in works[0][0]._operations:
                        operation.wait(_WAIT_SECONDS)
            works = self._complete(works)
            while callbacks and callbacks[0][0].done():  # in the order of the calls of then(), the same on all ranks
                future, callback, following = callbacks.popleft()
                try:
                    following.set_result(callback(future))
                except Exception as error:
                    following.set_exception(error)

    @staticmethod
    def _take(works: list[Any], callbacks: deque[Any], what: tuple[Any, ...]) -> None:
        (works if isinstance(what[0], Work) else callbacks).append(what)

    @staticmethod
    def _complete(works: list[tuple[Work, torch.futures.Future[Any]]]) -> list[tuple[Work, torch.futures.Future[Any]]]:
        waiting: list[tuple[Work, torch.futures.Future[Any]]] = []
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
    """Return whether the caller is a future's callback. Local."""
    return threading.get_ident() == _futures.thread_id
