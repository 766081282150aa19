# SPDX-License-Identifier: Apache-2.0
"""BatchNorm with the statistics of the global batch, on any device.

One process normalises a batch by the mean and variance of all its samples, so ranks that each normalise their
own part compute another function. Here every training-mode call of `torch.nn.functional.batch_norm` by a
BatchNorm module of the model takes the statistics of all ranks, and its backward the sums over all ranks.

Nomenclature, per channel: x the input, n_r the values on rank r (samples times positions), n = sum_r n_r,
f_r = n_r / n, xhat = (x - mean) / sqrt(var + eps), w the weight, dy the gradient of the output.

    forward, one all_gather of (mean_r, var_r, n_r):
        mean = sum_r f_r mean_r
        var  = sum_r f_r (var_r + (mean_r - mean)^2)        Chan, Golub, LeVeque 1979, for any number of parts
    backward, one all_gather of each rank's sums of dy and of dy xhat:
        dx   = w / sqrt(var + eps) (dy - sum(dy) / n - xhat sum(dy xhat) / n)
    The gradients of weight and bias are this rank's sums: the trainer adds gradients over the ranks.

Invariant: each rank computes the same bits from the same gathered numbers, so running statistics agree
without a broadcast. A rank that has no samples (a *ghost*: it runs a stand-in) gathers zeros.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

logger = logging.getLogger("distributed_trainer")


class GlobalBatchNorm:
    """Gives the BatchNorm modules of a model the statistics of the global batch, inside `active()` only.

    For that time each module's class is a subclass of its own class, so outside the model is the user's own:
    state_dict, pickle, deepcopy, evaluation. A compiled model is correct as well, since torch.compile guards
    on the classes of modules, but pays: its graph breaks at each BatchNorm, and what stands in one
    nn.Sequential with a BatchNorm runs eagerly.

    Not seen: calls of F.batch_norm outside of BatchNorm modules. A module whose forward does not call it
    while training is left alone, and named once in a warning by rank 0.

    Args:
        model: its modules are looked up now; BatchNorms added later stay local.
        process_group: used through `rank`, `size` and `_allgather_base` only. Ranks issue its collectives in
            the order of forward and of backward, from whatever thread runs these. Where gradient buckets go
            through the same group, their order relative to these must be the same on all ranks too.
    """

    def __init__(self, model: nn.Module, process_group: Any) -> None:
        self._mode = _GlobalStatistics(process_group)
        self._classes: dict[type, type] = {}
        self._modules: list[nn.Module] = []
        self._names: dict[nn.Module, str] = {}  # of modules not yet warned about
        for name, module in model.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                self._names[module] = name
                self._modules.append(module)
            elif isinstance(module, torch.jit.ScriptModule) and "BatchNorm" in module.original_name:
                self._warn(name, "is a scripted module")

    def __len__(self) -> int:
        """Return the number of BatchNorm modules found."""
        return len(self._modules)

    @property
    def waited_seconds(self) -> float:
        """What all calls so far have spent where ranks meet."""
        return self._mode.gather.seconds

    @contextmanager
    def active(self, ghost: bool = False, completes: bool = False) -> Iterator[None]:
        """Use global statistics until the end of the block. Every rank holds it around forward and backward.

        Backward belongs inside because activation checkpointing runs forward again there. Each rank must call
        the same modules in the same order, and go backward through the same ones.

        Args:
            ghost: this rank's input stands in for an empty part: it takes part in every collective and counts
                for nothing. The gradients it computes are meaningless.
            completes: the last block was left by an exception, in the middle of what all ranks do together.
                Running the same modules again, on whatever input, makes only those calls that it did not come to.

        Raises:
            ValueError: from the model, if the global batch has one value per channel; the same on all ranks.
        """
        self._mode.ghost = ghost
        self._mode.gather.start(completes)
        own_classes = [type(module) for module in self._modules]
        try:
            for module, own in zip(self._modules, own_classes, strict=True):
                _set_class(module, self._classes.get(own) or self._global_class(own))
            yield
        finally:
            for module, own in zip(self._modules, own_classes, strict=True):
                _set_class(module, own)

    def _global_class(self, own: type) -> type:
        """Make the subclass of `own` whose forward takes global statistics."""
        # SyncBatchNorm's own forward refuses the CPU and does not know ghosts.
        own_forward = nn.BatchNorm1d.forward if own.forward is nn.SyncBatchNorm.forward else own.forward

        def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            self._mode.calls = 0
            with self._mode:
                output = own_forward(module, *args, **kwargs)
            if module.training and not self._mode.calls:
                self._warn(self._names.pop(module, None), f"({own.__qualname__}) does not call F.batch_norm")
            return output

        # Dynamo cannot trace a bare process group. (The decorator imports it; but so does every optimizer.)
        members = {"forward": torch.compiler.disable(forward), "__module__": own.__module__}
        self._classes[own] = type(own.__name__, (own,), members)
        return self._classes[own]

    def _warn(self, name: str | None, reason: str) -> None:
        if name is not None and self._mode.group.rank() == 0:
            logger.warning("BatchNorm module %r %s: its statistics are those of each rank's part.", name, reason)


class _Gather:
    """Gathers the ranks' tensors, in a sequence of calls that is the same on all of them."""

    def __init__(self, process_group: Any) -> None:
        self._group = process_group
        self._num_made = self._num_skipped = 0
        self.seconds = 0.0  # in calls, so far

    def start(self, completes: bool) -> None:
        """Begins a sequence, or runs the last one again without the calls that this rank has made. Local."""
        self._num_skipped = self._num_made if completes else 0
        self._num_made = 0

    def __call__(self, local: Tensor) -> Tensor:
        """Return the ranks' tensors in rank order, stacked. Collective, but for calls that were made."""
        if self._num_made < self._num_skipped:
            gathered = local.repeat(self._group.size(), 1)  # nobody reads what comes of it
        else:
            gathered = local.new_empty(self._group.size() * local.size(0), local.size(1))
            start = time.perf_counter()
            self._group._allgather_base(gathered, local).wait()
            self.seconds += time.perf_counter() - start
        self._num_made += 1
        return gathered.view(self._group.size(), *local.shape)


