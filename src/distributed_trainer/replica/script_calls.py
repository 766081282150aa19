# SPDX-License-Identifier: Apache-2.0
"""Calls by which the script brings values of all ranks together: gather, reduce and any, in a step and elsewhere.

In a step these calls are made by the model and the criterion. Then

- a rank whose samples are a dummy takes part, and counts for nothing: the other ranks do not get its rows. It sees its
  own rows in its result, so that the criterion computes with it what any rank computes;
- a rank whose forward or backward has raised says so in its next call, in place of the call. The other ranks get its
  exception from the call in which they wait, and no rank makes any further call in the step. The step ends with a call
  of its own (`finish`), so that such a rank is found where no other call follows.

Every call begins with a message from each rank, which says what it calls and with what. The engine compares the lengths
of messages, so ranks that are elsewhere get an error. But a rank whose step has failed before any step has made a call
does not know that others wait, and sends gradients in another group. So the first call in a step meets in that group.

The trainer's own exchange of a loss's denominators (`exchange`) uses the same messages. In a step that has it, a rank
that has failed arrives here in any case (`report_failure`).
"""

from __future__ import annotations

import contextlib
import functools
import math
import operator
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..backend.engine_group import EngineGroup
from ..backend.gather import SCRIPT_CALL, gather_bytes, gather_objects, message_device, pack_exception, unpack_exception
from ..errors import MismatchError

if TYPE_CHECKING:
    from .replica import Progress

_FIRST_CALL = bytes(11)  # no other message in the group of gradients has this length

OPS = ("sum", "mean", "min", "max")


