# SPDX-License-Identifier: Apache-2.0
"""BatchNorm with the statistics of the global batch, on any device.

One process normalises a batch by the mean and variance of all its samples. Ranks that each normalise their own
part by itself compute a different function. Here every training-mode call of `torch.nn.functional.batch_norm` by a
BatchNorm module of the model uses the statistics of all ranks, and its backward uses the sums over all ranks.

Nomenclature, per channel: x the input, n_r the values on rank r (samples times positions), n = sum_r n_r,
f_r = n_r / n, xhat = (x - mean) / sqrt(var + eps), w the weight, dy the gradient of the output.

    forward, with one all_gather of (mean_r, var_r, n_r):
        mean = sum_r f_r mean_r
        var  = sum_r f_r (var_r + (mean_r - mean)^2)        Chan, Golub, LeVeque 1979, for any number of parts
    backward, with one all_gather of each rank's sums of dy and of dy xhat:
        dx   = w / sqrt(var + eps) (dy - sum(dy) / n - xhat sum(dy xhat) / n)
    The gradients of weight and bias are this rank's sums: the trainer sums gradients over the ranks.
    With create_graph=True backward is written in operations that autograd differentiates again. Two of them concern
    all ranks: mean and var as functions of x, and the sums over the ranks. The derivative of each is a sum over the
    ranks, with one all_gather.

Invariant: each rank computes the same bits from the same gathered numbers, so running statistics agree
without a broadcast. A rank that has no samples runs a *dummy* microbatch and contributes zeros.

All ranks must call the same modules in the same order. Each message shows by its length to which module and derivative
it belongs (`_Exchange`), so that a rank that calls another module is found.
"""

from __future__ import annotations

import enum
import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..backend.engine_group import EngineGroup
from ..backend.gather import gather_bytes
from ..errors import MismatchError

logger = logging.getLogger("distributed_trainer")


