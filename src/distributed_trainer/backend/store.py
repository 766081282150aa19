# SPDX-License-Identifier: Apache-2.0
"""A key-value store over MPI, by which ranks of torch's process groups (NCCL, gloo) find each other; opens no port."""

from __future__ import annotations

import itertools
import pickle
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

if TYPE_CHECKING:
    from .._engine import Mailbox

_FLUSH_SECONDS = 5.0
_POLL_SECONDS = 0.0005
_IDLE_POLL_SECONDS = 0.02


class MPIStore(Store):
    """Key-value store of which every rank holds all values: `set` sends to all ranks, `get` collects what arrived.

    Changes that depend on the earlier value (`add`, `append`, `compare_set`, `delete_key`) are made by rank 0, in a
    separate thread that looks for such requests every 20 ms, and more often while there are any.

    Keep a reference for as long as a PrefixStore of it is in use: torch's objects keep only the C++ part of it alive.

    Args:
        mailbox: The engine's mailbox of all ranks that share the store.
        timeout: How long a call waits for a key, or for rank 0.
    """

    def __init__(self, mailbox: Mailbox, timeout: timedelta = timedelta(minutes=5)) -> None:
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
        """Set a key for all ranks. Local, but waits up to 5 s for MPI to send the value.

        MPI sends it only while the receivers call MPI now and then.
        """
        with self._lock:
            self._values[key] = _as_bytes(value)
            self._tell_all(key)
        self._flush()

    def get(self, key: str) -> bytes:
        """Return the value of a key once any rank has set it. Blocks; raises DistStoreError after the timeout."""
        self.wait([key])
        return self._values[key]

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        """Block until all keys are set; raises DistStoreError after the timeout."""
        limit = timeout or self._wait_timeout
        deadline = time.monotonic() + limit.total_seconds()
        while not self.check(keys):
            if time.monotonic() > deadline:
                missing = [key for key in keys if key not in self._values]
                raise dist.DistStoreError(
                    f"rank {self._mailbox.rank} waited {limit.total_seconds():g} s for {', '.join(missing)}, which no "
                    f"rank has set. Some rank has not reached this point, or MPI does not reach that rank."
                )
            time.sleep(_POLL_SECONDS)

    def check(self, keys: Sequence[str]) -> bool:
        """Return whether all keys are set. Local."""
        self._collect()
        return all(key in self._values for key in keys)

    def add(self, key: str, amount: int) -> int:
        """Add to the number (decimal text) that a key holds (0 if the key is not set); return the sum. Blocks."""
        return int(self._ask("add", key, amount))

    def append(self, key: str, value: Any) -> None:
        """Append bytes to the value of a key. Blocks."""
        self._ask("append", key, _as_bytes(value))

    def compare_set(self, key: str, expected: Any, desired: Any) -> bytes:
        """Set a key to `desired` if it holds `expected`, or if it is not set and `expected` is empty. Blocks.

        Returns:
            The value that the key holds afterwards; `expected` if the key is still not set.
        """
        return bytes(self._ask("compare_set", key, (_as_bytes(expected), _as_bytes(desired))))

    def delete_key(self, key: str) -> bool:
        """Delete a key on all ranks; return whether it was set. Blocks."""
        return bool(self._ask("delete_key", key, None))

    def num_keys(self) -> int:
        """Return how many keys are set, as far as this rank knows. Local."""
        self._collect()
        return len(self._values)

    def set_timeout(self, timeout: timedelta) -> None:
        """Set how long calls wait. Local."""
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
                    f"{self._wait_timeout.total_seconds():g} s. Rank 0 has ended, or MPI does not reach it."
                )
            self._mailbox.is_flushed()
            self._collect()
            time.sleep(_POLL_SECONDS)
        return self._answers.pop(number)

    def _change(self, what: str, key: str, argument: Any) -> Any:
        """Change a value on rank 0, for any rank, with the lock held."""
        held, value, answer = self._values.get(key), None, None
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
        # MPI sends only while it is called, and the caller may not call it again for a long time.
        deadline = time.monotonic() + _FLUSH_SECONDS
        while not self._mailbox.is_flushed() and time.monotonic() < deadline:
            self._collect()
            time.sleep(_POLL_SECONDS)

    def _collect(self) -> bool:
        """Handle the messages that have arrived; return whether there were any."""
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