class ScriptCalls:
    """Gather and reduce the script's values over the ranks.

    Args:
        group: Process group of the ranks, for calls in forward and of the trainer.
        progress: Progress of the training, which knows whether a step has ever made such calls.

    Attributes:
        is_active: Whether the script is in a forward or backward of the trainer's.
        is_over: Whether a rank has failed in the present step, and all ranks know it.
        told: Exception of another rank's failure; None if there was none.
    """

    def __init__(self, group: Any, progress: Progress) -> None:
        self._group, self._progress = group, progress
        self._rank: int = group.rank()
        self._size: int = group.size()
        self.is_active = False
        self._has_end = False
        self._refusal: str | None = None
        self._first_group: Any = None
        self.start()
        self._is_dummy = self._completes = False
        self._num_made = self._num_skipped = self._num_usual = 0
        self._has_counted = False
        self._results: list[Tensor] = []  # gathered rows that have a graph, since the last backward

    @property
    def num_ranks(self) -> int:
        """Number of ranks."""
        return self._size

    @property
    def are_used(self) -> bool:
        """Whether a forward or backward has ever made such a call. The same on every rank."""
        return self._progress.makes_script_calls and self._size > 1

    @property
    def awaits_more(self) -> bool:
        """Whether this rank has made fewer calls in a forward and backward that has raised than in the last one."""
        return self.are_used and max(self._num_made, self._num_skipped) < self._num_usual

    def start(self) -> None:
        """Begin a step or an evaluation. Local."""
        self.is_over = False
        self.told: Exception | None = None
        self._failure: Exception | None = None

    @contextlib.contextmanager
    def step(self, refusal: str | None = None, first_group: Any = None) -> Iterator[None]:
        """Surround all forwards and backwards of a step or an evaluation, which `finish` ends. Local.

        Args:
            refusal: Why calls in this step raise ValueError, the same on every rank; None if they may be made.
            first_group: Group in which a rank that has failed is, if it does not know that the others make calls; None
                if it is in the same group as these.
        """
        self.start()
        self._has_end, self._refusal, self._first_group = True, refusal, first_group
        try:
            yield
        finally:
            self._has_end = self._has_counted = False
            self._refusal = self._first_group = None

    @contextlib.contextmanager
    def active(self, is_dummy: bool = False, completes: bool = False) -> Iterator[None]:
        """Surround a forward, a backward or both. Local; arguments are those of `GlobalBatchNorm.active`."""
        self._is_dummy, self._completes = is_dummy or completes, completes
        self._num_skipped = max(self._num_made, self._num_skipped) if completes else 0
        self._num_made = 0
        if self._has_end:
            self._results.clear()  # a forward has raised
        self.is_active = True
        try:
            yield
            if torch.is_grad_enabled():
                self._num_usual = self._num_made
        finally:
            self.is_active = self._is_dummy = self._completes = False

    def take_results(self) -> list[Tensor]:
        """Return the results of `gather` that have a graph: every rank's backward must pass through them. Local."""
        results, self._results = self._results, []
        return results

    def take_has_counted(self) -> bool:
        """Return whether rows with a graph of this rank were gathered since the last call. Local."""
        has_counted, self._has_counted = self._has_counted, False
        return has_counted

    def fail(self, error: Exception) -> None:
        """Remember that forward or backward has raised on this rank. Local; the next call tells the other ranks."""
        self._failure = self._failure or error

    def finish(self) -> None:
        """End the calls of a step or of a batch. Collective and blocks if such calls are used, else local.

        Afterwards `is_over` says whether a rank has failed; no rank makes a call before the next `start` then.
        """
        if not self.are_used or self.is_over:
            return
        try:
            self._meet("end")
        except Exception:
            if not self.is_over:
                raise

    def report_failure(self) -> None:
        """Report to the other ranks, which wait in a call, that this rank has failed. Collective, blocks.

        Afterwards `is_over` is True on every rank.
        """
        try:
            self._meet("end", is_of_script=False)
        except Exception:
            if not self.is_over:
                raise

    def exchange(self, call: str, value: Any) -> list[tuple[Any, bool]]:
        """Exchange a value of the trainer's own in forward. Collective, blocks.

        Args:
            call: Name of the exchange, for messages.
            value: Value of numbers, tuples and lists.

        Returns:
            The value of each rank, and whether its samples count.

        Raises:
            Exception: A rank has failed in the step. The same on every rank.
        """
        if self._size == 1:
            return [(value, not self._is_dummy)]
        return [row[1:3] for row in self._meet(call, value, is_of_script=False)]

    def gather(self, tensor: Any) -> Tensor:
        """Join the ranks' tensors, as `DistributedTrainer.gather` describes it. Collective, blocks."""
        error, call, num_rows, has_graph = self._refuse(_refuse_rows, tensor), None, 0, False
        if error is None:
            has_graph = tensor.requires_grad and torch.is_grad_enabled()
            shape = ", ".join(["rows", *map(str, tensor.shape[1:])])
            call = f"gather of {tensor.dtype} [{shape}] {'with' if has_graph else 'without'} a graph"
            num_rows = 0 if self._is_dummy else len(tensor)
        skips = self._skips_call() and error is None
        counts = None if skips else [row[1] for row in self._meet(call, num_rows, error)]
        if self._size == 1:
            alone: Tensor = tensor.clone()
            return alone
        if not has_graph:
            return self._joined(tensor, counts)
        self._has_counted |= num_rows > 0
        joined: Tensor = _Gather.apply(tensor, self, counts, self._is_dummy)  # type: ignore[no-untyped-call]
        if self.is_active:
            self._results.append(joined)
        return joined

    def reduce(self, value: Any, op: Any) -> Any:
        """Reduce a number or tensor, as `DistributedTrainer.reduce` describes it. Collective, blocks."""
        error = self._refuse(_refuse_value, value, op)
        is_tensor, call = isinstance(value, Tensor), None
        if error is None:
            if is_tensor:
                kind = f"{value.dtype} {list(value.shape)}"
            else:
                number = next(number for number in (bool, int, float) if isinstance(value, number))
                kind, value = number.__name__, number(value)
            call = f"reduce to the {op} of {kind}"
        if self._skips_call() and error is None:
            return value
        rows = self._meet(call, None if is_tensor else value, error)
        if not is_tensor:
            return _reduced_numbers([row[1] for row in rows if row[2]], op)
        counts = [int(row[2]) for row in rows]
        own = value.detach()[None]
        return _reduced_rows(own if self._size == 1 else self._all_gather(own[: counts[self._rank]], counts), op)

    def any(self, flag: Any) -> bool:
        """Return whether a flag is on, on any rank. Collective, blocks."""
        try:
            value: Any = bool(flag)
        except Exception as error:  # a tensor of several elements, for example
            value = error
        return bool(self.reduce(value, "max"))

    def _refuse(self, check: Callable[..., Exception | None], *arguments: Any) -> Exception | None:
        if self._refusal is not None:
            raise ValueError(self._refusal)
        return check(*arguments)

    def _skips_call(self) -> bool:
        """Count a call; return whether this rank has made it before the exception after which it completes. Local."""
        self._num_made += 1
        return self._completes and self._num_made <= self._num_skipped

    def _meet(
        self, call: str | None, value: Any = None, error: Exception | None = None, is_of_script: bool = True
    ) -> list[Any]:
        """Begin a call: return (call, value, whether the rank counts, failure) of each rank. Collective, blocks.

        Args:
            call: The call, with all that must be the same on every rank; None with an error.
            value: A value that may differ between ranks.
            error: Why this rank cannot.
            is_of_script: Whether the script makes the call.

        Raises:
            Exception: A rank has an error, or has failed in the step. The same on every rank.
            MismatchError: The ranks make different calls. The same on every rank.
        """
        if self.is_over and self._has_end:  # the script has caught what an earlier call raised
            raise self.told or self._failure or AssertionError
        if not self._progress.makes_script_calls and isinstance(self._first_group, EngineGroup):
            gather_bytes(self._first_group, _FIRST_CALL)
        ends = self._has_end or call == "end"
        own = error or (self._failure if ends else None)
        mine = call, value, not self._is_dummy, None if own is None else pack_exception(own)
        rows = gather_objects(self._group, mine, SCRIPT_CALL)
        self._progress.makes_script_calls |= self.is_active and is_of_script
        for rank, (*_, failure) in enumerate(rows):
            if failure is not None:
                self.is_over = ends
                if own is None:
                    self.told = unpack_exception(failure, rank)
                raise own or self.told or AssertionError
        for rank, (other, *_) in enumerate(rows):
            if other != rows[0][0]:
                raise MismatchError(
                    f"the ranks' calls differ: rank 0 is in {rows[0][0]}, rank {rank} in {other}. Every rank must make "
                    f"the same calls in the same order, with values of one dtype and shape; only the number of rows of "
                    f"gather may differ."
                )
        return rows

    def _joined(self, tensor: Tensor, counts: list[int] | None) -> Tensor:
        """Return the ranks' rows, with the own ones also for a dummy. Collective, unless `counts` is None."""
        if counts is None:
            return tensor.detach().clone()
        rows = self._all_gather(tensor.detach()[: counts[self._rank]], counts)
        if not self._is_dummy:
            return rows
        before = sum(counts[: self._rank])
        return torch.cat([rows[:before], tensor.detach(), rows[before:]])

    def _all_gather(self, own: Tensor, counts: list[int]) -> Tensor:
        """Return the rows of all ranks, `counts` of each, in rank order. Collective, blocks."""
        device, longest = self._device_for(own), max(counts)
        row_bytes = math.prod(own.shape[1:]) * own.element_size()
        data = torch.zeros(longest * row_bytes, dtype=torch.uint8, device=device)
        data[: own.nbytes] = own.contiguous().reshape(-1).view(torch.uint8)
        gathered = torch.empty(self._size * len(data), dtype=torch.uint8, device=device)
        if len(data):
            self._group._allgather_base(gathered, data).wait()
        rows = gathered.view(own.dtype).view(self._size * longest, *own.shape[1:])
        if min(counts) < longest:
            rows = torch.cat([rows[rank * longest :][:count] for rank, count in enumerate(counts)])
        return rows.to(own.device)

    def _own_gradient(self, gradient: Tensor, counts: list[int] | None, num_rows: int, is_dummy: bool) -> Tensor:
        """Return the sum over the ranks of the gradients of this rank's rows. Collective, blocks."""
        is_dummy |= self._is_dummy
        if not self._skips_call():
            self._meet("the backward of gather")
            assert counts is not None  # else this rank has failed, and has told the others
            total = gradient.new_zeros(sum(counts), *gradient.shape[1:]) if is_dummy else gradient.contiguous().clone()
            if total.numel():
                moved = total.to(self._device_for(total))
                self._group.allreduce([torch.view_as_real(moved) if moved.is_complex() else moved]).wait()
                total = moved.to(total.device)
            if not is_dummy:
                before = sum(counts[: self._rank])
                return total[before : before + num_rows]
        return gradient.new_zeros(num_rows, *gradient.shape[1:])

    def _device_for(self, tensor: Tensor) -> torch.device:
        """Return the device from which the group sends a tensor: its own if the group can. Local."""
        kinds = self._group._device_types
        is_taken = isinstance(self._group, EngineGroup) or not kinds or tensor.device.type in {k.type for k in kinds}
        return tensor.device if is_taken else message_device(self._group)


