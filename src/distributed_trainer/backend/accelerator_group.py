# SPDX-License-Identifier: Apache-2.0
"""`shmpi` for two types of device: a process group of torch, such as NCCL, handles the accelerator's tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .process_group import ProcessGroupShmpi

if TYPE_CHECKING:
    from .._engine import Group, ReduceOp


class ProcessGroupShmpiWithAccelerator(ProcessGroupShmpi):
    """Pass tensors of one type of device to a process group of torch (NCCL for CUDA), all others to the engine.

    A process group that is a Python class replaces torch's whole group, so it must serve all devices itself.

    Args:
        group: The engine's group.
        operations: The engine's `ReduceOp`.
        accelerator: The type of device, such as "cuda".
        make_accelerator_group: Function that makes torch's group; called at the first tensor on that type of device.
            Collective.
        options: The other arguments of `ProcessGroupShmpi`.
    """

    def __init__(
        self,
        group: Group,
        operations: type[ReduceOp],
        accelerator: str,
        make_accelerator_group: Callable[[], Any],
        **options: Any,
    ) -> None:
        super().__init__(group, operations, **options)
        self._accelerator = accelerator
        self._make_accelerator_group = make_accelerator_group
        self._accelerator_group: Any = None

    @property
    def _device_types(self) -> list[torch.device]:
        return [torch.device("cpu"), torch.device(self._accelerator)]

    def _accelerator_group_for(self, arguments: Any) -> Any:
        """Return the accelerator's group if the first tensor in the arguments is on the accelerator, else None."""
        while isinstance(arguments, (tuple, list)) and arguments:
            arguments = arguments[0]
        if not isinstance(arguments, (Tensor, torch.device)) or _device_type(arguments) != self._accelerator:
            return None
        if self._accelerator_group is None:
            self._accelerator_group = self._make_accelerator_group()
        return self._accelerator_group


def _delegating(name: str) -> Callable[..., Any]:
    """Return a method `name` that passes the accelerator's tensors to its group, others to `ProcessGroupShmpi`."""
    own = getattr(ProcessGroupShmpi, name)

    @functools.wraps(own)
    def call(self: ProcessGroupShmpiWithAccelerator, *arguments: Any, **keywords: Any) -> Any:
        other = self._accelerator_group_for(arguments)
        return own(self, *arguments, **keywords) if other is None else getattr(other, name)(*arguments, **keywords)

    return call


for _name in """allreduce allreduce_coalesced reduce broadcast all_gather_single _allgather_base allgather
        allgather_coalesced all_gather_single_coalesced allgather_into_tensor_coalesced gather scatter reduce_scatter
        reduce_scatter_single _reduce_scatter_base reduce_scatter_single_coalesced reduce_scatter_tensor_coalesced
        alltoall all_to_all_single alltoall_base send recv recv_anysource _start_coalescing _end_coalescing""".split():
    setattr(ProcessGroupShmpiWithAccelerator, _name, _delegating(_name))


def _device_type(holder: Tensor | torch.device) -> str:
    return holder.device.type if isinstance(holder, Tensor) else holder.type
