# SPDX-License-Identifier: Apache-2.0
"""nn.Embedding and nn.EmbeddingBag with `max_norm`, which rescale the rows that are looked up, in forward.

One process rescales the rows of the whole batch. Here each rank rescales the rows that any rank looks up, before its
own look-up. A row's new values follow from its old ones, so weights stay the same on all ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..backend.gather import message_device
from .batchnorm import set_class


def max_norm_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that rescale rows of their weight in forward, by name. Local."""
    kinds = nn.Embedding, nn.EmbeddingBag
    return {n: module for n, module in model.named_modules() if isinstance(module, kinds) and module.max_norm}


class GlobalMaxNorm:
    """Make the embeddings of a model rescale the rows that any rank looks up, inside `active()` only.

    Args:
        model: Model whose modules are looked up now.
        group: Process group of the ranks, for calls in forward.
    """

    def __init__(self, model: nn.Module, group: Any) -> None:
        self._modules = list(max_norm_modules(model).values())
        self._group = group
        self._classes: dict[type, type] = {}
        self._is_dummy = False
        self._num_made = self._num_skipped = 0

    def __len__(self) -> int:
        """Return the number of modules found."""
        return len(self._modules)

    @contextmanager
    def active(self, is_dummy: bool = False, completes: bool = False) -> Iterator[None]:
        """Scale the rows of all ranks until the end of the block. Arguments are those of `GlobalBatchNorm.active`."""
        self._is_dummy = is_dummy
        self._num_skipped = max(self._num_made, self._num_skipped) if completes else 0
        self._num_made = 0
        own_classes = [type(module) for module in self._modules]
        try:
            for module, own in zip(self._modules, own_classes, strict=True):
                set_class(module, self._classes.get(own) or self._global_class(own))
            yield
        finally:
            for module, own in zip(self._modules, own_classes, strict=True):
                set_class(module, own)

    def _global_class(self, own: type[nn.Module]) -> type:
        """Make the subclass of `own` whose forward rescales the rows of all ranks."""

        def forward(module: Any, input: Tensor, *args: Any, **keywords: Any) -> Any:
            self._scale(module, input)
            max_norm, module.max_norm = module.max_norm, None
            try:
                return own.forward(module, input, *args, **keywords)
            finally:
                module.max_norm = max_norm

        hidden = torch.compiler.disable(forward)  # type: ignore[no-untyped-call]  # torch has no types for it
        self._classes[own] = type(own.__name__, (own,), {"forward": hidden, "__module__": own.__module__})
        return self._classes[own]

    def _scale(self, module: Any, input: Tensor) -> None:
        """Scale the rows that any rank looks up. Collective, except for calls that this rank has made before."""
        weight = module.weight.detach()
        is_used = torch.zeros(len(weight), dtype=torch.uint8, device=weight.device)
        if not self._is_dummy:
            is_used[input.reshape(-1)] = 1
        if self._num_made >= self._num_skipped:
            of_all = is_used.to(message_device(self._group))
            options = dist.AllreduceOptions()
            options.reduceOp = dist.ReduceOp(dist.ReduceOp.MAX)
            self._group.allreduce([of_all], options).wait()
            is_used = of_all.to(weight.device)
        self._num_made += 1
        # Without this function of torch the rows would be rounded differently.
        torch.embedding_renorm_(weight, is_used.nonzero().reshape(-1), module.max_norm, module.norm_type)
