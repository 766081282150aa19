# SPDX-License-Identifier: Apache-2.0
"""A key-value store over MPI, by which torch's process groups (NCCL, gloo) find each other; opens no port."""

from __future__ import annotations

import pickle
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

_FLUSH_SECONDS = 5.0


class MPIStore(dist.Store):
    """Every rank holds all values: `set` sends to each other rank, `get` and `wait` collect what has come.

    Enough to bring up a process group, which sets a key once and reads others' keys. `add` and `compare_set` would need
    one place that decides the order, and raise NotImplementedError. Keep a reference for as long as a PrefixStore of it
    is in use: torch's objects hold only the part of it that is not Python.

    Args:
        mailbox: The engine's, of all ranks that share the store.
        timeout: How long `get` and `wait` wait for a key.
    """

    def __init__(self, mailbox: Any, timeout: timedelta = timedelta(minutes=5)) -> None:
        super().__init__()
        self._mailbox = mailbox
        self._wait_timeout = timeout
        self._values: dict[str, bytes] = {}

    def set(self, key: str, value: Any) -> None:
        """Sets a key for all ranks. Local, except that a receiver must be inside MPI now and then for it to arrive."""
        value = value.encode() if isinstance(value, str) else bytes(value)
        self._values[key] = value
        message = pickle.dumps((key, value))
        for rank in range(self._mailbox.size):
            if rank != self._mailbox.rank:
                self._mailbox.post(message, rank)
        # The caller may not enter MPI again for long, and MPI sends only while it is called.
        deadline = time.monotonic() + _FLUSH_SECONDS
        while not self._mailbox.is_flushed() and time.monotonic() < deadline:
            self._collect()
            time.sleep(0.0005)

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
            time.sleep(0.0005)

    def check(self, keys: Sequence[str]) -> bool:
        """Whether all keys are set. Local."""
        self._collect()
        return all(key in self._values for key in keys)

    def add(self, key: str, amount: int) -> int:  # noqa: D102
        raise NotImplementedError("MPIStore has no add: nobody decides the order of two ranks' calls")

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:  # noqa: D102
        raise NotImplementedError("MPIStore has no compare_set: nobody decides the order of two ranks' calls")

    def set_timeout(self, timeout: timedelta) -> None:
        """Sets how long `get` and `wait` wait. Local."""
        self._wait_timeout = timeout

    def _collect(self) -> None:
        while (message := self._mailbox.collect()) is not None:
            key, value = pickle.loads(message)
            self._values[key] = value
