# SPDX-License-Identifier: Apache-2.0
"""Modules, parameters and buffers of a model as they were at one moment, to notice that a script has changed them.

Scripts replace parameters (`load_state_dict(assign=True)`, `model[1] = nn.Linear(...)`), add and remove modules, freeze
parameters, and move them to other memory (`model.double()`, `parameter.data = ...`). Nothing reports that. So each step
compares the model with the last structure: `differs` makes a few passes over flat lists, without Python code for each
parameter.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ..backend.gather import gather_objects
from ..errors import MismatchError
from .divergence import sum_of_bits
from .model_state import Buffers, agree, broadcast, compare_models

_requires_grad = operator.attrgetter("requires_grad")
_num_bytes = operator.attrgetter("nbytes")


class ModelStructure:
    """Structure of a model at the moment when this object is made.

    It holds the modules and parameters, so that no other object can get the identity of one that was removed.

    Args:
        model: The user's model.

    Attributes:
        named_parameters: Names and parameters; shared ones once.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        modules = list(model.modules())
        entries: list[Any] = [own for module in modules for own in (module._modules, module._parameters)]
        entries = [own for own in entries if isinstance(own, dict)]  # scripted modules have others, and never change
        self._filled = [own for own in entries if own]
        self._empty = [own for own in entries if not own]
        self._buffers = [module._buffers for module in modules]
        self._num_buffers = list(map(len, self._buffers))
        self._entries = list(itertools.chain.from_iterable(map(dict.values, self._filled)))
        self._buffer_places = {(module, name) for module in modules for name in module._buffers.keys()}
        self.named_parameters = list(model.named_parameters())
        self._parameters = [parameter for _, parameter in self.named_parameters]
        self._trained = list(map(_requires_grad, self._parameters))
        self._forms = {id(parameter): _form(parameter) for parameter in self._parameters}
        self._remember_memory()

    def is_new(self, parameter: Tensor) -> bool:
        """Return whether a parameter was not there, or had another shape. Local."""
        return id(parameter) not in self._forms or parameter.shape != self._forms[id(parameter)][0]

    @property
    def ids(self) -> set[int]:
        """Ids of the parameters."""
        return set(self._forms)

    def differs(self) -> bool:
        """Return whether the model differs from the structure. Local, fast: called in each step.

        New values make no difference, nor does other memory with a tensor of the same form.
        """
        parameters = self._parameters
        if self.has_other_modules() or list(map(_requires_grad, parameters)) != self._trained:
            return True
        is_in_place = list(map(Tensor.data_ptr, parameters)) == self._addresses
        if is_in_place and list(map(_num_bytes, parameters)) == self._sizes:
            return False
        if any(self._forms[id(parameter)] != _form(parameter) for parameter in parameters):
            return True
        self._remember_memory()
        return False

    def has_other_modules(self) -> bool:
        """Return whether modules, parameters or buffers were added, removed or replaced. Local, fast."""
        entries = itertools.chain.from_iterable(map(dict.values, self._filled))
        return (
            any(self._empty)
            or sum(map(len, self._filled)) != len(self._entries)
            or not all(map(operator.is_, entries, self._entries))
            or list(map(len, self._buffers)) != self._num_buffers
        )

    def new_buffers(self) -> Iterator[tuple[str, Tensor]]:
        """Yield names and tensors of the model's present buffers that were not there. Local."""
        for prefix, module in self._model.named_modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and (module, name) not in self._buffer_places:
                    yield f"{prefix}.{name}" if prefix else name, buffer

    def _remember_memory(self) -> None:
        self._addresses = list(map(Tensor.data_ptr, self._parameters))
        self._sizes = list(map(_num_bytes, self._parameters))


def follow(model: nn.Module, earlier: ModelStructure, group: Any, aligns: bool) -> ModelStructure:
    """Compare the ranks' models after a change, and give what is new rank 0's values. Collective, blocks.

    Args:
        model: The user's model.
        earlier: Structure before the change.
        group: Process group of the ranks.
        aligns: Set new parameters and buffers to rank 0's values. False after forward, which has used their values:
            compare those of new parameters.

    Returns:
        The new structure.

    Raises:
        ValueError: A parameter has no shape yet. The same on every rank.
        MismatchError: The ranks' models differ; or new parameters do, and are not aligned. The same on every rank.
    """
    parameters, buffers = list(model.named_parameters()), list(earlier.new_buffers())
    new = [(name, parameter) for name, parameter in parameters if earlier.is_new(parameter)]
    compare_models([*parameters, *buffers], group, {name for name, _ in new})
    for name, parameter in new:
        if nn.parameter.is_lazy(parameter):
            raise ValueError(f"{name} is new and has no shape yet: call the model once before the next step.")
    if aligns:
        for _, parameter in new:
            broadcast(group, parameter.detach(), 0)
        if buffers:
            all_buffers, names = Buffers(model), {name for name, _ in buffers}
            kinds = agree(group, all_buffers)
            chosen = ([index for index in kind if all_buffers.names[index] in names] for kind in kinds)
            all_buffers.copy_from(0, group, *chosen)
    elif group.size() > 1:
        _compare_values(new, group)
    return ModelStructure(model)


def _compare_values(parameters: list[tuple[str, nn.Parameter]], group: Any) -> None:
    """Raise MismatchError, the same on every rank, if parameters do not have the same bits. Collective, blocks."""
    rows = gather_objects(group, [int(sum_of_bits(parameter.detach())) for _, parameter in parameters])
    for rank, row in enumerate(rows):
        for (name, _), value, first in zip(parameters, row, rows[0], strict=True):
            if value != first:
                raise MismatchError(
                    f"{name} is new, and does not have the same values on rank 0 and rank {rank}. Call the model "
                    f"inside `with trainer.forward():`, which gives all ranks rank 0's values, or set the same values."
                )


def _form(parameter: Tensor) -> tuple[Any, ...]:
    """Return what the place of a parameter's gradient depends on; first the shape. Local."""
    return parameter.shape, parameter.dtype, parameter.device, parameter.stride()
