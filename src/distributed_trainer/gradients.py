# SPDX-License-Identifier: Apache-2.0
"""Gradients of all ranks summed in buckets, while backward still runs.

A bucket (`buckets.py`) takes the gradients of consecutive parameters of one kind. One step:

1. `start` forgets what arrived before.
2. In `backward`, as soon as autograd has finished a gradient, a hook copies it to its place in its bucket, once, while
   it is warm in the cache, and makes that place the parameter's `.grad`. What was computed there (`place_of`) is not
   copied. A step may have several backwards (microbatches): to the places autograd then adds by itself.
3. In the last backward, a bucket whose gradients have all come is reduced, unless one before it is still incomplete:
   all ranks issue the same buckets in the same order.
4. `finish` sends what is left, with zeros for what did not come, then what compressed buckets send second
   (`compression.py`), and waits. A parameter that no rank used has no gradient afterwards. If asked for, all ranks know
   then whether any sum is infinite or NaN; most buckets find that out as they are summed.

The first step fills no buckets: it shows in which order gradients arrive, and rank 0's order becomes that of the
buckets on every rank. Invariant: a bucket's content and its place in the sequence are the same on all ranks.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .backend import gather_objects, message_device
from .buckets import Bucket, SparseBucket, is_finite
from .compression import LowRankBucket, PowerSGD, is_compressed
from .compression import make_bucket as compression_bucket
from .errors import DistributedTrainerError, MismatchError

if TYPE_CHECKING:
    from .profile import Recorder

# Large enough that a call costs little against its transfer, small enough that most are on their way before the end.
BUCKET_BYTES = 4 << 20


@dataclass
class _State:
    """A parameter's gradient in the current step."""

    name: str
    parameter: nn.Parameter
    bucket: int = -1
    view: Tensor | None = None
    """Its place in the bucket; a sparse gradient has none, and stays in `.grad`."""
    has_gradient: bool = False
    """It is in its bucket, or in the first step in `.grad`."""
    has_arrived: bool = False
    """Its hook has run in this backward."""
    is_placed: bool = False
    """Some of it, or all, was computed in its place in the bucket."""
    hook: Any = field(default=None, repr=False)


