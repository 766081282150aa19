# SPDX-License-Identifier: Apache-2.0
"""Functions of the user's that see gradients: `trainer.on_gradient`, which sees sums, and hooks, which see parts.

A hook on a parameter runs in backward, on the gradient of this rank's part of the batch. Tools that watch gradients may
do that, so rank 0 warns only. But clamp(sum) is not the sum of clamp(part): a hook that changes the gradient ends the
step on every rank before the optimizer runs. Hooks that run after a gradient is accumulated change weights or `.grad`
themselves, so no step begins with them.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

logger = logging.getLogger("distributed_trainer")

_INSTEAD = "Use trainer.on_gradient(parameter, function), which gets the sum over all ranks, and may replace it."


class GradientFunctions:
    """Functions of `trainer.on_gradient`, in the order of the calls. They outlive ranks."""

    def __init__(self) -> None:
        self._of: dict[int, tuple[nn.Parameter, OrderedDict[int, Callable[[Tensor], Tensor | None]]]] = {}

    def __bool__(self) -> bool:
        """Return whether there is any function."""
        return any(functions for _, functions in self._of.values())

    def add(self, parameter: nn.Parameter, function: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
        """Add a function of the parameter's gradient. Local.

        Returns:
            A handle whose `remove()` takes the function away.
        """
        _, functions = self._of.setdefault(id(parameter), (parameter, OrderedDict()))
        handle = RemovableHandle(functions)
        functions[handle.id] = function
        return handle

    @torch.no_grad()
    def apply(self) -> None:
        """Call each function with its parameter's `.grad`, and write what it returns there. Local.

        Raises:
            ValueError: A function returned something other than None or a tensor of the gradient's shape.
        """
        for parameter, functions in self._of.values():
            for function in list(functions.values()):
                gradient = parameter.grad
                if gradient is None:
                    break
                result = function(gradient)
                if result is None or result is gradient:
                    continue
                if not isinstance(result, Tensor) or result.shape != gradient.shape:
                    what = f"shape {list(result.shape)}" if isinstance(result, Tensor) else repr(result)
                    raise ValueError(
                        f"the function {_name_of(function)} of on_gradient must return None or a tensor of the "
                        f"gradient's shape {list(gradient.shape)}, not {what}"
                    )
                if gradient.is_sparse or result.is_sparse:
                    parameter.grad = result
                else:
                    gradient.copy_(result)


class _Observed:
    """A user's hook on a parameter, and whether it has changed a gradient since `has_changed` was cleared."""

    def __init__(self, hook: Callable[[Tensor], Any], parameter_name: str) -> None:
        self.hook, self.parameter_name, self.has_changed = hook, parameter_name, False

    def __call__(self, gradient: Tensor) -> Any:
        version = gradient._version
        result = self.hook(gradient)
        if (result is not None and result is not gradient) or gradient._version != version:
            self.has_changed = True
        return result


class ParameterHooks:
    """Watch the hooks that the user's code has put on the parameters of a model.

    Args:
        model: The model; its parameters are looked up whenever any hook was registered anywhere.
        is_loud: Whether this rank warns.
    """

    def __init__(self, model: nn.Module, is_loud: bool) -> None:
        self._model, self._is_loud = model, is_loud
        self._newest = -1
        self._observed: list[_Observed] = []
        self._refusal: str | None = None

    def look(self) -> str | None:
        """Find the hooks, before a step; return why the step must not begin, or None. Local.

        Parameters are read again only if a hook was registered since the last call, or if there were any.
        """
        newest = RemovableHandle.next_id  # torch counts all hooks, so that each has a number
        if newest != self._newest or self._observed or self._refusal:
            self._newest = newest
            self._observed, self._refusal = [], None
            for name, parameter in self._model.named_parameters():
                self._find(name, parameter)
        for observed in self._observed:
            observed.has_changed = False
        return self._refusal

    def expect_own(self) -> None:
        """Prepare for a hook of the trainer's, registered next: parameters are not read again for it. Local."""
        if self._newest == RemovableHandle.next_id:
            self._newest += 1

    def changed(self) -> str | None:
        """Return why the gradients of this step must not be used: a hook has changed one. None if none has. Local."""
        for observed in self._observed:
            if observed.has_changed:
                return (
                    f"the hook {_name_of(observed.hook)} on {observed.parameter_name} has changed the gradient of a "
                    f"part of the batch, and the sum over the parts is not what it gives for the whole batch. "
                    f"{_INSTEAD}"
                )
        return None

    def close(self) -> None:
        """Put the user's hooks back as they were. Local."""
        for parameter in self._model.parameters():
            hooks: dict[int, Any] = parameter._backward_hooks or {}
            for key, hook in hooks.items():
                if isinstance(hook, _Observed) and hook in self._observed:
                    hooks[key] = hook.hook

    def _find(self, name: str, parameter: nn.Parameter) -> None:
        hooks: dict[int, Any] = parameter._backward_hooks or {}
        for key, hook in list(hooks.items()):
            if not isinstance(hook, _Observed):
                hooks[key] = _Observed(hook, name)
                if self._is_loud:
                    logger.warning(
                        "the hook %s on %s sees the gradient of this rank's part of the batch, not the sum over all "
                        "ranks. It may read the gradient, but not change it. %s",
                        *(_name_of(hook), name, _INSTEAD),
                    )
                    self._is_loud = False
            self._observed.append(hooks[key])
        for hook in (parameter._post_accumulate_grad_hooks or {}).values():
            if self._refusal is None and not str(getattr(hook, "__module__", "")).startswith(f"{__package__}."):
                self._refusal = (
                    f"the hook {_name_of(hook)} runs after the gradient of {name} is accumulated, in backward, when "
                    f"`.grad` holds a part's gradient and the ranks have not added theirs. {_INSTEAD} An optimizer "
                    f"that steps in backward needs one rank."
                )


def _name_of(function: Any) -> str:
    return getattr(function, "__qualname__", type(function).__qualname__)
