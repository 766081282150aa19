# SPDX-License-Identifier: Apache-2.0
"""Weight gradients of linear layers, computed straight into their places in the buckets.

Autograd gives a weight's gradient in memory of its own, from where a hook copies it to its bucket. For y = x W^T the
gradient is dW = dy^T x, and the matrix product can write that to its place in the bucket itself, as Megatron-LM does on
GPUs. Large weights of linear layers are most of many models, and the copy is what an exchange costs in their steps.

During steps torch.nn.functional.linear is therefore `linear` of this file. nn.Linear and nn.MultiheadAttention look it
up there in each call, and DeepSpeed replaces it likewise for ZeRO-3. Other ways do not reach as far: attention
multiplies its weights without calling a module, so changing modules misses them; and a TorchFunctionMode is given
multi_head_attention_forward as a whole, with no call of linear in it.

The bits are autograd's: the same products of the same operands. To autograd the gradient is one like any other, to
which it adds what comes from elsewhere, in its own order; a sum is then copied to the place. torch's own function is
called where equal bits are not sure, or somebody could see that the memory is not the gradient's own: hooks on a
weight, autocast, double backward, what a criterion asks of torch.autograd.grad, functorch, forward-mode AD,
torch.compile, torch.jit.trace, modes of torch functions, subclasses of tensors. So it is for weights on other devices
than the CPU, where it was not measured, and everywhere with DTRAIN_DIRECT_GRADIENTS=off.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from .gradients import GradientSum

# Below, calling Python in forward and backward takes longer than the copy.
MIN_BYTES = 256 << 10

_lock = threading.Lock()
# By id, the weights of the trainers that are in a step, and who has their places. Changed under the lock.
_active: dict[int, GradientSum] = {}
_torch_linear = torch._C._nn.linear


class DirectLinear:
    """Has the weight gradients of a model's linear layers computed in place, inside `active()` only.

    Args:
        model: Its weights are looked up now; those added later take the way through autograd.
        gradients: Of the model's parameters.
    """

    def __init__(self, model: nn.Module, gradients: GradientSum) -> None:
        is_off = os.environ.get("DTRAIN_DIRECT_GRADIENTS") == "off"
        self._weights = [] if is_off else [parameter for parameter in model.parameters() if _is_suitable(parameter)]
        self._gradients = gradients

    @contextmanager
    def active(self) -> Iterator[None]:
        """Gradients are computed in place until the end of the block, which holds forward and backward. Local."""
        with _lock:
            own = [id(weight) for weight in self._weights if id(weight) not in _active]
            _active.update(dict.fromkeys(own, self._gradients))
            _install_or_remove()
        try:
            yield
        finally:
            with _lock:
                for key in own:
                    del _active[key]
                _install_or_remove()


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """torch.nn.functional.linear, with the gradient of an active weight computed in its place."""
    if torch.jit.is_scripting():
        return _torch_linear(input, weight, bias)
    else:  # which torch.jit.script does not compile, as it does what follows a return
        # Asked first, since compilers may trace only what torch has by itself.
        gradients = None if torch.compiler.is_compiling() else _active.get(id(weight))
        if gradients is None or not _is_ordinary_call(input, weight, bias):
            return _torch_linear(input, weight, bias)
        if bias is not None and input.dim() > 2 and not input.is_contiguous():
            # As torch does it then; what it does with others is one operation, which rounds differently.
            return _Linear.apply(input, weight, None, gradients).add_(bias)
        return _Linear.apply(input, weight, bias, gradients)


def _install_or_remove() -> None:
    # What somebody else has put there stays: it may have a backward of its own, or call ours.
    if _active and F.linear is _torch_linear:
        F.linear = linear
    elif not _active and F.linear is linear:
        F.linear = _torch_linear


def _is_suitable(parameter: nn.Parameter) -> bool:
    return (
        type(parameter) is nn.Parameter
        and parameter.dim() == 2
        and parameter.is_floating_point()
        and parameter.is_cpu
        and parameter.is_contiguous()
        and parameter.numel() * parameter.element_size() >= MIN_BYTES
    )


def _is_ordinary_call(input: Any, weight: Tensor, bias: Any) -> bool:
    return (
        type(input) is Tensor
        and not torch.overrides.has_torch_function((input, weight, bias))  # true in a mode, which sees what follows
        and input.dim() > 1
        and input.layout is torch.strided
        and not input.is_nested
        and weight.requires_grad
        and torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._is_tracing()
        and forward_ad._current_level < 0
    )


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, gradients: GradientSum) -> Tensor:
        # The weight may change after forward where autograd does not need it.
        ctx.save_for_backward(input, weight if ctx.needs_input_grad[0] else None)
        ctx.set_materialize_grads(False)
        ctx.weight, ctx.gradients = weight, gradients
        return _torch_linear(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return None, None, None, None
        input, weight = ctx.saved_tensors
        rows, input_rows = grad_output.flatten(0, -2), input.flatten(0, -2)
        grad_input = None
        if ctx.needs_input_grad[0]:
            # Autograd's rule: what is column-major gets a column-major gradient, which may be rounded differently.
            is_column_major = input_rows.stride() == (1, input_rows.size(0))
            product = weight.t().mm(rows.t()).t() if is_column_major else rows.mm(weight)
            grad_input = product.view_as(input)
        grad_weight = torch.mm(rows.t(), input_rows, out=_place(ctx.weight, ctx.gradients))
        return grad_input, grad_weight, rows.sum(0) if ctx.needs_input_grad[2] else None, None


def _place(weight: nn.Parameter, gradients: GradientSum) -> Tensor | None:
    """Where the gradient may be computed now, None for memory of its own."""
    hooks = weight._post_accumulate_grad_hooks
    if torch.is_grad_enabled() or weight._backward_hooks or len(hooks or ()) != 1:
        return None
    return gradients.place_of(weight)