class GlobalBatchNorm:
    """Give the BatchNorm modules of a model the statistics of the global batch, inside `active()` only.

    Inside `active()` each module's class is a subclass of its original class. Outside of it the model is unchanged
    for state_dict, pickle, deepcopy and evaluation. A compiled model is also correct, since torch.compile
    guards on the classes of modules, but it is slower: its graph breaks at each BatchNorm, and all modules in the
    same nn.Sequential as a BatchNorm run eagerly.

    Calls of F.batch_norm outside of BatchNorm modules are not replaced. A module whose forward does not call it
    while training keeps local statistics: `refusal` names it. Rank 0 names scripted modules once in a warning.

    Args:
        model: Model whose modules are looked up now; BatchNorm modules added later stay local.
        process_group: Group used through `rank`, `size` and `_allgather_base` only. Each rank issues the group's
            collectives in the order of forward and backward, from the thread that runs them. Where gradient
            buckets use the same group, all ranks must issue both kinds of collectives in the same order.

    Attributes:
        refusal: Why the last batch must not be used; None if nothing is wrong.
    """

    def __init__(self, model: nn.Module, process_group: Any) -> None:
        self._classes: dict[type, type] = {}
        self._numbers: dict[nn.Module, int] = {}  # by BatchNorm module; the same on every rank
        self.refusal: str | None = None
        names: list[str] = []
        self._group = process_group
        for name, module in model.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                self._numbers[module] = len(names)
                names.append(name)
            elif isinstance(module, torch.jit.ScriptModule) and "BatchNorm" in module.original_name:
                self._warn(name)
        self._names = names
        self._exchange = _Exchange(process_group, names)
        self._mode = _GlobalStatistics(self._exchange)

    def __len__(self) -> int:
        """Return the number of BatchNorm modules found."""
        return len(self._numbers)

    def take_has_counted(self) -> bool:
        """Return whether samples of this rank have counted in statistics since the last call. Local."""
        has_counted, self._mode.has_counted = self._mode.has_counted, False
        return has_counted

    @property
    def waited_seconds(self) -> float:
        """Seconds that all calls so far have spent in collectives."""
        return self._exchange.seconds

    def check_finished(self) -> None:
        """Check that no rank is still in a BatchNorm module. Collective, blocks; call it where all calls are over.

        Raises:
            MismatchError: Another rank calls more BatchNorm modules. The same on every rank.
        """
        self._exchange.check_finished()

    @contextmanager
    def active(self, is_dummy: bool = False, completes: bool = False) -> Iterator[None]:
        """Use global statistics until the end of the block. Every rank runs forward and backward inside it.

        Backward belongs inside because activation checkpointing runs forward again there. Each rank must call
        the same modules in the same order, and run backward through the same modules.

        Args:
            is_dummy: This rank's input replaces an empty part: the rank takes part in every collective and counts
                for nothing. The gradients that it computes are meaningless.
            completes: An exception ended the last block before this rank had made all of its collective calls.
                Running the same modules again, on any input, makes only the calls that are missing, and changes running
                statistics only there.

        Raises:
            ValueError: The global batch has one value per channel. Raised by the model, the same on all ranks.
            MismatchError: Ranks call different modules. Raised by the model or in backward, the same on all ranks.
        """
        self._mode.is_dummy = is_dummy
        self._exchange.start(completes)
        own_classes = [type(module) for module in self._numbers]
        try:
            for module, own in zip(self._numbers, own_classes, strict=True):
                set_class(module, self._classes.get(own) or self._global_class(own))
            yield
        finally:
            for module, own in zip(self._numbers, own_classes, strict=True):
                set_class(module, own)

    def _global_class(self, own: type[nn.Module]) -> type:
        """Make the subclass of `own` whose forward uses global statistics."""
        # SyncBatchNorm's forward refuses the CPU and does not know dummies.
        own_forward: Callable[..., Any] = (
            nn.BatchNorm1d.forward if own.forward is nn.SyncBatchNorm.forward else own.forward
        )

        def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            self._mode.calls, self._mode.module = 0, self._numbers[module]
            num_batches = module.num_batches_tracked if self._exchange.is_repeated else None
            before = num_batches.clone() if isinstance(num_batches, Tensor) else None
            with self._mode:
                output = own_forward(module, *args, **kwargs)
            if before is not None:
                module.num_batches_tracked = before
            if module.training and not self._mode.calls:
                self.refusal = (
                    f"BatchNorm module {self._names[self._numbers[module]]!r} ({own.__qualname__}) does not call "
                    f"F.batch_norm, so its statistics would be those of each rank's part. Let its forward call "
                    f"F.batch_norm, or make the trainer with sync_batchnorm=False."
                )
            return output

        # Dynamo cannot trace a bare process group. (The decorator imports Dynamo, but so does every optimizer.)
        hidden = torch.compiler.disable(forward)  # type: ignore[no-untyped-call]  # torch has no types for it
        members = {"forward": hidden, "__module__": own.__module__}
        self._classes[own] = type(own.__name__, (own,), members)
        return self._classes[own]

    def _warn(self, name: str) -> None:
        if self._group.rank() == 0:
            logger.warning(
                "BatchNorm module %r is a scripted module: its statistics are those of each rank's part.", name
            )


class _Kind(enum.IntEnum):
    """Derivative in which a message is exchanged."""

    FORWARD = 0
    BACKWARD = 1
    DOUBLE_BACKWARD = 2  # and later derivatives


