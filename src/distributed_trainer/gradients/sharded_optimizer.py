# SPDX-License-Identifier: Apache-2.0
"""Sharded optimizer, ZeRO stage 1 (Rajbhandari et al. 2020): each rank updates 1/N of every parameter.

Rank r's shard of a parameter is part r of the flat parameter, cut at cache lines (`shard_bounds`). So a rank's shards
depend on each parameter alone: each parameter has its own step count, and is skipped by itself when no rank used it.
All ranks of a node share one copy of the weights, in shared memory. One step:

1. Gradients are copied to their buckets as usual, but a bucket is reduced to shards: each rank gets the sum of its own
   shards.
2. Commit point: the sum of the losses is sent after the last bucket. It needs a number from every rank, and a rank
   sends its number when its backward is over and its shards are reduced. So a rank that has the sum may update its
   shards: no other rank reads weights any more, and no other rank still needs this rank's buckets. If gradients are to
   be checked, a rank waits for its sums before it sends its number, and also sends whether any of its sums is infinite
   or NaN.
3. The user's optimizer steps; its groups hold the shards.
4. `gather_shards` ends when all ranks have called it, each after updating its shards; between nodes it sends the
   shards. So a rank that returns from the step reads complete weights. They do not change until this rank takes part
   in the next step's commit point.
"""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..backend.engine_group import EngineGroup
from ..errors import MismatchError
from .buckets import LINE_BYTES, Bucket, view_like

# Optimizers that update an element from its own gradient and state alone, so that a part of a parameter can be updated
# by itself.
_ELEMENT_WISE = (
    *(torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad, torch.optim.RMSprop),
    *(torch.optim.Adadelta, torch.optim.Adamax, torch.optim.NAdam, torch.optim.RAdam, torch.optim.ASGD),
    torch.optim.Rprop,
)
# Entries of their state with one value for a whole parameter; all others have an element for each of the parameter's.
_SCALAR_STATES = {"step", "mu_product", "eta", "mu"}


def check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Raise ValueError for an optimizer that cannot update a part of a parameter by itself. Local."""
    if type(optimizer) not in _ELEMENT_WISE:
        names = ", ".join(kind.__name__ for kind in _ELEMENT_WISE)
        raise ValueError(
            f'shard="optimizer" does not work with {type(optimizer).__name__}: each rank updates a part of every '
            f"parameter, so the optimizer must treat each element by itself. Use one of torch.optim's {names}, or "
            f"leave shard out."
        )


def check_model(model: nn.Module, group: Any, device: torch.device) -> None:
    """Raise ValueError if the parameters cannot be moved into memory that ranks share. Local."""
    if not isinstance(group, EngineGroup):
        raise ValueError(
            f'shard="optimizer" needs a process group of the shmpi backend, which keeps one copy of the weights on '
            f"each machine; this one is {group.name()}. Leave group or shard out."
        )
    if device.type != "cpu":
        raise ValueError(
            f'shard="optimizer" needs the model on the CPU, where ranks share memory; it is on {device}. Leave shard '
            f"out."
        )
    # Two parameters in the same memory would be moved to different places, and no longer change together.
    places = sorted(
        (parameter.data_ptr(), parameter.numel() * parameter.element_size(), name)
        for name, parameter in model.named_parameters()
        if parameter.numel()
    )
    for (start, length, name), (next_start, _, next_name) in itertools.pairwise(places):
        if next_start < start + length:
            names = " and ".join(sorted((name, next_name)))
            raise ValueError(
                f'{names} are different parameters in the same memory. For shard="optimizer" make them one parameter '
                f"(module.weight = other.weight)."
            )


def shard_bounds(num_elements: int, element_bytes: int, rank: int, num_ranks: int) -> tuple[int, int]:
    """Return the first element of the rank's part, and one past its last. Local.

    Parts differ by at most a cache line, and some may be empty. The engine cuts in the same way
    (`engine/collectives/parts.hpp`).
    """
    num_bytes = num_elements * element_bytes
    num_lines = -(-num_bytes // LINE_BYTES)
    start, stop = (min(num_bytes, num_lines * part // num_ranks * LINE_BYTES) for part in (rank, rank + 1))
    return start // element_bytes, stop // element_bytes


@dataclass(frozen=True, eq=False)
class Part:
    """A rank's part of a tensor: consecutive elements, in the order in which they lie in memory."""

    own: Tensor
    """Elements of the part, 1-dimensional."""
    start: int
    """Number of the part's first element within the whole tensor."""
    like: Tensor
    """Tensor with the shape of the whole tensor, and the same order of elements in memory."""