class _Gather(torch.autograd.Function):
    """Concatenation of the ranks' rows. The gradient of a row is the sum of the gradients of all ranks for it."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, calls: ScriptCalls, counts: list[int] | None, is_dummy: bool) -> Tensor:
        ctx.calls, ctx.counts, ctx.num_rows, ctx.is_dummy = calls, counts, len(tensor), is_dummy
        return calls._joined(tensor, counts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "trainer.gather has no second derivative: leave create_graph=True out where the graph passes it"
            )
        return ctx.calls._own_gradient(gradient, ctx.counts, ctx.num_rows, ctx.is_dummy), None, None, None


def _refuse_rows(tensor: Any) -> Exception | None:
    if (error := _refuse_tensor(tensor, "gather takes a tensor")) is not None:
        return error
    if tensor.dim() == 0:
        return ValueError("gather joins tensors along their first dimension, but this one has none: pass tensor[None]")
    return None


def _refuse_tensor(tensor: Any, text: str) -> Exception | None:
    if not isinstance(tensor, Tensor):
        return TypeError(f"{text}, not {type(tensor).__name__}")
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
        return TypeError(f"{text} that is dense, neither sparse nor quantised nor nested: this one is {tensor.layout}")
    return None


def _refuse_value(value: Any, op: Any) -> Exception | None:
    if isinstance(value, Exception):
        return value
    if op not in OPS:
        return ValueError(f'op must be "sum", "mean", "min" or "max", not {op!r}')
    if isinstance(value, (bool, int, float)):
        return None
    if (error := _refuse_tensor(value, "reduce takes an int, a float, a bool or a tensor")) is not None:
        return error
    if op == "mean" and not (value.is_floating_point() or value.is_complex()):
        return TypeError(f"the mean of {value.dtype} tensors is no {value.dtype}: pass tensor.double()")
    if op == "sum" and value.dtype is torch.bool:
        return TypeError('the sum of torch.bool tensors is no torch.bool: pass tensor.long(), or op="max" for any')
    if op in ("min", "max") and value.is_complex():
        return TypeError(f"complex numbers have no {op}: pass tensor.abs()")
    return None


def _reduced_numbers(values: list[Any], op: str) -> Any:
    if op in ("sum", "mean"):
        total = functools.reduce(operator.add, values, 0)
        return total if op == "sum" else total / len(values)
    nan = next((value for value in values if value != value), None)
    return nan if nan is not None else min(values) if op == "min" else max(values)


def _reduced_rows(rows: Tensor, op: str) -> Tensor:
    if op in ("min", "max"):
        return rows.amin(0) if op == "min" else rows.amax(0)
    is_short = rows.dtype.itemsize < 4 and rows.is_floating_point()  # added in float32, rounded once
    total = rows.sum(0, dtype=torch.float32 if is_short else rows.dtype)
    return (total if op == "sum" else total / len(rows)).to(rows.dtype)
