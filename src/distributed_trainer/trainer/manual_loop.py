# SPDX-License-Identifier: Apache-2.0
"""Manual loops: the user calls forward, backward and step, as `DistributedTrainer` describes them."""

from __future__ import annotations

import contextlib
import functools
import math
import operator
import struct
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..backend.gather import gather_bytes, raise_together
from ..checkpoint.checkpointer import Checkpointer
from ..data.fingerprint import fingerprint
from ..data.handshake import StepFlags, different_samples
from ..data.position import DataPosition
from ..errors import DistributedTrainerError, MismatchError
from ..options import TrainerOptions
from ..replica.streams import first_drawing_module
from .session import Session
from .step import check_clip_norm

# Exchanged before a backward: weight, loss, whether it has a graph, flags, number of batches to compare, whether
# forward has raised, position in the data, checksum of the samples there.
_HEADER = struct.Struct("<dd?BB?II")

_MOST_COMPARED = 8  # the last batches that were given to `split` since the last backward


class ManualLoop:
    """State between the calls of a user's loop. It outlives ranks.

    Args:
        options: Options of the trainer.
        checkpointer: Makes saves at the start of a backward.
        position: Position in the data.
    """

    def __init__(self, options: TrainerOptions, checkpointer: Checkpointer, position: DataPosition) -> None:
        self._options, self._checkpointer, self._position = options, checkpointer, position
        self._holds_back = False  # whether a `no_sync` block is open
        self._is_accumulating = False  # whether the last backward was inside a `no_sync` block
        self._has_run_forward = False  # whether `forward` was used since the last backward
        self._uses_forward = False  # whether it was ever used
        self._outputs: list[Any] = []  # results of the model in `forward`, for a loss without a graph
        self._batches: deque[tuple[bytes, dict[str, Any]]] = deque(maxlen=_MOST_COMPARED)  # see `note_batch`
        self._failure: str | None = None  # exception of this rank's last forward since the last backward

    def note_batch(self, roots: dict[str, Any]) -> None:
        """Make the next backward compare a batch, which every rank has passed to `split`, over the ranks. Local.

        Its fingerprint is taken now, since the script may write to this rank's part.
        """
        self._batches.append((fingerprint(roots, read_devices=True), roots))

    @contextlib.contextmanager
    def forward(self, session: Session) -> Iterator[None]:
        """Surround the model's calls. Local, unless the model has changed: then it is collective, and blocks.

        Raises:
            ValueError: The trainer was made with `reproducible`.
        """
        self._check_options()
        self._has_run_forward = self._uses_forward = True
        replica = session.replica
        if replica.notice_changes():
            self._gather(session, 0.0, 0.0, False, StepFlags.IS_IN_FORWARD, 0)
            replica.follow(StepFlags.MODEL_HAS_CHANGED)
        with contextlib.ExitStack() as stack:
            if replica.is_forward_collective:
                stack.callback(replica.keep_outputs(self._outputs).remove)
            try:
                with (
                    _recorded(session, "forward"),
                    replica.around_step(),
                    replica.around_microbatch(),
                    replica.autocast(),
                ):
                    yield
            except Exception as error:
                self._failure = traceback.format_exception_only(error)[-1].strip()
                raise

    def backward(
        self,
        session: Session,
        loss: Tensor,
        weight: float | None,
        retain_graph: bool | None,
        create_graph: bool,
        inputs: Tensor | Sequence[Tensor] | None,
    ) -> Tensor:
        """Run `loss.backward()`, and add the sum over all ranks to each `.grad`. Collective, blocks.

        Arguments, result and errors are those of `DistributedTrainer.backward`.
        """
        self._check_options()
        replica = session.replica
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            what = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
            raise TypeError(f"loss must be a tensor with one element, not {what}")
        if weight is not None and not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"weight must be finite and not negative, or None for a sum, not {weight!r}")
        replica.notice_changes()
        if create_graph and session.world_size > 1:
            raise ValueError(
                "create_graph=True needs one rank: each `.grad` is a sum over the ranks, and this rank has only a part "
                "of its graph. For gradients within the loss, call torch.autograd.grad(..., create_graph=True)."
            )
        if retain_graph and self._options.buffers and session.world_size > 1:
            raise ValueError(
                "retain_graph=True does not go with buffers=: each backward combines the ranks' buffers, and would do "
                "so twice for one forward. Add the losses, and call backward once."
            )
        if inputs is not None:
            inputs = [inputs] if isinstance(inputs, Tensor) else list(inputs)
        if replica.is_forward_collective and not self._has_run_forward:
            raise ValueError(
                "the model has BatchNorm or an embedding with max_norm, which act on the global batch only inside of "
                "`with trainer.forward():`. Call the model there, or, for BatchNorm, make the trainer with "
                "sync_batchnorm=False."
            )
        shares_streams = self._options.split_batches
        if shares_streams and not self._uses_forward and (name := first_drawing_module(session.model)) is not None:
            raise ValueError(
                f"module {name!r} draws random numbers, which would change the script's random streams on each rank in "
                f"its own way. Call the model inside `with trainer.forward():`, where it draws from a stream of this "
                f"rank."
            )
        if self._options.precision is not None and not self._uses_forward:
            raise ValueError(
                f"precision={self._options.precision!r} acts inside of `with trainer.forward():`. Call the model and "
                f"compute the loss there."
            )
        is_dummy = weight == 0
        refusal = replica.leaves.look(loss) if inputs is None else replica.leaves.look_at(inputs)
        refusal = replica.refuse_hooks(session.world_size > 1) or refusal
        if not self._is_accumulating:
            refusal = replica.leaves.unsummed() or refusal
        if replica.take_has_counted() and is_dummy:
            refusal = refusal or (
                "weight=0 does not go with BatchNorm in training: forward has counted this rank's samples in the "
                "statistics. If the rank has samples, but none with a loss, return sums and pass weight=None on every "
                "rank. If it has no samples, use train_step."
            )
        if replica.script_calls.take_has_counted() and is_dummy:
            refusal = refusal or (
                "weight=0 does not go with rows that trainer.gather has brought to the other ranks: their losses count "
                "this rank's samples. Without samples, call trainer.gather(rows[:0]). If the rank has samples, but "
                "none with a loss, return sums and pass weight=None on every rank."
            )
        replica.check_batchnorm()  # all forwards are over
        losses, fractions, flags = self._exchange(session, loss, weight, refusal, replica.prepare(keep=True))
        self._checkpointer.maybe_save(flags, session)
        replica.follow(flags, aligns=False)
        if not self._is_accumulating:
            replica.start(flags, keep=True)
        self._is_accumulating = self._holds_back
        own = fractions[session.rank]
        others: list[Tensor] = []
        if self._options.scales_loss:
            leaves = replica.leaves.others_of(loss) if inputs is None else inputs
            others = [leaf for leaf in leaves if leaf.is_leaf and not isinstance(leaf, torch.nn.Parameter)]
        if loss.requires_grad and not is_dummy:
            replica.script_calls.take_results()  # the loss depends on them, or another backward's loss does
        with (
            _recorded(session, "backward"),
            replica.around_backward(is_dummy),
            replica.script_calls.step(),
        ):
            scaled = loss if is_dummy or own == 1 else loss * own
            options = {"retain_graph": retain_graph, "create_graph": create_graph}
            try:
                replica.backward(scaled, self._outputs, is_dummy, not self._holds_back, inputs, others, **options)
            except Exception as error:
                is_shared = session.world_size > 1 and not self._holds_back
                if not is_shared or isinstance(error, DistributedTrainerError):
                    raise
                replica.failure = error  # `finish` raises it on every rank
                replica.script_calls.fail(error)
        keeps_graph = create_graph if retain_graph is None else retain_graph
        self._has_run_forward = self._has_run_forward and keeps_graph
        if not keeps_graph:
            self._outputs.clear()  # an open `forward` appends to the same list
        replica.combine_buffers(own)
        if not self._holds_back:
            replica.check_batchnorm()
            replica.script_calls.finish()
            source = next(rank for rank, fraction in enumerate(fractions) if fraction)
            with _recorded(session, "exchange"):
                replica.finish([], None, source, has_samples=not is_dummy)
        value = sum(fraction * other for fraction, other in zip(fractions, losses, strict=True) if fraction)
        return torch.tensor(value, dtype=loss.dtype, device=loss.device)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Keep the gradients of backwards in the block on this rank. Local."""
        self._holds_back = True
        try:
            yield
        finally:
            self._holds_back = False

    def step(
        self,
        session: Session,
        optimizers: Sequence[torch.optim.Optimizer],
        closure: Callable[[], Any] | None,
        clip_norm: float | None,
    ) -> bool:
        """Make the optimizers' step; return whether it was made. Collective.

        Arguments and errors are those of `DistributedTrainer.step`.
        """
        check_clip_norm(clip_norm)
        if self._is_accumulating:
            raise ValueError(
                "the last backward was inside no_sync(), so no rank has the sums. Call backward outside of it first."
            )
        if closure is not None and (clip_norm is not None or self._options.shards_optimizer):
            raise ValueError('a closure does not go with clip_norm or shard="optimizer": clip inside of the closure')
        if closure is not None and len(optimizers) > 1:
            raise ValueError("a closure goes with one optimizer, not with several: call step for each of them")
        if closure is not None and self._options.scales_loss:
            raise ValueError(
                'a closure does not go with precision="float16", whose overflows are found before the optimizer steps: '
                'use precision="bfloat16"'
            )
        if (text := session.replica.leaves.unsummed()) is not None:
            raise ValueError(text)
        with _recorded(session, "optimizer"):
            return session.replica.update(optimizers, clip_norm, closure)

    def _exchange(
        self, session: Session, loss: Tensor, weight: float | None, refusal: str | None, other_flags: int
    ) -> tuple[list[float], list[float], int]:
        """Return each rank's loss and fraction of the weight, and the flags of any rank. Collective, blocks.

        Raises:
            ValueError: Some rank has a reason why no rank may begin the backward. The same on every rank.
            MismatchError: The ranks passed different batches to `split`, or different kinds of weights.
            RuntimeError: No rank's loss has a graph. The same on every rank.
        """
        is_sum = weight is None
        if not loss.requires_grad and session.replica.is_forward_collective and not self._outputs:
            refusal = refusal or (
                f"the loss of rank {session.rank} has no graph, and the model was not called as a whole in "
                f"trainer.forward, so the rank cannot take part in its backward. Add 0 * outputs.sum() to the loss."
            )
        own_flags = self._checkpointer.flags | other_flags
        if refusal is not None or session.replica.leaves.has_others:
            own_flags |= StepFlags.REFUSES
        own = math.nan if weight is None else weight, loss.item(), loss.requires_grad, own_flags
        batches = list(self._batches)
        self._batches.clear()
        weights, losses, has_graph, flags, nums_batches, may_differ = self._gather(session, *own, len(batches))
        failure, self._failure = self._failure, None
        if may_differ:
            raise_together(session.groups.steps, None if failure is None else _skipped(session.rank, failure))
        if flags & StepFlags.REFUSES:
            raise_together(session.groups.steps, None if refusal is None else ValueError(refusal))
            session.replica.leaves.check_shared()
        # One rank may have skipped a batch, or have looked at others: the last ones must be the same.
        num_compared = min(nums_batches)
        if session.world_size > 1 and num_compared:
            session.handshake.compare(batches[-num_compared:])
        if len({math.isnan(other) for other in weights}) > 1:
            raise MismatchError("some ranks pass weight=None to backward, others a number. Pass the same kind on all.")
        if not any(has_graph):
            loss.backward()  # type: ignore[no-untyped-call]  # raises torch's own error
        total = 1.0 if is_sum else sum(weights)
        if total == 0:
            raise ValueError("weight is 0 on every rank, so the mean is over nothing; skip this backward on all ranks")
        fractions = [(1.0 if is_sum else other) / total for other in weights]
        return losses, fractions, flags

    def _gather(
        self, session: Session, weight: float, loss: float, has_graph: bool, flags: int, num_batches: int
    ) -> tuple[list[float], list[float], list[bool], int, list[int], bool]:
        """Exchange what `backward` needs of every rank. Collective, blocks.

        Args:
            session: The ranks.
            weight: Weight of this rank's loss.
            loss: Its value.
            has_graph: Whether it has a graph.
            flags: This rank's `StepFlags`.
            num_batches: Number of batches to compare.

        Returns:
            Weights, losses, whether they have graphs, the union of the flags, numbers of batches; and whether a rank
            has skipped a batch of `trainer.loader` that others have not, after an exception in forward.
        """
        place = self._failure is not None, *self._position.key()
        header = _HEADER.pack(weight, loss, has_graph, flags, num_batches, *place)
        with _recorded(session, "agreement"):
            rows = gather_bytes(session.groups.steps, header)
        columns = map(list, zip(*map(_HEADER.unpack, rows), strict=True))
        weights, losses, have_graphs, all_flags, nums_batches, have_failed, keys, checksums = columns
        in_forward = [bool(flags & StepFlags.IS_IN_FORWARD) for flags in all_flags]
        if len(set(in_forward)) > 1:
            raise MismatchError(
                f"the model has changed on rank {in_forward.index(True)}, which is in forward, and not on rank "
                f"{in_forward.index(False)}, which is in backward. Change the model the same way on every rank, at the "
                f"same place of the loop."
            )
        if len(set(keys)) == 1 and len(set(checksums)) > 1:
            raise different_samples("the batch", 0, next(r for r, one in enumerate(checksums) if one != checksums[0]))
        may_differ = any(have_failed) and len(set(keys)) > 1
        return weights, losses, have_graphs, functools.reduce(operator.or_, all_flags), nums_batches, may_differ

    def _check_options(self) -> None:
        if self._options.reproducible is not None:
            raise ValueError("reproducible= works with train_step, which cuts batches into shards, not in manual loops")


def _skipped(rank: int, failure: str) -> MismatchError:
    return MismatchError(
        f"forward raised an exception on rank {rank} ({failure}), and its script took another batch of trainer.loader. "
        f"The other ranks did not, so the ranks would add gradients of different batches. Let the exception end the "
        f"script, or use train_step, which raises it on every rank."
    )


@contextlib.contextmanager
def _recorded(session: Session, phase: str) -> Iterator[None]:
    """Record a phase for `profile`. Local."""
    began = time.perf_counter()
    yield
    recorder = session.replica.gradients.recorder
    if recorder is not None:
        recorder.add_slice(phase, began, time.perf_counter())
