# SPDX-License-Identifier: Apache-2.0
"""A replica whose steps give the same bits on any number of ranks (`gradients/deterministic.py` explains how)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..backend.gather import gather_objects
from ..data import rng
from ..data.batch import map_tensors
from ..data.handshake import StepFlags
from ..data.split import own_shards
from ..errors import MismatchError
from ..gradients.deterministic import DeterministicReducer
from ..launch.devices import instruction_sets
from .model_state import Buffers, describe, have_same_values, is_plain
from .replica import Replica

# They select the CPU code in torch's libraries. If all three are set, ranks on different CPUs compute the same bits.
INSTRUCTION_VARIABLES = ("ATEN_CPU_CAPABILITY", "MKL_CBWR", "ONEDNN_MAX_CPU_ISA")


class ReproducibleReplica(Replica):
    """Replica whose steps give the same bits on any number of ranks. A microbatch is a shard."""

    def _set_up(self, gradient_group: Any) -> None:
        num_shards = self._options.reproducible
        assert num_shards is not None
        if self._group.size() > num_shards:
            raise ValueError(
                f"reproducible={num_shards} makes {num_shards} shards of each batch, too few for "
                f"{self._group.size()} ranks: start fewer ranks, or make more shards"
            )
        check_computers(self._group, os.environ)
        self._deterministic = DeterministicReducer(
            self.model.named_parameters(), gradient_group, num_shards, self._options.checks_gradients
        )
        self.gradients = self._deterministic
        self._shards = own_shards(num_shards, self._group.rank(), self._group.size())
        self._num_begun = 0  # this rank's shards that were begun in the step
        self._sharded = self._direct = self._batchnorm = self._max_norm = None
        self._find_modules()

    def _find_modules(self) -> None:
        self._shard_buffers = ShardBuffers(self.model)

    def prepare(self, keep: bool = False) -> int:
        """Return this rank's `StepFlags` about the model. Local."""
        return self._has_changed * StepFlags.MODEL_HAS_CHANGED

    def start(self, flags: int, keep: bool = False) -> None:
        """Begin a step. Local; the arguments are ignored."""
        self._start_checks(keep=False)
        self._deterministic.start()
        self._shard_buffers.start()
        self._num_begun = 0

    @contextlib.contextmanager
    def around_microbatch(self, is_dummy: bool = False) -> Iterator[None]:
        """Surround forward and backward of the next shard, which has its own random streams. Local."""
        number = self._shards[self._num_begun]
        self._num_begun += 1
        with rng.preserved(), self._shard_buffers.shard():
            rng.seed_host(rng.mix(*self.step_key, number))
            self.streams.begin(self.step_key, number)
            yield

    def finish(self, values: list[list[float]], loss: Any, source: int, has_samples: bool) -> tuple[list[float], Any]:
        """Finish gradients and buffers as `Replica.finish` does; loss terms are added in the order of the shards."""
        self._deterministic.finish()
        self._shard_buffers.finish(self._group)
        structure = map_tensors(lambda term: term.detach().reshape(()).cpu(), loss)
        gathered = gather_objects(self._group, (values, structure, self._findings()))
        self._check_findings(*map(sum, zip(*(findings for *_, findings in gathered), strict=True)))
        rows = [terms for rank_values, *_ in gathered for terms in rank_values]
        structure = map_tensors(lambda term: term.to(self._device), gathered[0][1])  # the first shard is never empty
        sums = [sum(terms) for terms in zip(*rows, strict=True)]
        self._commit((sums, structure))
        self.buffers_synced = True
        self._find_nonfinite()
        return sums, structure

    def finish_after_failure(self, committed: Any) -> tuple[list[float], Any]:
        """Complete a `finish` as `Replica` does. Here gradients and buffers are final before the commit point."""
        if committed is not None:
            self._commit(committed)
        self.buffers_synced = True
        self._find_nonfinite()
        sums, structure = self._progress.committed
        return sums, structure

    def _unchanged_buffers(self) -> dict[str, Tensor]:
        return {}  # evaluation may change buffers on some ranks only

    def combine_buffers(self, weight: float) -> None:
        """Do nothing: buffers of shards have a rule of their own. Local."""

    def share_changed_buffers(self) -> None:
        """Do nothing: buffers of shards have a rule of their own. Local."""

    def share_buffers(self, source: int) -> None:
        """Do nothing: buffers are already the same on all ranks. Local."""


