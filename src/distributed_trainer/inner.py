# SPDX-License-Identifier: Apache-2.0
"""`shmpi` for two types of device: a process group of torch, such as NCCL, for the accelerator's tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .backend import ProcessGroupShmpi


class ProcessGroupShmpiWithInner(ProcessGroupShmpi):
    """Hands tensors of one type of device to a process group of torch, NCCL for CUDA; the rest goes over the engine.

    A process group that is a Python class replaces torch's whole group, so it must serve all devices itself.

    Args:
        inner_device: The type of device.
        make_inner: Makes the inner group, when the first such tensor comes. Collective.
        options: Those of `ProcessGroupShmpi`.
    """

    def __init__(
        self, group: Any, operations: Any, inner_device: str, make_inner: Callable[[], Any], **options: Any
    ) -> None:
        super().__init__(group, operations, **options)
        self._inner_device = inner_device
        self._make_inner = make_inner
        self._inner: Any = None
        self._device_types = (torch.device("cpu"), torch.device(inner_device))

    def _inner_for(self, arguments: Any) -> Any:
        """The inner group if the first tensor in the arguments is for it."""
        while isinstance(arguments, (tuple, list)) and arguments:
            arguments = arguments[0]
        is_inner = isinstance(arguments, (Tensor, torch.device)) and _device_type(arguments) == self._inner_device
        if is_inner and self._inner is None:
            self._inner = self._make_inner()
        return self._inner if is_inner else None


def _handing_on(name: str) -> Callable[..., Any]:
    own = getattr(ProcessGroupShmpi, name)

    @functools.wraps(own)
    def call(self: ProcessGroupShmpiWithInner, *arguments: Any, **keywords: Any) -> Any:
        inner = self._inner_for(arguments)
        return own(self, *arguments, **keywords) if inner is None else getattr(inner, name)(*arguments, **keywords)

    return call


for _name in """allreduce allreduce_coalesced reduce broadcast all_gather_single _allgather_base allgather
        allgather_coalesced all_gather_single_coalesced allgather_into_tensor_coalesced gather scatter reduce_scatter
        reduce_scatter_single _reduce_scatter_base reduce_scatter_single_coalesced reduce_scatter_tensor_coalesced
        alltoall all_to_all_single alltoall_base send recv recv_anysource _start_coalescing _end_coalescing""".split():
    setattr(ProcessGroupShmpiWithInner, _name, _handing_on(_name))


def _device_type(holder: Tensor | torch.device) -> str:
    return holder.device.type if isinstance(holder, Tensor) else holder.type
