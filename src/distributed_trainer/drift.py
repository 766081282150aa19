# SPDX-License-Identifier: Apache-2.0
"""Finds replicas that have drifted apart: code that changed the weights of some ranks only, or memory that lies.

All ranks apply the same gradients to the same weights, so these keep the same bits, and a sum of them tells. Ranks of
different processors or numbers of threads may round differently; then norms are compared, within a tolerance.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from .backend import gather_objects
from .errors import MismatchError
from .reproducible import instruction_sets

EVERY_STEPS = 100  # reading all weights takes a tenth of a step or so
TOLERANCE = 1e-2  # of a norm


class DriftCheck:
    """Compares the parameters of all ranks from time to time. Making it is collective, blocks.

    Args:
        model: The same on every rank.
        group: The ranks.
        device: Where this rank computes.
    """

    def __init__(self, model: nn.Module, group: Any, device: torch.device) -> None:
        self._model, self._group = model, group
        module = None if device.type == "cpu" else torch.get_device_module(device)
        kind = module.get_device_name(device) if hasattr(module, "get_device_name") else instruction_sets()
        self._is_exact = len(set(gather_objects(group, (device.type, kind, torch.get_num_threads())))) == 1

    def check(self, num_steps: int) -> None:
        """To be called after each step, with their number. Collective in every `EVERY_STEPS`th, and blocks then.

        Raises:
            MismatchError: Some ranks' weights are others. The same on every rank.
        """
        if num_steps % EVERY_STEPS or self._group.size() == 1:
            return
        named = list(self._model.named_parameters())
        describe = _sum_of_bits if self._is_exact else _norm
        values = torch.stack([describe(parameter.detach()).cpu() for _, parameter in named]).tolist() if named else []
        rows = gather_objects(self._group, values)
        drifted = [index for index, column in enumerate(zip(*rows, strict=True)) if not self._are_alike(column)]
        if drifted:
            name, column = named[drifted[0]][0], [row[drifted[0]] for row in rows]
            usual = Counter(column).most_common(1)[0][0]
            others = [str(rank) for rank, value in enumerate(column) if not self._are_alike((value, usual))]
            raise MismatchError(
                f"weights have drifted apart: after step {num_steps} {len(drifted)} of {len(named)} parameters are not "
                f"the same on all ranks. {name} is another on rank(s) {', '.join(others)} than on rank "
                f"{column.index(usual)}. Something has changed it on some ranks only, such as code under `if rank == "
                f"0:`. Do it on every rank, or begin again from a checkpoint."
            )

    def _are_alike(self, values: tuple[Any, ...]) -> bool:
        if self._is_exact:
            return len(set(values)) == 1
        return all(abs(value - values[0]) <= TOLERANCE * abs(values[0]) or value != value for value in values)


def _sum_of_bits(tensor: Tensor) -> Tensor:
    """Of all 8-byte words, modulo 2^64: as fast as memory is read."""
    data = tensor.contiguous().reshape(-1).view(torch.uint8)
    if data.storage_offset() % 8:
        data = data.clone()
    num_whole = len(data) // 8 * 8
    return data[:num_whole].view(torch.int64).sum() + data[num_whole:].sum()


def _norm(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor if tensor.is_complex() else tensor.float()).double()