def _set_class(module: nn.Module, to: type) -> None:
    # Past nn.Module's __setattr__, which takes ten times as long.
    object.__setattr__(module, "__class__", to)
    # torch.compile's guards of torch 2.10 and 2.11 look at the class again only if the attributes have changed.
    attributes = vars(module)
    attributes["_class_was_set"] = None
    del attributes["_class_was_set"]


class _GlobalStatistics(TorchFunctionMode):
    """Replaces training-mode F.batch_norm while entered, in this thread: during one module's forward."""

    def __init__(self, process_group: Any) -> None:
        super().__init__()
        self.group = process_group
        self.gather = _Gather(process_group)
        self.ghost = False
        self.calls = 0

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
        return _BatchNorm.apply(input, weight, bias, running_mean, running_var, momentum, eps, self.gather, self.ghost)


class _BatchNorm(torch.autograd.Function):
    """The formulas at the head of this file. Collective; in backward only if the input needs a gradient."""

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
        gather: _Gather,
        ghost: bool,
    ) -> Tensor:
        count = 0 if ghost else input.numel() // input.size(1)
        means, variances, counts = gather(_local_statistics(input, count)).unbind(1)
        total = counts.sum(0)
        # A rank that has two values knows the answer: reading a device's tensor would wait for the device.
        if count < 2 and total[0] == 1:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {input.size()}")
        fractions = counts.div_(total)
        mean = (fractions * means).sum(0)
        offsets = means.sub_(mean)
        var = fractions.mul_(torch.addcmul(variances, offsets, offsets)).sum(0)
        if running_mean is not None:
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((var * total / (total - 1)).to(running_var.dtype), momentum)
        ctx.save_for_backward(input, weight, mean, var, total)
        ctx.eps, ctx.gather, ctx.ghost = eps, gather, ghost
        return F.batch_norm(input, mean, var, _cast(weight, mean), _cast(bias, mean), training=False, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, mean, var, total = ctx.saved_tensors
        scale = torch.ones_like(mean) if weight is None else _cast(weight, mean)
        inverse_std = (var + ctx.eps).rsqrt_()
        need_input, need_weight, need_bias = ctx.needs_input_grad[:3]
        if input.numel():
            # train=False gives dx for constant statistics, and both sums. (Kernels for the CPU read mean and
            # var, those for CUDA in channels-last the pair after them.)
            grad_input, sum_dy_xhat, sum_dy = torch.ops.aten.native_batch_norm_backward(
                grad_output,
                input,
                scale,
                mean,
                var,
                mean,
                inverse_std,
                False,
                ctx.eps,
                [need_input, True, True],
            )
        else:  # that call would divide by zero and end the process
            grad_input, sum_dy_xhat, sum_dy = torch.zeros_like(input), mean * 0, mean * 0
        if need_input:
            sums = torch.stack((sum_dy, sum_dy_xhat))
            sums = ctx.gather(torch.zeros_like(sums) if ctx.ghost else sums).sum(0)
            # xhat = (x - mean) * inverse_std, so what is missing from dx is -slope * x - offset.
            mean_dy, mean_dy_xhat = sums.mul_(scale.mul(inverse_std).div_(total)).unbind()
            slope = mean_dy_xhat.mul_(inverse_std)
            offset = mean_dy.addcmul_(slope, mean, value=-1)
            channels = (1, -1) + (1,) * (input.dim() - 2)
            grad_input.addcmul_(input, slope.view(channels), value=-1).sub_(offset.view(channels))
        grad_weight = sum_dy_xhat.to(weight.dtype) if need_weight else None
        grad_bias = sum_dy.to(weight.dtype) if need_bias else None
        return grad_input, grad_weight, grad_bias, None, None, None, None, None, None


def _local_statistics(input: Tensor, count: int) -> Tensor:
    """Return mean, biased variance and count as rows over the channels; in float32 for 16-bit inputs."""
    dtype = torch.promote_types(input.dtype, torch.float32)
    if count == 0:
        return input.new_zeros(3, input.size(1), dtype=dtype)
    # The kernel behind F.batch_norm: here four times as fast as torch.var_mean. It answers in the dtype of
    # the running statistics, if given; momentum 0 leaves them as they are.
    running = None if dtype == input.dtype else input.new_zeros(input.size(1), dtype=dtype)
    mean, var = torch.batch_norm_update_stats(input, running, running, 0.0)
    return torch.stack((mean, var, torch.full_like(mean, count)))


def _cast(parameter: Tensor | None, like: Tensor) -> Tensor | None:
    return None if parameter is None else parameter.to(like.dtype)