class _Exchange:
    """Gather the ranks' numbers, in a sequence of calls that is the same on all ranks.

    Every call has a number: three for each module (`_Kind`), and one for the end of a step. Messages are padded, so
    that their length modulo `_modulus` is the call's number. The engine compares lengths before a collective. So it
    finds ranks that are in different calls without further messages, and its error says which calls these are. Other
    process groups, and groups of GPUs, do not compare lengths: there a gather of the numbers goes before each message.
    """

    def __init__(self, process_group: Any, names: list[str]) -> None:
        self._group, self._names = process_group, names
        self._end = len(_Kind) * len(names)
        self._modulus = self._end + 1
        self._num_made = self._num_skipped = 0
        self.seconds = 0.0  # spent in all calls so far

    def start(self, completes: bool) -> None:
        """Begin a sequence of calls. Local.

        Args:
            completes: Repeat the last sequence; calls that this rank has already made are skipped.
        """
        self._num_skipped = max(self._num_made, self._num_skipped) if completes else 0
        self._num_made = 0

    @property
    def is_repeated(self) -> bool:
        """Whether this rank has made the next call already, so that it is skipped."""
        return self._num_made < self._num_skipped

    def gather(self, call: int, *values: Tensor) -> tuple[Tensor, list[int]]:
        """Return the joined values of all ranks, a row for each rank, and their lengths in it. Collective.

        Skipped calls are local. The last length is that of the padding.

        Args:
            call: Number of the call.
            values: 1-dimensional, of one type.

        Raises:
            MismatchError: Ranks are in different calls. The same on every rank.
        """
        lengths = list(map(len, values))
        lengths.append((call - sum(lengths)) % self._modulus)
        local = torch.cat((*values, values[0].new_empty(lengths[-1])))
        size = self._group.size()
        if self.is_repeated:
            gathered = local.repeat(size)  # the result is not used
        else:
            gathered = local.new_empty(size * len(local))
            start = time.perf_counter()
            if not (local.is_cpu and isinstance(self._group, EngineGroup)):
                self._compare(call)
            try:
                self._group._allgather_base(gathered, local).wait()
            except MismatchError as error:
                raise self._explained(error) from None
            self.seconds += time.perf_counter() - start
        self._num_made += 1
        return gathered.view(size, -1), lengths

    def check_finished(self) -> None:
        """Check that no rank is still in a call. Collective, blocks."""
        if isinstance(self._group, EngineGroup):
            try:
                self._group.gather_bytes(bytes(self._end))
            except MismatchError as error:
                raise self._explained(error) from None
        else:
            self._compare(self._end)

    def _compare(self, call: int) -> None:
        calls = [int.from_bytes(row, "little") for row in gather_bytes(self._group, call.to_bytes(4, "little"))]
        for rank, other in enumerate(calls):
            if other != calls[0]:
                raise self._mismatch([(0, calls[0]), (rank, other)])

    def _explained(self, error: MismatchError) -> MismatchError:
        """Return an error that names modules in place of the engine's error about lengths."""
        # Only this class gathers floats in this group, and bytes in this number.
        found = re.findall(r"rank (\d+) calls all_gather\((\d+) (float\d\d|uint8)\)", str(error))
        calls = [
            (int(rank), int(length) % self._modulus)
            for rank, length, dtype in found
            if dtype != "uint8" or int(length) == self._end
        ]
        return self._mismatch(calls) if len(calls) == 2 else error  # else a rank is in a call of the trainer

    def _mismatch(self, calls: list[tuple[int, int]]) -> MismatchError:
        """Return the error for ranks that are in different calls.

        Args:
            calls: Pairs of rank and number of its call.
        """
        places = ", ".join(f"rank {rank} is {self._place(call)}" for rank, call in calls)
        return MismatchError(
            f"ranks call different BatchNorm modules: {places}. BatchNorm puts the statistics of all ranks "
            f"together, so every rank must call the same modules in the same order. If a random number decides which "
            f"layers run, draw it inside `with distributed_trainer.common_random():`. If an exception has ended "
            f"forward on a rank, see there. No weight was changed."
        )

    def _place(self, call: int) -> str:
        if call == self._end:
            return "past its last one in this step"
        module, kind = divmod(call, len(_Kind))
        return f"in the {_Kind(kind).name.lower().replace('_', ' ')} of {self._names[module]!r}"


class _Call(NamedTuple):
    """One call of a module."""

    exchange: _Exchange
    module: int
    is_dummy: bool

    def gather(self, kind: _Kind, *values: Tensor) -> tuple[Tensor, list[int]]:
        """Return the result of `_Exchange.gather`. Collective."""
        return self.exchange.gather(self.module * len(_Kind) + kind, *values)


def set_class(module: nn.Module, to: type) -> None:
    """Set the class of a module, also where a compiled model checks it. Local."""
    # nn.Module.__setattr__ would take ten times as long.
    object.__setattr__(module, "__class__", to)
    # In torch 2.10 and 2.11 the guards of torch.compile check the class again only if the attributes have changed.
    attributes = vars(module)
    attributes["_class_was_set"] = None
    del attributes["_class_was_set"]


class _GlobalStatistics(TorchFunctionMode):
    """Replace training-mode F.batch_norm while entered, in this thread: during one module's forward."""

    def __init__(self, exchange: _Exchange) -> None:
        super().__init__()
        self._exchange = exchange
        self.is_dummy = False
        self.has_counted = False  # whether samples have counted in statistics
        self.module = 0  # number of the module whose forward runs
        self.calls = 0  # calls of F.batch_norm in it

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return self._batch_norm(*args, **kwargs) if func is F.batch_norm else func(*args, **kwargs)

    def _batch_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        self.calls += 1
        if not training:
            return F.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
        self.has_counted |= len(input) > 0 and not self.is_dummy
        if self._exchange.is_repeated:
            running_mean = running_var = None
        output: Tensor = _BatchNorm.apply(  # type: ignore[no-untyped-call]  # torch has no types for it
            *(input, weight, bias, running_mean, running_var, momentum, eps),
            _Call(self._exchange, self.module, self.is_dummy),
        )
        return output


