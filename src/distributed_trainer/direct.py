# SPDX-License-Identifier: Apache-2.0
"""Weight gradients of linear layers, computed straight into their places in the buckets.

Autograd gives a weight's gradient in memory of its own, from where a hook copies it to its bucket. For y = x W^T the
gradient is dW = dy^T x, and the matrix product can write that to its place in the bucket itself, as Megatron-LM does on
GPUs. Large weights of linear layers are most of many models, and the copy is what an exchange costs in their steps.

The bits are autograd's: the same products of the same operands. Where that is not sure the gradient takes the way
through autograd: weights that several modules have or that are used several times in a step, hooks on a weight,
autocast, double backward, what a criterion asks of torch.autograd.grad, functorch's transforms, torch.compile,
subclasses of nn.Linear and instances whose forward was replaced. So it does on other devices than the CPU, where it was
not measured, and everywhere with DTRAIN_DIRECT_GRADIENTS=off.
"""

from __future__ import annotations

import os
from collections import Counter
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


class DirectLinear:
    """Has the linear layers of a model compute their weight gradients in place, inside `active()` only.

    For that time each layer's class is a subclass of nn.Linear, as with `GlobalBatchNorm`.

    Args:
        model: Its layers are looked up now; those added later take the way through autograd.
        gradients: Of the model's parameters.
    """

    def __init__(self, model: nn.Module, gradients: GradientSum) -> None:
        self._layers: list[nn.Linear] = []
        modules = list(model.modules())
        if os.environ.get("DTRAIN_DIRECT_GRADIENTS") == "off":
            return
        if any(type(m).__name__ == "OptimizedModule" or m._compiled_call_impl is not None for m in modules):
            return  # told by the name, since importing the class would load the compiler
        owners = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
        for module in modules:
            if type(module) is not nn.Linear or "forward" in vars(module) or owners[id(module.weight)] > 1:
                continue
            weight = module.weight
            if weight.is_cpu and weight.is_contiguous() and weight.numel() * weight.element_size() >= MIN_BYTES:
                self._layers.append(module)
        self._weights = {id(layer): _Weight(layer.weight, gradients) for layer in self._layers}
        self._class = type("Linear", (nn.Linear,), {"forward": self._forward(), "__module__": nn.Linear.__module__})

    @contextmanager
    def active(self) -> Iterator[None]:
        """Gradients are computed in place until the end of the block, which holds forward and backward. Local."""
        layers = [layer for layer in self._layers if type(layer) is nn.Linear]
        try:
            for layer in layers:
                self._weights[id(layer)].num_uses = 0
                object.__setattr__(layer, "__class__", self._class)  # past nn.Module's, which is slow
            yield
        finally:
            for layer in layers:
                object.__setattr__(layer, "__class__", nn.Linear)

    def _forward(self) -> Any:
        weights = self._weights

        def forward(layer: nn.Linear, input: Tensor) -> Tensor:
            weight = weights[id(layer)]
            if (
                torch.compiler.is_compiling()
                or not torch.is_grad_enabled()
                or weight.parameter is not layer.weight
                or torch.is_autocast_enabled("cpu")
                or torch._C._are_functorch_transforms_active()
                or forward_ad._current_level >= 0
            ):
                return F.linear(input, layer.weight, layer.bias)
            weight.num_uses += 1
            return _Linear.apply(input, layer.weight, layer.bias, weight)

        return forward


class _Weight:
    """A weight in a step."""

    def __init__(self, parameter: nn.Parameter, gradients: GradientSum) -> None:
        self.parameter = parameter
        self.num_uses = 0
        self.gradients = gradients

    def place(self) -> Tensor | None:
        """Where the gradient may be computed now, None if autograd must have it."""
        hooks = self.parameter._post_accumulate_grad_hooks
        if self.num_uses != 1 or torch.is_grad_enabled() or self.parameter._backward_hooks or len(hooks or ()) != 1:
            return None
        return self.gradients.place_of(self.parameter)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, target: _Weight) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.target = target
        return F.linear(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        need_input, need_weight, need_bias, _ = ctx.needs_input_grad
        rows = grad_output.reshape(-1, grad_output.size(-1))
        grad_weight = None
        if need_weight:
            columns, input_rows = rows.t(), input.reshape(-1, input.size(-1))
            if (place := ctx.target.place()) is None:
                grad_weight = columns.mm(input_rows)
            else:
                torch.mm(columns, input_rows, out=place)
                ctx.target.gradients.placed(weight)
        grad_input = rows.mm(weight).view_as(input) if need_input else None
        return grad_input, grad_weight, rows.sum(0) if need_bias else None, None
