# SPDX-License-Identifier: Apache-2.0
"""Sum the gradients of all ranks in buckets, while backward still runs.

A bucket (`buckets.py`) holds the gradients of consecutive parameters of one kind. One step:

1. `prepare` drops the gradients of the last step, and finds out whether the script has kept some of them. `start` then
   leaves their memory to the script, and takes other memory.
2. In `backward`, as soon as autograd has finished a gradient, a hook copies it to its place in its bucket, once, while
   it is warm in the cache, and makes a new tensor on that place the parameter's `.grad`. A gradient that was computed
   in its place (`place_of`) is not copied. In a step with several backwards (microbatches) autograd itself adds the
   later gradients to the places. Between backwards a script may move `.grad` to other memory: then it is copied again.
3. In the last backward, a bucket is sent as soon as all of its gradients have arrived and all buckets before it were
   sent: all ranks issue the same buckets in the same order.
4. `finish` sends the remaining buckets, with zeros for gradients that did not arrive, then the second phase of
   compressed buckets (`powersgd.py`), and waits. A parameter that no rank used has no gradient afterwards. If asked
   for, all ranks then know whether any sum is infinite or NaN; most buckets check that while they are summed.

The first step fills no buckets. It shows in which order gradients arrive, and rank 0's order becomes the order of the
buckets on every rank. The same happens in a step before which the parameters have changed (`follow`). Invariant: a
bucket's content and its place in the sequence are the same on all ranks.

A sum is sparse if all gradients in it are. A parameter whose sum becomes sparse, or no longer is, is summed in its
earlier bucket once more, and in the right kind of bucket from the next step on.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from ..backend.engine_group import EngineGroup
from ..backend.gather import gather_bytes, message_device
from ..errors import DistributedTrainerError
from ..options import PowerSGD
from .buckets import Bucket, SparseBucket, is_finite, sum_sparse
from .hooks import GradientFunctions
from .layout import Layout, agree, runs
from .loss_scale import LossScale
from .powersgd import LowRankBucket
from .powersgd import make_bucket as compression_bucket

if TYPE_CHECKING:
    from ..metrics.profiler import Recorder


class Reducer(Protocol):
    """Reducer of a replica's gradients, as other rooms use it: a `GradientReducer` or a `DeterministicReducer`."""

    found_nonfinite: bool
    has_unsummed: bool
    recorder: Recorder | None
    functions: GradientFunctions
    loss_scale: LossScale | None

    def follow(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        """Sum the gradients of these parameters from now on. Local."""

    def backward(self, leave_out: bool = False, is_last: bool = True) -> contextlib.AbstractContextManager[None]:
        """Surround a backward of the step."""

    def first_nonfinite(self) -> str:
        """Return the name of the first parameter whose gradient is infinite or NaN, if `found_nonfinite`."""

    def close(self) -> None:
        """Release the parameters and buckets. Local."""


@dataclass
class _State:
    """State of a parameter's gradient in the current step."""

    name: str
    parameter: nn.Parameter
    bucket: int = -1
    """Number of the bucket; -1 before the buckets are built."""
    view: Tensor | None = None
    """Place of the gradient in the bucket; None for a sparse gradient, which stays in `.grad`. Nothing else gets this
    tensor, since `module.to()` and assigning to `.grad.data` move a tensor to other memory."""
    has_gradient: bool = False
    """Whether the gradient is in its bucket, or in the first step in `.grad`."""
    has_arrived: bool = False
    """Whether the parameter's hook has run in this backward."""
    is_placed: bool = False
    """Whether at least a part of the gradient was computed in its place in the bucket."""
    is_sparse: bool | None = None
    """Whether the last sum was sparse, the same on every rank; None before that is known."""
    hook: Any = field(default=None, repr=False)


class GradientReducer:
    """Reducer that sums the gradients of named parameters over the ranks of a process group.

    Args:
        parameters: Names and parameters, the same on every rank; shared parameters once.
        process_group: Any process group of torch, on which nothing else calls collectives.
        compression: Low-rank compression, or None for none. The same on every rank.
        make_bucket: Function that makes each bucket, with the interface of `Bucket`; None for the buckets that
            `compression` asks for.
        check_finite: Whether to set `found_nonfinite`. The same on every rank.

    Attributes:
        found_nonfinite: Whether a gradient of the last step is infinite or NaN. The same on every rank.
        has_unsummed: Whether a backward that was not this reducer's has added to a gradient since the last step began.
        unused: Numbers of the parameters that no rank used in the last step.
        recorder: Recorder that gets the times of gradients and buckets; None for no recording.
        functions: Functions that may replace sums.
        loss_scale: Scale of the loss, by which the sums are divided; None for no division.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        process_group: Any,
        compression: PowerSGD | None = None,
        make_bucket: Callable[..., Bucket] | None = None,
        check_finite: bool = False,
    ) -> None:
        self._make_bucket = make_bucket or functools.partial(compression_bucket, compression=compression)
        self._group = process_group
        self._check_finite = check_finite
        self.found_nonfinite = self.has_unsummed = False
        self.unused: set[int] = set()
        self.recorder: Recorder | None = None
        self.functions = GradientFunctions()
        self.loss_scale: LossScale | None = None
        self._compression = compression
        self._sums_sparse = make_bucket is None
        self._states: list[_State] = []
        self._index: dict[int, int] = {}
        self._trainable: list[bool] = []
        self._buckets: list[Bucket | LowRankBucket | SparseBucket] = []
        self._has_old_order = False
        self._arrivals: list[int] = []
        self._earlier: list[tuple[Tensor, Tensor]] = []
        self._sparse: dict[int, Tensor] = {}  # this step's sparse gradients of parameters in dense buckets
        self._other_kind: dict[int, Tensor] = {}  # this step's sums that are not of their buckets' kind
        self._num_started = 0
        self._is_in_backward = False
        self._is_last = False
        self._leave_out = False
        self.follow(parameters)

    def follow(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        """Sum the gradients of these parameters from now on; the next `finish` builds their buckets. Local.

        Call it on every rank, also if parameters were frozen, unfrozen or moved. Between the backwards of a step it
        keeps the gradients so far.

        Args:
            parameters: Names and parameters, the same on every rank; shared parameters once.
        """
        earlier = {id(state.parameter): state for state in self._states}
        self._drop_buckets()
        named = {id(parameter): (name, parameter) for name, parameter in parameters}
        self._states = [earlier.pop(key, _State(*of_model)) for key, of_model in named.items()]
        self._trainable = [state.parameter.requires_grad for state in self._states]
        self._index = {id(state.parameter): index for index, state in enumerate(self._states)}
        for state in [*self._states, *earlier.values()]:
            if state.hook is not None:
                state.hook.remove()
                state.hook = None
        if self._group.size() == 1:
            return
        for index, (state, is_trained) in enumerate(zip(self._states, self._trainable, strict=True)):
            if is_trained:
                register = state.parameter.register_post_accumulate_grad_hook
                state.hook = register(  # type: ignore[no-untyped-call]  # torch has no types for it
                    lambda parameter, index=index: self._arrived(index)
                )

    def prepare(self, keep: bool = False) -> bool:
        """Prepare for a step, before the ranks agree on it: drop the gradients of the last one. Local.

        Args:
            keep: Leave the gradients where they are, as `start` is about to keep them.

        Returns:
            Whether anything still refers to memory that the step would write: gradients, or views of them.
        """
        self.has_unsummed = False
        if not keep:
            for state in self._states:
                state.parameter.grad = None
            for bucket in self._buckets:
                if bucket.is_sharded:
                    for owner, _ in bucket.results:
                        owner.grad = None
        return any(bucket.memory is not None and bucket.memory.current.is_held for bucket in self._buckets)

    def start(self, keep: bool = False, is_held: bool = False) -> None:
        """Begin a step, before forward. Local, unless `is_held`.

        Args:
            keep: Keep the present gradients, and add the step's sums to them afterwards: they are not summed over the
                ranks. False: drop them.
            is_held: Whether `prepare` has returned True on any rank. Then it is collective, and blocks.
        """
        if keep and self._group.size() == 1 and not self.functions and self.loss_scale is None:
            return
        self._earlier = []
        if keep:
            self._earlier = [(owner, owner.grad) for owner in self._owners() if owner.grad is not None]
            for owner, _ in self._earlier:
                owner.grad = None
        for state in self._states:
            state.has_gradient = state.is_placed = False
        if self._group.size() == 1:
            return
        if self._has_old_order:
            self._drop_buckets()
        for bucket in self._buckets:
            bucket.reset()
        self._replace_memory(is_held)
        self._sparse, self._other_kind = {}, {}
        self._arrivals.clear()
        self._num_started = 0

    def _owners(self) -> list[Tensor]:
        """Return the tensors whose `.grad` holds a gradient or a sum: parameters, and shards of them. Local."""
        owners: dict[int, Tensor] = {id(state.parameter): state.parameter for state in self._states}
        owners |= {id(owner): owner for bucket in self._buckets for owner, _ in bucket.results}
        return list(owners.values())

    def _replace_memory(self, is_held: bool) -> None:
        """Leave memory that any rank still refers to. Collective and blocks if `is_held`, else local."""
        memories = [(bucket, bucket.memory) for bucket in self._buckets if bucket.memory is not None]
        if not is_held or not memories:
            for _, memory in memories:
                memory.drop_spare()
            return
        own = bytes(itertools.chain.from_iterable(memory.are_held() for _, memory in memories))
        held = [any(column) for column in zip(*gather_bytes(self._group, own), strict=True)]
        for (bucket, memory), is_current_held, is_spare_held in zip(memories, held[::2], held[1::2], strict=True):
            if is_current_held:
                memory.replace(reuses_spare=not is_spare_held)
                for index, view in zip(bucket.indices, bucket.views, strict=True):
                    self._states[index].view = view

    @contextlib.contextmanager
    def backward(self, leave_out: bool = False, is_last: bool = True, ignores_zeros: bool = False) -> Iterator[None]:
        """Surround a backward: its gradients are added to those of the step.

        Collective in the last backward of a step, but does not wait for the other ranks.

        Args:
            leave_out: Drop the gradients that this backward computes, so that they count for nothing.
            is_last: This is the last backward of the step, on every rank; buckets are sent when they are complete.
            ignores_zeros: Parameters that get a gradient of zeros do not count as used in this backward.
        """
        unused = [state for state in self._states if ignores_zeros and not state.has_gradient]
        for state in self._states:
            state.has_arrived = False
        self._leave_out, self._is_last = leave_out, is_last
        kept = []
        if leave_out:
            for state in self._states:
                self._take(state)  # the bucket may be sent while `.grad` is away
            kept = [state.parameter.grad for state in self._states]
            for state in self._states:
                state.parameter.grad = None
        self._is_in_backward = True
        try:
            yield
        finally:
            self._is_in_backward = False
            for state, earlier in zip(self._states, kept, strict=False):
                state.parameter.grad = earlier
            for state in unused:
                gradient = state.parameter.grad
                if state.has_gradient and gradient is not None and not gradient.any():
                    state.has_gradient = False

    def finish(self, numbers: list[float]) -> list[float]:
        """Sum the gradients at the end of a step, after backward. Collective, blocks.

        Each `.grad` becomes the sum over all ranks, with the same bits on every rank. Sharded buckets set the `.grad`
        of the shards, and the parameters have none.

        Args:
            numbers: Numbers to be summed over the ranks too. They are sent after the last bucket, so their sum is the
                commit point: a rank that has it knows that every rank has all gradients.

        Returns:
            The sums of the numbers, in float64.

        Raises:
            MismatchError: The ranks' parameters do not fit together. The same on every rank.
        """
        if self._group.size() == 1:
            if self._check_finite:
                gradients = [state.parameter.grad for state in self._states if state.parameter.grad is not None]
                self.found_nonfinite = not all(is_finite(gradient) for gradient in gradients)
            self._finish_gradients()
            return numbers
        if not self._buckets:
            self._build()
        for number in range(self._num_started, len(self._buckets)):
            for index in self._buckets[number].indices:
                state = self._states[index]
                self._take(state)
                if state.view is not None and not state.has_gradient:
                    state.view.zero_()
            self._send(number)
        if self.recorder is not None:
            self.recorder.wait_began()
        for bucket in self._buckets:
            bucket.start_second_phase()
        own = [state.has_gradient for state in self._states]
        is_missing = any(needed and not used for needed, used in zip(self._trainable, own, strict=True))
        has_nonfinite_part = self._check_finite and any(b.is_sharded and b.found_nonfinite() for b in self._buckets)
        own_numbers = [*numbers, is_missing, has_nonfinite_part, self._has_other_kind()]
        *sums, num_missing, num_parts, num_other_kinds = self._sum(own_numbers, torch.float64)
        num_users = self._sum(own, torch.int32) if num_missing or num_other_kinds else []
        if num_other_kinds:
            self._sum_other_kinds(num_users)
        self._complete({index for index, users in enumerate(num_users) if not users}, num_parts > 0)
        return sums

    def _has_other_kind(self) -> bool:
        """Return whether a gradient of this rank is sparse in a dense bucket, or dense in a sparse one. Local."""
        gradients = [self._states[b.indices[0]].parameter.grad for b in self._buckets if isinstance(b, SparseBucket)]
        return bool(self._sparse) or any(gradient is not None and not gradient.is_sparse for gradient in gradients)

    def _sum_other_kinds(self, num_users: list[int]) -> None:
        """Find the sums that are of another kind than their buckets, and give each its kind. Collective, blocks.

        Args:
            num_users: Number of ranks that have a gradient, for each parameter.
        """
        in_sparse = {b.indices[0]: b for b in self._buckets if isinstance(b, SparseBucket)}
        gradients = {index: self._states[index].parameter.grad for index in in_sparse} | self._sparse
        own = [gradient is not None and gradient.is_sparse for gradient in map(gradients.get, range(len(self._states)))]
        for index, (users, sparse) in enumerate(zip(num_users, self._sum(own, torch.int32), strict=True)):
            state = self._states[index]
            is_sparse = sparse == users
            if not users or is_sparse == (index in in_sparse):
                continue
            if is_sparse:
                self._other_kind[index] = sum_sparse(self._group, self._sparse.get(index), state.parameter)
            else:
                self._other_kind[index] = in_sparse[index].dense_sum()
            state.is_sparse = is_sparse
            self._has_old_order = True
        self._sum([0], torch.int32)  # the new commit point: a rank that returns knows that all have these sums, too

    def finish_after_failure(self, unused: set[int]) -> None:
        """Complete a `finish` that was interrupted by a rank's death, after another rank passed the commit point.

        Local.

        Args:
            unused: Value of `unused` on the rank that passed the commit point.
        """
        self._complete(unused, has_nonfinite_part=False)

    def _complete(self, unused: set[int], has_nonfinite_part: bool) -> None:
        """Do the part of `finish` that follows the commit point. Local."""
        self.unused = unused
        for bucket in self._buckets:
            bucket.finish(unused)
        if self.recorder is not None:
            self.recorder.wait_ended([bucket.done_at_ns() for bucket in self._buckets])
        if self._check_finite:
            self.found_nonfinite = has_nonfinite_part or any(bucket.found_nonfinite() for bucket in self._buckets)
            if self.found_nonfinite:
                self.reset_error_feedback()
        for bucket in self._buckets:
            for index, (owner, gradient) in zip(bucket.indices, bucket.results, strict=True):
                state = self._states[index]
                if index in unused or bucket.is_sharded:
                    state.parameter.grad = None
                if index in unused:
                    owner.grad = None
                elif index in self._other_kind:
                    owner.grad = self._other_kind[index]
                elif gradient is not None and (bucket.is_sharded or state.view is None or not state.has_gradient):
                    owner.grad = gradient.detach()
        self._finish_gradients()

    def _finish_gradients(self) -> None:
        """Undo the loss scale, call the user's functions, and add the gradients of before the step. Local."""
        if self.loss_scale is not None:
            self.loss_scale.unscale([owner.grad for owner in self._owners() if owner.grad is not None])
        if self.functions:
            self.functions.apply()
        for owner, earlier in self._earlier:
            owner.grad = _accumulate(earlier, owner.grad)
        self._earlier = []

    def first_nonfinite(self) -> str:
        """Return the name of the first parameter whose gradient is infinite or NaN, if `found_nonfinite`.

        Collective and blocks with sharded buckets, otherwise local.
        """
        owners = {index: owner for b in self._buckets for index, (owner, _) in zip(b.indices, b.results, strict=True)}
        gradients = [owners.get(index, state.parameter).grad for index, state in enumerate(self._states)]
        counts: list[Any] = [gradient is not None and not is_finite(gradient) for gradient in gradients]
        if any(bucket.is_sharded for bucket in self._buckets):
            counts = self._sum(counts, torch.int32)
        return next(state.name for state, count in zip(self._states, counts, strict=True) if count)

    def place_of(self, parameter: nn.Parameter) -> Tensor | None:
        """Return memory in which the parameter's gradient may be computed in this backward. Local.

        A gradient that is complete in this memory when its hook runs is not copied. Return None if the gradient needs
        new memory: the memory is given once in a step.
        """
        state = self._states[self._index[id(parameter)]]
        is_free = not (state.is_placed or state.has_arrived or state.has_gradient)
        if not self._is_in_backward or self._leave_out or not is_free or state.view is None:
            return None
        state.is_placed = True
        return state.view.detach()  # a new tensor without other references: autograd uses it as `.grad` without a copy

    def reset_error_feedback(self) -> None:
        """Drop what compression has kept of earlier gradients, since the last sums are not used. Local."""
        for bucket in self._buckets:
            bucket.reset_error_feedback()

    def scale_error_feedback(self, factor: float) -> None:
        """Multiply what compression has kept of earlier gradients, since the loss scale has changed. Local."""
        for bucket in self._buckets:
            if isinstance(bucket, LowRankBucket):
                bucket.scale_error_feedback(factor)

    def forget_order(self) -> None:
        """Make the next step build new buckets, in the order in which its gradients arrive. Local; for every rank."""
        self._has_old_order = True

    def close(self) -> None:
        """Remove the hooks and release the buckets' memory. Local."""
        for state in self._states:
            if state.hook is not None:
                state.hook.remove()
                state.hook = None
        self._drop_buckets()

    def _drop_buckets(self) -> None:
        for state in self._states:
            state.view = None
        for bucket in self._buckets:
            bucket.close()
        self._buckets = []
        self._has_old_order = False

    def _arrived(self, index: int) -> None:
        if not self._is_in_backward:
            self.has_unsummed = True
            return
        state = self._states[index]
        if self._leave_out:
            state.parameter.grad = None
            if state.has_arrived:
                return
            if self._buckets and not state.has_gradient and state.view is not None:
                state.view.zero_()
        elif state.has_arrived:
            # A second contribution in the same backward, as with reentrant checkpointing. Autograd has added it to the
            # place in the bucket, which is correct only before the bucket is sent.
            if self._buckets and self._buckets[state.bucket].is_started:
                raise DistributedTrainerError(
                    f"the gradient of {state.name} got a second contribution after its bucket was sent. Use "
                    f"non-reentrant activation checkpointing (use_reentrant=False)."
                )
            return
        else:
            state.has_gradient = True
            self._take(state)
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
        """Start the reduction of a bucket. Collective; returns at once."""
        bucket = self._buckets[number]
        if self.recorder is not None:
            names = [self._states[index].name for index in bucket.indices]
            self.recorder.bucket_started(number, names, sum(view.nbytes for view in bucket.views if view is not None))
        bucket.start()

    def _take(self, state: _State) -> None:
        """Put a gradient that this rank has into its place in the bucket, unless it is there. Local."""
        gradient, view = state.parameter.grad, state.view
        if gradient is None:  # also where a script has dropped the gradients of this step's earlier backwards
            state.has_gradient = False
        if not state.has_gradient or view is None or gradient is None:
            return
        if gradient.is_sparse:
            if not self._is_last:
                return  # autograd adds the next backward's gradient to it
            if self._sums_as_sparse(gradient):
                self._sparse[self._index[id(state.parameter)]] = gradient
            gradient = gradient.to_dense()
        elif gradient.data_ptr() == view.data_ptr():
            return
        view.copy_(gradient)
        state.parameter.grad = view.detach()

    def _sum(self, values: list[Any], dtype: torch.dtype) -> list[Any]:
        tensor = torch.tensor(values, dtype=dtype, device=message_device(self._group))
        self._group.allreduce([tensor]).wait()
        return tensor.tolist()

    def _build(self) -> None:
        """Lay out the buckets in rank 0's order of arrival. Collective, blocks."""
        own = Layout(
            arrivals=self._arrivals,
            needed=[
                index
                for index, (state, is_trained) in enumerate(zip(self._states, self._trainable, strict=True))
                if is_trained or state.has_gradient
            ],
            sparse=[index for index in range(len(self._states)) if self._is_sparse(index)],
        )
        order, sparse = agree(own, self._group)
        for index in sparse:
            self._states[index].is_sparse = True
            self._states[index].bucket = len(self._buckets)
            self._buckets.append(SparseBucket(self._group, index, self._states[index].parameter))
        for run in runs(order, [state.parameter for state in self._states], self._compression):
            parameters = [self._states[index].parameter for index in run]
            bucket = self._make_bucket(self._group, run, parameters, check_finite=self._check_finite)
            for index, view in zip(run, bucket.views, strict=True):
                self._states[index].bucket, self._states[index].view = len(self._buckets), view
            self._buckets.append(bucket)

    def _is_sparse(self, index: int) -> bool:
        """Return whether the sum of a parameter's gradients is sparse, as far as this rank knows. Local."""
        state = self._states[index]
        if state.is_sparse is not None:
            return state.is_sparse and self._trainable[index]
        return state.parameter.grad is not None and self._sums_as_sparse(state.parameter.grad)

    def _sums_as_sparse(self, gradient: Tensor) -> bool:
        """Return whether a gradient is sparse and the group sums it as such. Local."""
        return gradient.is_sparse and gradient.is_cpu and self._sums_sparse and isinstance(self._group, EngineGroup)


def _accumulate(earlier: Tensor, gradient: Tensor | None) -> Tensor:
    """Add a gradient to the one that was in `.grad`, in the same tensor where autograd does that, too. Local."""
    if gradient is None:
        return earlier
    is_in_place = gradient.is_sparse or not earlier.is_sparse
    return earlier.add_(gradient) if is_in_place else gradient.add_(earlier)
