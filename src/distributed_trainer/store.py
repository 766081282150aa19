# SPDX-License-Identifier: Apache-2.0
"""A key-value store over MPI, by which torch's process groups (NCCL, gloo) find each other; opens no port."""

from __future__ import annotations

import itertools
import pickle
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

_FLUSH_SECONDS = 5.0
_POLL_SECONDS = 0.0005
_IDLE_POLL_SECONDS = 0.02


class MPIStore(dist.Store):
    """Every rank holds all values: `set` sends to each other rank, `get` and `wait` collect what has come.

    What changes a value depending on the one before it (`add`, `append`, `compare_set`, `delete_key`) is done by rank
    0, in a thread of its own that looks for such requests every 20 ms, and more often while there are any.

    Keep a reference for as long as a PrefixStore of it is in use: torch's objects hold only the part of it that is not
    Python.

    Args:
        mailbox: The engine's, of all ranks that share the store.
        timeout: How long a call waits for a key, or for rank 0.
    """

    def __init__(self, mailbox: Any, timeout: timedelta = timedelta(minutes=5)) -> None:
        super().__init__()
        self._mailbox = mailbox
        self._wait_timeout = timeout
        self._values: dict[str, bytes] = {}
        self._answers: dict[int, Any] = {}
        self._numbers = itertools.count()
        self._lock = threading.RLock()
        if mailbox.rank == 0 and mailbox.size > 1:
            threading.Thread(target=self._serve, name="dtrain-store", daemon=True).start()

    def set(self, key: str, value: Any) -> None:
        """Sets a key for all ranks. Local, except that a receiver must be inside MPI now and then for it to arrive."""
        with self._lock:
            self._values[key] = _as_bytes(value)
            self._tell_all(key)
        self._flush()

    def get(self, key: str) -> bytes:
        """The value of a key, as soon as any rank has set it. Blocks; raises DistStoreError after the timeout."""
        self.wait([key])
        return self._values[key]

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        """Blocks until all keys are set; raises DistStoreError after the timeout."""
        limit = timeout or self._wait_timeout
        deadline = time.monotonic() + limit.total_seconds()
        while not self.check(keys):
            if time.monotonic() > deadline:
                missing = [key for key in keys if key not in self._values]
                raise dist.DistStoreError(
                    f"rank {self._mailbox.rank} waited {limit.total_seconds():g} s for {', '.join(missing)}, which no "
                    f"rank has set. Some rank has not come to this point, or MPI does not reach it."
                )
            time.sleep(_POLL_SECONDS)

    def check(self, keys: Sequence[str]) -> bool:
        """Whether all keys are set. Local."""
        self._collect()
        return all(key in self._values for key in keys)

    def add(self, key: str, amount: int) -> int:
        """Adds to the number (decimal text) that a key holds, 0 if it is not set, and returns the sum. Blocks."""
        return int(self._ask("add", key, amount))

    def append(self, key: str, value: Any) -> None:
        """Puts bytes behind those that a key holds. Blocks."""
        self._ask("append", key, _as_bytes(value))

    def compare_set(self, key: str, expected: Any, desired: Any) -> bytes:
        """Sets a key if it holds `expected`, or if it is not set and that is empty; returns what it holds then. Blocks.

        A key that is not set and should not be gives `expected`.
        """
        return self._ask("compare_set", key, (_as_bytes(expected), _as_bytes(desired)))

    def delete_key(self, key: str) -> bool:
        """Forgets a key on all ranks; returns whether it was set. Blocks."""
        return self._ask("delete_key", key, None)

    def num_keys(self) -> int:
        """How many keys are set, as far as this rank has heard. Local."""
        self._collect()
        return len(self._values)

    def set_timeout(self, timeout: timedelta) -> None:
        """Sets how long calls wait. Local."""
        self._wait_timeout = timeout

    # The names by which torch's C++ calls them.
    compareSet = compare_set
    deleteKey = delete_key
    getNumKeys = num_keys

    def _ask(self, what: str, key: str, argument: Any) -> Any:
        if self._mailbox.rank == 0:
            with self._lock:
                self._collect()
                answer = self._change(what, key, argument)
            self._flush()
            return answer
        number = next(self._numbers)
        self._mailbox.post(pickle.dumps((what, key, argument, self._mailbox.rank, number)), 0)
        deadline = time.monotonic() + self._wait_timeout.total_seconds()
        while number not in self._answers:
            if time.monotonic() > deadline:
                raise dist.DistStoreError(
                    f"rank 0 has not answered {what}({key}) of rank {self._mailbox.rank} within "
                    f"{self._wait_timeout.total_seconds():g} s. It has ended, or MPI does not reach it."
                )
            self._mailbox.is_flushed()
            self._collect()
            time.sleep(_POLL_SECONDS)
        return self._answers.pop(number)

    def _change(self, what: str, key: str, argument: Any) -> Any:
        """What rank 0 does for any rank. With the lock held."""
        held = self._values.get(key)
        if what == "delete_key":
            self._values.pop(key, None)
            self._tell_all(key)
            return held is not None
        if what == "add":
            answer = value = str(int(held or 0) + argument).encode()
        elif what == "append":
            answer = value = (held or b"") + argument
        else:
            expected, desired = argument
            is_expected = held == expected or (held is None and not expected)
            value = desired if is_expected else held
            answer = expected if value is None else value
        if value is not None and value != held:
            self._values[key] = value
            self._tell_all(key)
        return answer

    def _tell_all(self, key: str) -> None:
        message = pickle.dumps(("set", key, self._values.get(key)))
        for rank in range(self._mailbox.size):
            if rank != self._mailbox.rank:
                self._mailbox.post(message, rank)

    def _flush(self) -> None:
        # The caller may not enter MPI again for long, and MPI sends only while it is called.
        deadline = time.monotonic() + _FLUSH_SECONDS
        while not self._mailbox.is_flushed() and time.monotonic() < deadline:
            self._collect()
            time.sleep(_POLL_SECONDS)

    def _collect(self) -> bool:
        """Takes in what has come; returns whether that was anything."""
        with self._lock:
            has_come = False
            while (message := self._mailbox.collect()) is not None:
                has_come = True
                what, key, argument, *sender = pickle.loads(message)
                if what == "answer":
                    self._answers[key] = argument
                elif what != "set":
                    rank, number = sender
                    answer = self._change(what, key, argument)
                    self._mailbox.post(pickle.dumps(("answer", number, answer)), rank)
                elif argument is None:
                    self._values.pop(key, None)
                else:
                    self._values[key] = argument
            return has_come

    def _serve(self) -> None:
        pause = _POLL_SECONDS
        while True:
            try:
                is_busy = self._collect() or not self._mailbox.is_flushed()
            except Exception:
                return  # MPI has ended
            pause = _POLL_SECONDS if is_busy else min(2 * pause, _IDLE_POLL_SECONDS)
            time.sleep(pause)


def _as_bytes(value: Any) -> bytes:
    return value.encode() if isinstance(value, str) else bytes(value)