@dataclass(frozen=True, eq=False)
class _Shard:
    """A parameter, and this rank's part of it."""

    name: str
    parameter: nn.Parameter
    address: int
    """Address of the parameter's place in the shared memory."""
    block: tuple[int, int]
    """Offset and length of that place in the shared memory, in bytes."""
    bounds: tuple[int, int]
    """First element of this rank's part, and one past its last."""
    own: nn.Parameter
    """This rank's part, 1-dimensional, which the optimizer updates."""

    def cut(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return this rank's part of an optimizer's state for the whole parameter."""
        return {key: self._cut(key, value) if _is_per_element(key, value) else value for key, value in state.items()}

    def _cut(self, key: str, value: Tensor) -> Tensor:
        if value.shape != self.parameter.shape:
            raise ValueError(
                f"the optimizer's state {key} of {self.name} has shape {list(value.shape)}, the parameter has "
                f"{list(self.parameter.shape)}. Load the state of an optimizer of the same model."
            )
        flat = torch.empty(value.numel(), dtype=value.dtype)
        view_like(self.parameter, flat).copy_(value)
        return flat[slice(*self.bounds)].clone()


class ShardedOptimizer:
    """Shards of a model's weights, and the optimizers that update them.

    Making the object is collective, blocks, and moves the parameters into memory that all ranks of a node share.

    Args:
        model: Model that is equal on all ranks, and that `check_model` has accepted.
        gradient_group: Group of the shmpi backend over which gradients are reduced.
        group: Another group of the same ranks, for calls outside of backward.
    """

    def __init__(self, model: nn.Module, gradient_group: Any, group: Any) -> None:
        self._gradient_group = gradient_group
        self._group = group
        self._attached: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self._is_stepping = False
        self._gives_parts = False
        self._is_closed = False
        named = list(model.named_parameters())
        lengths = [parameter.numel() * parameter.element_size() for _, parameter in named]
        offsets = [0, *itertools.accumulate(-(-length // LINE_BYTES) * LINE_BYTES for length in lengths)]
        self._memory = gradient_group.allocate_shared(max(1, offsets[-1]))
        # Through NumPy each parameter gets its own storage: torch.save writes whole storages.
        blocks = [
            torch.from_numpy(self._memory.numpy()[offset : offset + length])
            for offset, length in zip(offsets, lengths, strict=False)
        ]
        self._shards = []
        for (name, parameter), block, offset in zip(named, blocks, offsets, strict=False):
            flat = block.view(parameter.dtype)
            view = view_like(parameter, flat)
            view.copy_(parameter.detach())  # all ranks of the node write the same values
            parameter.data = view
            bounds = shard_bounds(flat.numel(), flat.element_size(), group.rank(), group.size())
            own = nn.Parameter(flat[slice(*bounds)], requires_grad=flat.is_floating_point())
            self._shards.append(_Shard(name, parameter, view.data_ptr(), (offset, block.numel()), bounds, own))
        self._by_id = {id(key): shard for shard in self._shards for key in (shard.parameter, shard.own)}
        self._parameters = [shard.parameter for shard in self._shards]
        self._addresses = [shard.address for shard in self._shards]

    def make_bucket(
        self, group: Any, indices: list[int], parameters: Sequence[nn.Parameter], check_finite: bool
    ) -> Bucket:
        """Make a bucket that is reduced to shards, and sets the shards' `.grad`. Collective, blocks."""
        shards = [self._by_id[id(parameter)] for parameter in parameters]
        return _ShardedBucket(shards, group, indices, parameters, check_finite)

    def parameter_of(self, parameter: Tensor) -> Tensor:
        """Return the model's parameter to which a shard belongs; any other tensor itself. Local."""
        shard = self._by_id.get(id(parameter))
        return parameter if shard is None else shard.parameter

    def check_places(self) -> None:
        """Raise ValueError if a parameter was moved out of the shared memory. Local, fast: called in each step."""
        if list(map(Tensor.data_ptr, self._parameters)) == self._addresses:
            return
        for shard in self._shards:
            if shard.parameter.data_ptr() != shard.address:
                raise ValueError(
                    f'{shard.name} was moved to other memory after the trainer was made with shard="optimizer", as '
                    f"model.to() and assigning to .data do. Change parameters in place, or before making the trainer."
                )

    def check_parameters(self, model: nn.Module) -> None:
        """Raise ValueError if the model has other parameters than at first. Local."""
        first = {shard.name: shard.parameter for shard in self._shards}
        present = dict(model.named_parameters())
        for name in {**present, **first}:
            if present.get(name) is not first.get(name):
                change = "removed" if name not in present else "replaced" if name in first else "added"
                raise ValueError(
                    f'{name} was {change} after the trainer was made with shard="optimizer", which keeps the '
                    f"parameters of that time in memory that ranks share. Keep optimizer.state_dict(), close the "
                    f"trainer, and make another trainer and another optimizer."
                )

    def step(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Update this rank's shards, and wait until the weights hold the shards of all ranks. Collective, blocks.

        Call it between the commit point of a step and the next forward.
        """
        self._attach(optimizers)
        self._is_stepping = True
        try:
            for optimizer in optimizers:
                optimizer.step()
        finally:
            self._is_stepping = False
        shards = itertools.chain.from_iterable(map(self._shards_of, optimizers))
        updated = [shard.block for shard in shards if shard and shard.own.grad is not None]
        self._gradient_group.gather_shards(self._memory, updated).wait()

    def clip(self, optimizers: Sequence[torch.optim.Optimizer], max_norm: float) -> Tensor:
        """Scale the shards' gradients so that their norm over all ranks is at most `max_norm`. Collective, blocks.

        Returns:
            The norm before scaling, 0-dimensional float32 or float64, the same on every rank.
        """
        self._attach(optimizers)
        found = itertools.chain.from_iterable(map(self._shards_of, optimizers))
        shards = [shard.own for shard in found if shard is not None]
        gradients = [own.grad for own in shards if own.grad is not None]
        own_norm = nn.utils.get_total_norm(gradients)
        square = own_norm.double().square().reshape(1)
        self._group.allreduce([square]).wait()
        norm = square.sqrt()[0].to(own_norm.dtype)
        nn.utils.clip_grads_with_norm_(shards, max_norm, norm)
        return norm

    @contextlib.contextmanager
    def parts(self) -> Iterator[None]:
        """Make an optimizer's `state_dict()` local in the block, with a `Part` in place of each sharded tensor."""
        self._gives_parts = True
        try:
            yield
        finally:
            self._gives_parts = False

    def close(self) -> None:
        """Move the parameters out of the shared memory. Local; the optimizers cannot be used afterwards."""
        self._is_closed = True
        for shard in self._shards:
            shard.own.grad = None
            if shard.parameter.data_ptr() == shard.address:
                shard.parameter.data = shard.parameter.detach().clone()

    def _attach(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Replace the model's parameters in optimizers by their shards, and cut their state in the same way. Local."""
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                for position, parameter in enumerate(group["params"]):
                    shard = self._by_id.get(id(parameter))
                    if shard is None or parameter is shard.own:
                        continue
                    group["params"][position] = shard.own
                    if parameter in optimizer.state:
                        optimizer.state[shard.own] = shard.cut(optimizer.state.pop(parameter))
            if optimizer not in self._attached:
                self._attached.add(optimizer)
                optimizer.register_step_pre_hook(self._before_step)
                optimizer.register_state_dict_post_hook(self._gather_state)
                optimizer.register_load_state_dict_pre_hook(self._cut_state)

    def _shards_of(self, optimizer: torch.optim.Optimizer) -> list[_Shard | None]:
        """Return the shards in the optimizer's order of parameters; None for a parameter that is not attached yet."""
        parameters = itertools.chain.from_iterable(group["params"] for group in optimizer.param_groups)
        shards = [(parameter, self._by_id.get(id(parameter))) for parameter in parameters]
        return [shard if shard and parameter is shard.own else None for parameter, shard in shards]

    def _before_step(self, _optimizer: torch.optim.Optimizer, _arguments: Any, _keywords: Any) -> None:
        if not self._is_stepping:
            raise ValueError(
                'optimizer.step() was called by itself. With shard="optimizer" the optimizer updates a part of each '
                "parameter on each rank, and the ranks must exchange these parts: call trainer.step(optimizer)."
            )

    def _gather_state(self, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return the state of whole parameters, as a hook of `optimizer.state_dict()`. Collective, blocks.

        Inside `parts` it is local, and returns a `Part` for each sharded tensor.
        """
        if self._gives_parts:
            return {**state_dict, "state": self._with_parts(optimizer, state_dict["state"])}
        if self._is_closed:
            raise ValueError(
                "the trainer was closed, so the optimizer's state can no longer be gathered from the other ranks. "
                "Call optimizer.state_dict() before trainer.close()."
            )
        state = dict(state_dict["state"])
        try:
            for index, shard in enumerate(self._shards_of(optimizer)):
                if shard is not None and index in state:
                    state[index] = {
                        key: self._gather(shard, value) if _is_per_element(key, value) else value
                        for key, value in state[index].items()
                    }
        except MismatchError as error:
            raise MismatchError(
                f'optimizer.state_dict() gathers the state from all ranks with shard="optimizer": call it on every '
                f"rank, at the same place of the program ({error})"
            ) from error
        return {**state_dict, "state": state}

    def _with_parts(self, optimizer: torch.optim.Optimizer, state: dict[int, Any]) -> dict[int, Any]:
        state = dict(state)
        for index, shard in enumerate(self._shards_of(optimizer)):
            if shard is not None and index in state:
                state[index] = {
                    key: Part(value, shard.bounds[0], shard.parameter) if _is_per_element(key, value) else value
                    for key, value in state[index].items()
                }
        return state

    def _gather(self, shard: _Shard, own: Tensor) -> Tensor:
        parameter, size = shard.parameter, self._group.size()
        bounds = [shard_bounds(parameter.numel(), parameter.element_size(), rank, size) for rank in range(size)]
        longest = max(stop - start for start, stop in bounds)
        padded, gathered = own.new_zeros(longest), own.new_empty((size, longest))
        padded[: own.numel()] = own
        self._group._allgather_base(gathered, padded).wait()
        parts = [row[: stop - start] for row, (start, stop) in zip(gathered, bounds, strict=True)]
        return view_like(parameter, torch.cat(parts))

    def _cut_state(self, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Cut the state of whole parameters to this rank's parts, as a hook of `optimizer.load_state_dict()`. Local."""
        state = dict(state_dict["state"])
        numbers = itertools.chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        for number, shard in zip(numbers, self._shards_of(optimizer), strict=False):  # torch compares the lengths
            if shard is not None and number in state:
                state[number] = shard.cut(state[number])
        return {**state_dict, "state": state}


class _ShardedBucket(Bucket):
    """Bucket whose reduction gives each rank the sums of its own shards, as the shards' `.grad`."""

    is_sharded = True

    def __init__(
        self,
        shards: Sequence[_Shard],
        group: Any,
        indices: list[int],
        parameters: Sequence[nn.Parameter],
        check_finite: bool,
    ) -> None:
        self._shards = shards
        super().__init__(group, indices, parameters, check_finite)
        width = self._buffer.element_size()
        self._blocks = [
            (start * width, parameter.numel() * width)
            for start, parameter in zip(self._starts, parameters, strict=True)
        ]

    @property
    def results(self) -> list[tuple[Tensor, Tensor]]:
        owners = [shard.own for shard in self._shards]
        return list(zip(owners, self.memory.current.sums, strict=True))

    def start(self) -> None:
        self._work = self._group.reduce_shards(self._buffer, self._blocks, self._check_finite)

    def start_second_phase(self) -> None:
        if self._check_finite:  # the result of this rank's check is sent to the others with the commit point
            self._work.wait()

    def close(self) -> None:
        for owner, _ in self.results:
            owner.grad = None  # the parameter may be frozen from now on
        super().close()

    def _places_of_sums(self, flat: Tensor) -> list[Tensor]:
        return [flat[start:][slice(*shard.bounds)] for start, shard in zip(self._starts, self._shards, strict=True)]


def _is_per_element(key: str, value: Any) -> bool:
    return isinstance(value, Tensor) and key not in _SCALAR_STATES