class ShardBuffers:
    """Buffers of a model, with the same values at the start of every shard.

    After a step a buffer of floating type is the mean over the shards, any other buffer is that of the first shard. So
    BatchNorm's running statistics are the mean of the shards' statistics.
    """

    def __init__(self, model: nn.Module) -> None:
        self._buffers = Buffers(model)
        self._before: list[tuple[Tensor | None, Tensor | None]] = []
        self._changed: list[dict[int, Tensor | None]] = []

    def start(self) -> None:
        """Begin a step. Local."""
        self._before = self._buffers.snapshot()
        self._changed = []

    @contextlib.contextmanager
    def shard(self) -> Iterator[None]:
        """Surround forward and backward of a shard. Local."""
        try:
            yield
        finally:
            self._note_changes()

    def _note_changes(self) -> None:
        """Note what the shard has changed, and set the buffers back. Local."""
        # Values are compared, since BatchNorm's kernels change running statistics but not their version numbers.
        pairs = zip(self._buffers.tensors(), self._before, strict=True)
        changed = {
            index: None if buffer is None else buffer.detach().cpu().clone()
            for index, (buffer, (first, value)) in enumerate(pairs)
            if buffer is not first or not have_same_values(buffer, value)
        }
        self._buffers.restore(self._before, changed)
        self._changed.append(changed)

    def finish(self, group: Any) -> None:
        """Combine the shards' buffers at the end of a step. Collective, blocks."""
        if not self._buffers:
            return
        shards = [changed for row in gather_objects(group, self._changed) for changed in row]
        for index in sorted({index for changed in shards for index in changed}):
            before = self._before[index][1]
            values = [changed.get(index, before) for changed in shards]
            first = values[0]
            if (
                first is not None
                and is_plain(first)
                and first.is_floating_point()
                and len({str(describe(value)) for value in values}) == 1
            ):
                first = (sum(value.double() for value in values if value is not None) / len(values)).to(first.dtype)
            self._buffers.put(index, first)


def check_computers(group: Any, environ: Mapping[str, str], cpu: str | None = None) -> None:
    """Raise MismatchError if ranks would not compute the same bits. Collective, blocks; the same on every rank.

    Set torch's number of threads to OMP_NUM_THREADS, or to 1 without it, since sums depend on it.
    """
    threads = environ.get("OMP_NUM_THREADS", "1")
    torch.set_num_threads(int(threads) if threads.isdecimal() and int(threads) else 1)
    own = {
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        **{name: environ.get(name, "not set") for name in INSTRUCTION_VARIABLES},
        "CPU": cpu or instruction_sets(),
    }
    gathered = gather_objects(group, own)
    is_forced = all(own[name] != "not set" for name in INSTRUCTION_VARIABLES)
    for rank, other in enumerate(gathered):
        for name, value in other.items():
            if value == gathered[0][name] or (name == "CPU" and is_forced):
                continue
            remedy = {
                "threads": "Set OMP_NUM_THREADS to the same number on all machines, or nowhere.",
                "torch": "Install the same version on all machines.",
                "CPU": "To make different CPUs compute the same bits, set ATEN_CPU_CAPABILITY=avx2, MKL_CBWR=AVX2 and "
                "ONEDNN_MAX_CPU_ISA=AVX2 on all ranks.",
            }.get(name, "Set it to the same value on all machines.")
            raise MismatchError(
                f"reproducible= needs ranks that compute the same bits, but {name} is {gathered[0][name]} on rank 0 "
                f"and {value} on rank {rank}. {remedy}"
            )