class _BatchNorm(torch.autograd.Function):
    """Formulas at the head of this file. Forward is collective; backward is, if the input needs a gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
        call: _Call,
    ) -> Tensor:
        count = 0 if call.is_dummy else input.numel() // input.size(1)
        gathered, lengths = call.gather(_Kind.FORWARD, *_local_statistics(input, count))
        means, variances, counts, _ = gathered.split_with_sizes(lengths, 1)
        total = counts.sum(0)
        # A rank that has two values need not read `total`: reading a device's tensor would wait for the device.
        if count < 2 and total[0] == 1:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {input.size()}")
        fractions = counts.div_(total)
        mean = (fractions * means).sum(0)
        offsets = means.sub_(mean)
        var = (fractions * torch.addcmul(variances, offsets, offsets)).sum(0)
        if running_mean is not None:
            assert running_var is not None
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((var * total / (total - 1)).to(running_var.dtype), momentum)
        ctx.save_for_backward(input, weight, mean, var, total)
        ctx.eps, ctx.call = eps, call
        return F.batch_norm(input, mean, var, _cast(weight, mean), _cast(bias, mean), training=False, eps=eps)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, mean, var, total = ctx.saved_tensors
        scale = torch.ones_like(mean) if weight is None else weight.to(mean.dtype)
        need_input, need_weight, need_bias = ctx.needs_input_grad[:3]
        # With create_graph=True autograd records what backward does.
        compute = _differentiable_gradients if torch.is_grad_enabled() else _gradients
        grad_input, sum_dy_xhat, sum_dy = compute(
            grad_output, input, scale, (mean, var, total), ctx.eps, ctx.call, need_input
        )
        grad_weight = sum_dy_xhat.to(weight.dtype) if need_weight else None
        grad_bias = sum_dy.to(weight.dtype) if need_bias else None
        return grad_input, grad_weight, grad_bias, None, None, None, None, None


_Gradients = tuple[Tensor | None, Tensor, Tensor]  # dx, this rank's sums of dy xhat and of dy


def _gradients(
    dy: Tensor,
    input: Tensor,
    scale: Tensor,
    statistics: tuple[Tensor, Tensor, Tensor],
    eps: float,
    call: _Call,
    need_input: bool,
) -> _Gradients:
    """Compute the gradients by torch's kernel. Collective if `need_input`.

    Args:
        dy: Gradient of the output.
        input: Input of forward.
        scale: The weight, or ones.
        statistics: Mean, biased variance and number of values of the global batch.
        eps: As in forward.
        call: The call of forward.
        need_input: Whether to compute dx.
    """
    mean, var, total = statistics
    inverse_std = (var + eps).rsqrt_()
    if input.numel():
        # With train=False this returns dx for constant statistics, and both sums. (CPU kernels read `mean` and
        # `var`; CUDA kernels for channels-last read the pair `mean, inverse_std` after them.)
        grad_input, sum_dy_xhat, sum_dy = torch.ops.aten.native_batch_norm_backward(
            *(dy, input, scale, mean, var, mean, inverse_std, False, eps, [need_input, True, True])
        )
    else:  # native_batch_norm_backward would divide by zero and end the process
        grad_input, sum_dy_xhat, sum_dy = torch.zeros_like(input), mean * 0, mean * 0
    if need_input:
        sums = _sum_over_ranks(call, _Kind.BACKWARD, (sum_dy, sum_dy_xhat))
        # xhat = (x - mean) * inverse_std, so -slope * x - offset is missing from dx.
        factor = scale.mul(inverse_std).div_(total)
        mean_dy, mean_dy_xhat = (total_sum.mul_(factor) for total_sum in sums)
        slope = mean_dy_xhat.mul_(inverse_std)
        offset = mean_dy.addcmul_(slope, mean, value=-1)
        channels = _channels(input)
        grad_input.addcmul_(input, slope.view(channels), value=-1).sub_(offset.view(channels))
    return grad_input, sum_dy_xhat, sum_dy


def _differentiable_gradients(
    dy: Tensor,
    input: Tensor,
    scale: Tensor,
    statistics: tuple[Tensor, Tensor, Tensor],
    eps: float,
    call: _Call,
    need_input: bool,
) -> _Gradients:
    """Compute what `_gradients` does, in operations that autograd differentiates. Collective if `need_input`."""
    x, dy = input.to(scale.dtype), dy.to(scale.dtype)
    channels, others = _channels(input), [dim for dim in range(input.dim()) if dim != 1]
    mean, var = _Moments.apply(x, *statistics, call)  # type: ignore[no-untyped-call]  # torch has no types for it
    inverse_std = (var + eps).rsqrt()
    xhat = (x - mean.view(channels)) * inverse_std.view(channels)
    sum_dy, sum_dy_xhat = dy.sum(others), (dy * xhat).sum(others)
    if not need_input:
        return None, sum_dy_xhat, sum_dy
    sums = _SumOverRanks.apply(call, _Kind.BACKWARD, sum_dy, sum_dy_xhat)  # type: ignore[no-untyped-call]
    mean_dy, mean_dy_xhat = (total_sum / statistics[2] for total_sum in sums)
    centred = dy - mean_dy.view(channels) - xhat * mean_dy_xhat.view(channels)
    return ((scale * inverse_std).view(channels) * centred).to(input.dtype), sum_dy_xhat, sum_dy


class _Moments(torch.autograd.Function):
    """Mean and variance of the global batch, known from forward, as functions of this rank's input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, var: Tensor, total: Tensor, call: _Call) -> tuple[Tensor, Tensor]:
        mean, var = mean.clone(), var.clone()
        ctx.save_for_backward(x, mean, total)
        ctx.call = call
        return mean, var

    @staticmethod
    def backward(ctx: Any, grad_mean: Tensor, grad_var: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, total = ctx.saved_tensors
        sums = _SumOverRanks.apply(ctx.call, _Kind.DOUBLE_BACKWARD, grad_mean, grad_var)  # type: ignore[no-untyped-call]
        grad_mean, grad_var = (total_sum / total for total_sum in sums)
        channels = _channels(x)
        return grad_mean.view(channels) + 2 * grad_var.view(channels) * (x - mean.view(channels)), *(None,) * 4


class _SumOverRanks(torch.autograd.Function):
    """Sums of tensors over the ranks. The derivative is also a sum: each rank's result depends on all ranks."""

    @staticmethod
    def forward(ctx: Any, call: _Call, kind: _Kind, *local: Tensor) -> tuple[Tensor, ...]:
        ctx.call = call
        return _sum_over_ranks(call, kind, local)

    @staticmethod
    def backward(ctx: Any, *grad_sums: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *_SumOverRanks.apply(ctx.call, _Kind.DOUBLE_BACKWARD, *grad_sums)  # type: ignore[no-untyped-call]


def _sum_over_ranks(call: _Call, kind: _Kind, local: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return the sum of each of the ranks' tensors; a dummy counts for nothing. Collective."""
    if call.is_dummy:  # not multiplied by 0, since 0 x NaN is NaN
        local = tuple(map(torch.zeros_like, local))
    gathered, lengths = call.gather(kind, *local)
    return gathered.sum(0).split_with_sizes(lengths)[:-1]


def _local_statistics(input: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean and biased variance per channel, and the count; in float32 for 16-bit inputs."""
    dtype = torch.promote_types(input.dtype, torch.float32)
    if count == 0:
        mean = var = input.new_zeros(input.size(1), dtype=dtype)
    else:
        # This is the kernel behind F.batch_norm, here four times as fast as torch.var_mean. Its results have the dtype
        # of the running statistics, if given; momentum 0 does not change the running statistics.
        running = None if dtype == input.dtype else input.new_zeros(input.size(1), dtype=dtype)
        mean, var = torch.batch_norm_update_stats(input, running, running, 0.0)
    return mean, var, mean.new_full((1,), count)


def _channels(input: Tensor) -> tuple[int, ...]:
    """Return the shape of a tensor with one value per channel that is broadcast against the input."""
    return 1, -1, *(1,) * (input.dim() - 2)


def _cast(parameter: Tensor | None, like: Tensor) -> Tensor | None:
    return None if parameter is None else parameter.to(like.dtype)
