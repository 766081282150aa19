# SPDX-License-Identifier: Apache-2.0
"""Find replicas that have drifted apart, because code changed weights on some ranks only or memory is faulty.

All ranks apply the same gradients to the same weights, so the weights keep the same bits, and their checksums are
compared. So are those of buffers, which are made the same after each step. Ranks with different processors or numbers
of threads may round differently; then norms are compared, within a tolerance.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..backend.gather import gather_objects
from ..errors import MismatchError
from ..launch.devices import instruction_sets
from .model_state import bytes_of

EVERY_STEPS = 100  # reading all weights takes about a tenth of a step
TOLERANCE = 1e-2  # relative to the norm


class DivergenceCheck:
    """Compare the ranks' parameters and buffers: in steps 1 and 2, in every `EVERY_STEPS`-th step, and at the end.

    Making the object is collective, blocks.

    Args:
        model: Model that is the same on every rank.
        group: Process group of the ranks.
        device: Device on which this rank computes.
        buffers: Function that returns the buffers to compare, by name: those that this rank has not changed since they
            were made the same.
    """

    def __init__(
        self, model: nn.Module, group: Any, device: torch.device, buffers: Callable[[], dict[str, Tensor]]
    ) -> None:
        self._model, self._group, self._buffers = model, group, buffers
        module = None if device.type == "cpu" else torch.get_device_module(device)
        device_name = getattr(module, "get_device_name", None)
        kind = instruction_sets() if device_name is None else device_name(device)
        self._has_reported = False
        self._is_exact = len(set(gather_objects(group, (device.type, kind, torch.get_num_threads())))) == 1

    def check(self, step: int) -> None:
        """Compare the weights before a step changes them, if it is to be checked. Collective and blocks then.

        Args:
            step: Number of the step, from 1. Step 1 finds what was changed before training, step 2 an optimizer that
                differs between ranks.

        Raises:
            MismatchError: The weights of some ranks differ. The same on every rank.
        """
        if step <= 2 or not step % EVERY_STEPS:
            self._compare(
                self._group,
                f"weights have drifted apart before step {step}",
                "Something has changed it on some ranks only, such as code under `if rank == 0:`. Make the change on "
                "every rank, or start again from a checkpoint.",
            )

    def check_at_end(self, group: Any) -> None:
        """Compare the parameters when training is over. Collective over the group, blocks.

        Nothing is compared if a difference was reported before.

        Raises:
            MismatchError: The weights of some ranks differ. The same on every rank.
        """
        if not self._has_reported:
            self._compare(
                group,
                "weights have drifted apart at the end",
                "Something has changed it on some ranks only, such as code under `if rank == 0:`. Make the change on "
                "every rank, or after trainer.close().",
                has_buffers=False,  # they may be of a step that failed
            )

    def check_forward(self) -> None:
        """Compare the weights after forward has written to some, on any rank. Collective, blocks.

        Raises:
            MismatchError: The weights of some ranks differ. The same on every rank.
        """
        self._compare(
            self._group,
            "forward or backward has written to weights",
            "One process would compute what is written from the whole batch, each rank has computed it from its part. "
            "The optimizer has not stepped, but what was written stays. If a first batch initialises the weight, call "
            "the model with it before making the trainer. Otherwise write to the weight after the step, in the same "
            "way on every rank. (nn.Embedding(max_norm=...) works, F.embedding(max_norm=...) does not.)",
        )

    def _compare(self, group: Any, when: str, remedy: str, has_buffers: bool = True) -> None:
        if group.size() == 1:
            return
        named = {**dict(self._model.named_parameters()), **(self._buffers() if has_buffers else {})}
        describe = sum_of_bits if self._is_exact else _norm
        values = torch.stack([describe(tensor.detach()).cpu() for tensor in named.values()]).tolist() if named else []
        rows = gather_objects(group, dict(zip(named, values, strict=True)))
        names = [name for name in rows[0] if all(name in row for row in rows)]
        drifted = [name for name in names if not self._are_alike(tuple(row[name] for row in rows))]
        if drifted:
            name, column = drifted[0], [row[drifted[0]] for row in rows]
            usual = Counter(column).most_common(1)[0][0]
            others = [str(rank) for rank, value in enumerate(column) if not self._are_alike((value, usual))]
            self._has_reported = True
            what = " and buffers" if has_buffers else ""
            raise MismatchError(
                f"{when}: {len(drifted)} of {len(names)} parameters{what} are not the same on all ranks. {name} "
                f"on rank(s) {', '.join(others)} differs from {name} on rank {column.index(usual)}. {remedy}"
            )

    def _are_alike(self, values: tuple[Any, ...]) -> bool:
        if self._is_exact:
            return len(set(values)) == 1
        return all(abs(value - values[0]) <= TOLERANCE * abs(values[0]) or value != value for value in values)


def sum_of_bits(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor's 8-byte words, and of the bytes left over, modulo 2^64.

    It takes as long as reading the memory.
    """
    data = bytes_of(tensor)
    if data.storage_offset() % 8:
        data = data.clone()
    num_whole = len(data) // 8 * 8
    return data[:num_whole].view(torch.int64).sum() + data[num_whole:].sum()


def _norm(tensor: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(tensor if tensor.is_complex() else tensor.float())
    return norm.double()