class GradientSum:
    """Sums the gradients of named parameters over the ranks of a process group.

    Args:
        parameters: Names and parameters, the same on every rank; shared parameters once.
        process_group: Any of torch's. No one else may call collectives on it.
        compression: The same on every rank.
        make_bucket: In place of those that `compression` asks for: what has their interface.
        nonfinite_gradients: The trainer's; with "ignore" nobody looks for them. The same on every rank.

    Attributes:
        found_nonfinite: Whether a gradient of the last step is infinite or NaN. The same on every rank.
        unused: Numbers of the parameters that no rank used in the last step.
        recorder: Is told of each bucket's life, unless it is None.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        process_group: Any,
        compression: PowerSGD | None = None,
        make_bucket: Callable[..., Bucket] | None = None,
        nonfinite_gradients: str = "ignore",
    ) -> None:
        self._make_bucket = make_bucket or functools.partial(compression_bucket, compression=compression)
        self._group = process_group
        # What ranks must agree on, by its name for the user.
        self._settings = {"compression": compression, "nonfinite_gradients": nonfinite_gradients}
        self._check_finite = nonfinite_gradients != "ignore"
        self.found_nonfinite = False
        self.unused: set[int] = set()
        self.recorder: Recorder | None = None
        self._compression = compression
        self._sums_sparse = make_bucket is None
        self._states = [_State(name, parameter) for name, parameter in parameters]
        self._index = {id(state.parameter): index for index, state in enumerate(self._states)}
        self._trainable: list[bool] = []
        self._buckets: list[Bucket | LowRankBucket | SparseBucket] = []
        self._arrivals: list[int] = []
        self._earlier: list[tuple[Tensor, Tensor]] = []
        self._num_started = 0
        self._is_in_backward = False
        self._is_last = False
        self._leave_out = False

    def start(self, keep: bool = False) -> None:
        """Begins a step, before forward. Local.

        Args:
            keep: Gradients that are there are no part of the step, and are added to its sums. Else they are dropped.
        """
        if keep and self._group.size() == 1:
            return
        self._earlier = []
        if keep:
            owners = {id(state.parameter): state.parameter for state in self._states}
            owners |= {id(owner): owner for bucket in self._buckets for owner, _ in bucket.results}
            self._earlier = [(owner, owner.grad.clone()) for owner in owners.values() if owner.grad is not None]
        for state in self._states:
            state.parameter.grad = None
            state.has_gradient = state.is_placed = False
        if self._group.size() == 1:
            return
        trainable = [state.parameter.requires_grad for state in self._states]
        if trainable != self._trainable:
            self._watch(trainable)
        for bucket in self._buckets:
            bucket.reset()
        self._arrivals.clear()
        self._num_started = 0

    @contextlib.contextmanager
    def backward(self, leave_out: bool = False, is_last: bool = True) -> Iterator[None]:
        """Around a backward: the gradients that it computes are those of the step, added to earlier ones.

        Collective if it is the last, but does not wait for the other ranks.

        Args:
            leave_out: This rank's gradients count for nothing, whatever they are.
            is_last: Of the step, on every rank; buckets are sent as they are complete.
        """
        for state in self._states:
            state.has_arrived = False
        kept = []
        if leave_out:
            kept = [state.parameter.grad for state in self._states]
            for state in self._states:
                state.parameter.grad = None
        self._leave_out, self._is_last = leave_out, is_last
        self._is_in_backward = True
        try:
            yield
        finally:
            self._is_in_backward = False
            for state, gradient in zip(self._states, kept, strict=False):
                state.parameter.grad = gradient

    def finish(self, numbers: list[float]) -> list[float]:
        """Ends a step, after backward: each `.grad` is the sum over all ranks, with the same bits. Collective, blocks.

        Where the bucket says so it is another's `.grad`, and the parameter has none.

        Args:
            numbers: To be summed as well. They travel behind the last bucket, so their sum is the commit point: a rank
                that has it knows that every rank has all gradients.

        Returns:
            Their sums, in float64.

        Raises:
            MismatchError: The ranks' parameters or settings do not fit together. The same on every rank.
        """
        if self._group.size() == 1:
            if self._check_finite:
                gradients = [state.parameter.grad for state in self._states if state.parameter.grad is not None]
                self.found_nonfinite = not all(is_finite(gradient) for gradient in gradients)
            return numbers
        if not self._buckets:
            self._build()
        for number in range(self._num_started, len(self._buckets)):
            bucket = self._buckets[number]
            for index, view in zip(bucket.indices, bucket.views, strict=True):
                state = self._states[index]
                if view is None:
                    continue
                if not state.has_gradient:
                    view.zero_()
                elif state.parameter.grad is not view:  # of the first step
                    self._take(state, view)
            self._send(number)
        if self.recorder is not None:
            self.recorder.wait_began()
        for bucket in self._buckets:
            bucket.proceed()
        own = [state.has_gradient for state in self._states]
        is_missing = any(needed and not used for needed, used in zip(self._trainable, own, strict=True))
        has_nonfinite_part = self._check_finite and any(b.gives_parts and b.found_nonfinite() for b in self._buckets)
        *sums, num_missing, num_parts = self._sum([*numbers, is_missing, has_nonfinite_part], torch.float64)
        num_users = self._sum(own, torch.int32) if num_missing else []
        self.conclude({index for index, users in enumerate(num_users) if not users}, num_parts > 0)
        return sums

    def conclude(self, unused: set[int], has_nonfinite_part: bool = False) -> None:
        """What `finish` does past the commit point. Local.

        Another rank that has come there tells what this one needs for it, if ranks were killed meanwhile.
        """
        self.unused = unused
        for bucket in self._buckets:
            bucket.finish(unused)
        if self.recorder is not None:
            self.recorder.wait_ended([bucket.done_at_ns() for bucket in self._buckets])
        if self._check_finite:
            self.found_nonfinite = has_nonfinite_part or any(bucket.found_nonfinite() for bucket in self._buckets)
            if self.found_nonfinite:
                for bucket in self._buckets:
                    bucket.forget()
        for bucket in self._buckets:
            for index, (owner, gradient) in zip(bucket.indices, bucket.results, strict=True):
                self._states[index].parameter.grad = None
                owner.grad = None if index in unused else gradient
        for owner, earlier in self._earlier:
            owner.grad = earlier if owner.grad is None else owner.grad.add_(earlier)
        self._earlier = []

    def first_nonfinite(self) -> str:
        """Name of the first parameter whose gradient is infinite or NaN, if `found_nonfinite`.

        Collective where ranks have parts of the sums, and blocks then.
        """
        owners = {index: owner for b in self._buckets for index, (owner, _) in zip(b.indices, b.results, strict=True)}
        gradients = [owners.get(index, state.parameter).grad for index, state in enumerate(self._states)]
        counts: list[Any] = [gradient is not None and not is_finite(gradient) for gradient in gradients]
        if any(bucket.gives_parts for bucket in self._buckets):
            counts = self._sum(counts, torch.int32)
        return next(state.name for state, count in zip(self._states, counts, strict=True) if count)

    def place_of(self, parameter: nn.Parameter) -> Tensor | None:
        """Memory in which a gradient of the parameter may be computed in this backward; given once in a step. Local.

        What is there when autograd has finished the gradient, and is all of it, needs no copy. None where the gradient
        must have memory of its own.
        """
        state = self._states[self._index[id(parameter)]]
        is_free = not (state.is_placed or state.has_arrived or state.has_gradient)
        if not self._is_in_backward or self._leave_out or not is_free or state.view is None:
            return None
        state.is_placed = True
        return state.view.detach()  # a tensor that nobody else holds: autograd makes such a one `.grad` as it is

    def forget_order(self) -> None:
        """Has the next step show anew in which order gradients arrive, for new buckets. Local; on every rank."""
        self._trainable = []

    def close(self) -> None:
        """Lets go of the parameters. Local."""
        for state in self._states:
            if state.hook is not None:
                state.hook.remove()
                state.hook = None
        self._drop_buckets()

    def _watch(self, trainable: list[bool]) -> None:
        """Hooks what can have a gradient now; the buckets are built anew after the next backward."""
        self._trainable = trainable
        self._drop_buckets()
        for index, state in enumerate(self._states):
            if state.hook is not None:
                state.hook.remove()
                state.hook = None
            if trainable[index]:
                state.hook = state.parameter.register_post_accumulate_grad_hook(
                    lambda parameter, index=index: self._arrived(index)
                )

    def _drop_buckets(self) -> None:
        for state in self._states:
            state.view = None
        for bucket in self._buckets:
            bucket.close()
        self._buckets = []

    def _arrived(self, index: int) -> None:
        if not self._is_in_backward:
            return
        state = self._states[index]
        if self._leave_out:
            state.parameter.grad = None
            if state.has_arrived:
                return
            if self._buckets and not state.has_gradient and state.view is not None:
                state.view.zero_()
        elif state.has_arrived:
            # A second contribution of the same backward, as with reentrant checkpointing. Autograd has added it to
            # the place in the bucket, which is right until the bucket was sent.
            if self._buckets and self._buckets[state.bucket].is_started:
                raise DistributedTrainerError(
                    f"the gradient of {state.name} got a second contribution after its bucket was sent. Use "
                    f"non-reentrant activation checkpointing (use_reentrant=False)."
                )
            return
        else:
            if self._buckets:
                self._take(state, state.view)
            state.has_gradient = True
        state.has_arrived = True
        if not self._is_last:
            return
        self._arrivals.append(index)
        if self.recorder is not None:
            self.recorder.gradient_ready(state.name)
        if not self._buckets:
            return
        self._buckets[state.bucket].num_missing -= 1
        while self._num_started < len(self._buckets) and not self._buckets[self._num_started].num_missing:
            self._send(self._num_started)
            self._num_started += 1

    def _send(self, number: int) -> None:
        """Begins the reduction of a bucket. Collective; returns at once."""
        bucket = self._buckets[number]
        if self.recorder is not None:
            names = [self._states[index].name for index in bucket.indices]
            self.recorder.bucket_started(number, names, sum(view.nbytes for view in bucket.views if view is not None))
        bucket.start()

    def _take(self, state: _State, view: Tensor | None) -> None:
        if view is None:
            return  # a sparse gradient, which stays where it is
        gradient = state.parameter.grad
        if gradient.is_sparse:
            gradient = gradient.to_dense()
        is_there = (state.is_placed or state.has_gradient) and gradient.data_ptr() == view.data_ptr()
        if not is_there:
            view.copy_(gradient)
        state.parameter.grad = view

    def _sum(self, values: list[Any], dtype: torch.dtype) -> list[Any]:
        tensor = torch.tensor(values, dtype=dtype, device=message_device(self._group))
        self._group.allreduce([tensor]).wait()
        return tensor.tolist()

    def _build(self) -> None:
        """Lays out the buckets in rank 0's order of arrival. Collective, blocks."""
        trainable = [index for index, needed in enumerate(self._trainable) if needed]
        layout = [
            (state.name, tuple(state.parameter.shape), state.parameter.dtype, needed)
            for state, needed in zip(self._states, self._trainable, strict=True)
        ]
        sparse = {index for index in self._arrivals if self._is_sum_sparse(index)}
        gathered = gather_objects(self._group, (self._arrivals, layout, self._settings, sparse))
        for rank, (_, other, settings, _) in enumerate(gathered):
            if other != gathered[0][1]:
                raise MismatchError(_difference(rank, gathered[0][1], other))
            for name, value in settings.items():
                if value != gathered[0][2][name]:
                    raise MismatchError(
                        f"{name} differs: rank 0 has {gathered[0][2][name]}, rank {rank} has {value}. Pass the same "
                        f"to create_distributed_trainer on every rank."
                    )
        order = gathered[0][0]
        order = order + [index for index in reversed(trainable) if index not in set(order)]
        for index in sorted(set().union(*(row[3] for row in gathered))):
            order.remove(index)
            self._states[index].bucket = len(self._buckets)
            self._buckets.append(SparseBucket(self._group, index, self._states[index].parameter))
        for run in self._runs(order):
            parameters = [self._states[index].parameter for index in run]
            bucket = self._make_bucket(self._group, run, parameters, check_finite=self._check_finite)
            for index, view in zip(run, bucket.views, strict=True):
                self._states[index].bucket, self._states[index].view = len(self._buckets), view
            self._buckets.append(bucket)

    def _is_sum_sparse(self, index: int) -> bool:
        """Whether the parameter's gradient of the first step is sparse, and the group sums such ones. Local."""
        parameter = self._states[index].parameter
        return (
            parameter.grad is not None
            and parameter.grad.is_sparse
            and parameter.grad.is_cpu
            and self._sums_sparse
            and hasattr(self._group, "allocate")
        )

    def _runs(self, order: list[int]) -> Iterable[list[int]]:
        """Cuts the order, within each kind of parameter, into pieces of about BUCKET_BYTES."""
        open_runs: dict[tuple[torch.dtype, torch.device, bool], tuple[list[int], int]] = {}
        for index in order:
            parameter = self._states[index].parameter
            kind = (parameter.dtype, parameter.device, is_compressed(parameter, self._compression))
            run, num_bytes = open_runs.pop(kind, ([], 0))
            run.append(index)
            num_bytes += parameter.numel() * parameter.element_size()
            if num_bytes >= BUCKET_BYTES:
                yield run
            else:
                open_runs[kind] = (run, num_bytes)  # now the last: what ends earlier starts earlier
        for run, _ in open_runs.values():
            yield run


def _difference(rank: int, first: list[Any], other: list[Any]) -> str:
    for ours, theirs in zip(first, other, strict=False):
        if ours != theirs:
            return (
                f"parameters differ: rank 0 has {_describe(*ours)}, rank {rank} has {_describe(*theirs)}. Build the "
                f"model the same way on every rank."
            )
    return (
        f"parameters differ: rank 0 has {len(first)} of them, rank {rank} has {len(other)}. Build the model the same "
        f"way on every rank."
    )


def _describe(name: str, shape: tuple[int, ...], dtype: torch.dtype, needs_grad: bool) -> str:
    kind = "" if needs_grad else ", frozen"
    return f"{name} {list(shape)} ({str(dtype).removeprefix('torch.')}{kind})"
