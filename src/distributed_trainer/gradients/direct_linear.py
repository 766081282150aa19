# SPDX-License-Identifier: Apache-2.0
"""Weight gradients of linear layers, computed directly in their places in the buckets.

Autograd returns a weight's gradient in new memory, and a hook copies it to its bucket. For y = x W^T the gradient is
dW = dy^T x, and the matrix product can write it directly to its place in the bucket, as Megatron-LM does on GPUs. In
many models large weights of linear layers are most of the parameters, and the copy is most of what the exchange costs
in a step.

During steps torch.nn.functional.linear is therefore replaced by `linear` of this file. nn.Linear and
nn.MultiheadAttention look it up there in each call; DeepSpeed replaces the same function for ZeRO-3. Other methods
reach fewer weights: attention multiplies its weights without calling a module, so changed modules would miss them; and
a TorchFunctionMode receives multi_head_attention_forward as a whole, without the calls of linear in it.

The bits are the same as autograd's: the same products of the same operands. Autograd treats the gradient like any
other, and adds contributions from elsewhere in its usual order; such a sum is then copied to the place. torch's
function is called where equal bits are not certain, or where the user could observe that the memory is part of a
bucket: hooks on a weight, autocast, double backward, torch.autograd.grad called by a criterion, functorch, forward-mode
AD, torch.compile, torch.jit.trace, modes of torch functions, subclasses of tensors. It is also called for weights on
devices other than the CPU, where the gain was not measured, and always with DTRAIN_DIRECT_GRADIENTS=off.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._jit_internal import is_scripting
from torch.autograd import forward_ad

from .reducer import GradientReducer

# For smaller weights, calling Python in forward and backward takes longer than the copy.
MIN_BYTES = 256 << 10

_lock = threading.Lock()
# For each weight of the trainers that are in a step, by id: the reducer that has its place. Changed under the lock.
_active: dict[int, GradientReducer] = {}
_torch_linear = torch._C._nn.linear


class DirectLinear:
    """Compute the weight gradients of a model's linear layers in their places in the buckets, inside `active()` only.

    Args:
        model: Model whose weights are looked up now; gradients of weights added later are copied.
        gradients: Reducer of the model's gradients.
    """

    def __init__(self, model: nn.Module, gradients: GradientReducer) -> None:
        is_off = os.environ.get("DTRAIN_DIRECT_GRADIENTS") == "off"
        self._weights = [] if is_off else [parameter for parameter in model.parameters() if _is_suitable(parameter)]
        self._gradients = gradients

    @contextmanager
    def active(self) -> Iterator[None]:
        """Compute gradients in place until the end of the block. Forward and backward run inside it. Local."""
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
    """Compute torch.nn.functional.linear; the gradient of an active weight is computed in its place."""
    if is_scripting():
        return _torch_linear(input, weight, bias)
    else:  # torch.jit.script skips this branch, but would compile code after the `if`
        # Checked first, since compilers may trace only functions that torch has by itself.
        gradients = None if torch.compiler.is_compiling() else _active.get(id(weight))
        if gradients is None or not _is_ordinary_call(input, weight, bias):
            return _torch_linear(input, weight, bias)
        if bias is not None and input.dim() > 2 and not input.is_contiguous():
            # For such inputs torch adds the bias by itself. For others it uses one operation, which rounds differently.
            return _apply_linear(input, weight, None, gradients).add_(bias)
        return _apply_linear(input, weight, bias, gradients)


def _install_or_remove() -> None:
    # A function that other code has put there stays: it may have its own backward, or call `linear` of this file.
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
        and not torch.overrides.has_torch_function((input, weight, bias))  # true in a mode, which must see the call
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
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, gradients: GradientReducer) -> Tensor:
        # The weight is saved only if backward needs it: otherwise users may change it in place after forward.
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
            # As in autograd: a column-major input gets a column-major gradient, which may be rounded differently.
            is_column_major = input_rows.stride() == (1, input_rows.size(0))
            product = weight.t().mm(rows.t()).t() if is_column_major else rows.mm(weight)
            grad_input = product.view_as(input)
        grad_weight = torch.mm(rows.t(), input_rows, out=_place(ctx.weight, ctx.gradients))
        return grad_input, grad_weight, rows.sum(0) if ctx.needs_input_grad[2] else None, None


_apply_linear: Callable[..., Tensor] = _Linear.apply


def _place(weight: nn.Parameter, gradients: GradientReducer) -> Tensor | None:
    """Return the memory in which the gradient may be computed now; None if it needs new memory."""
    hooks = weight._post_accumulate_grad_hooks
    if torch.is_grad_enabled() or weight._backward_hooks or len(hooks or ()) != 1:
        return None
    return gradients.place_of(weight)
