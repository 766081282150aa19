# SPDX-License-Identifier: Apache-2.0
"""Find what in the graph of a loss the sum over the ranks would get wrong.

Such are tensors that get gradients and are not parameters of the trainer's model, since nothing would sum their
gradients over the ranks. To find them, the graph of the loss is walked to its leaves, which takes about 0.2 us for each
node. So it is walked when it may have changed: autograd numbers its nodes, and the count of nodes made since forward
began tells one graph from another. It is also walked in every hundredth backward.

- Parameters of other modules (a criterion's, a second model's), and other tensors that an optimizer updates, are
  refused.
- Parameters of another open trainer's model may get gradients, as the discriminator's do from the generator's loss.
  That trainer refuses to use them unless they were cleared, since they are not sums.
- Any other tensor gets no gradient in `train_step`. In a manual loop it may be this rank's own data, such as inputs
  whose gradient a penalty needs: the gradient by own samples is complete. But a tensor with the same values on every
  rank is taken for one that all ranks share, and refused.

The same walk finds operations whose result for one sample depends on the others, so that parts of the batch do not add
up: `F.batch_norm` in training that no BatchNorm module of the model calls (calls by those have other nodes in the
graph), and embeddings with `scale_grad_by_freq`.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..backend.gather import gather_objects
from .divergence import sum_of_bits

EVERY_BACKWARDS = 100

_open: weakref.WeakSet[LeafCheck] = weakref.WeakSet()  # checks of the trainers that are not closed


class LeafCheck:
    """Find leaves of the graphs from which a trainer's losses were computed.

    Args:
        model: Model whose parameters are expected among the leaves.
        group: Process group of the ranks.
        has_global_batchnorm: Whether BatchNorm modules take the statistics of the batch of all ranks.
    """

    def __init__(self, model: nn.Module, group: Any, has_global_batchnorm: bool = True) -> None:
        self._model, self._group = model, group
        self._allowed = set() if has_global_batchnorm else {"batch_norm"}
        self._graphs: dict[int, _Passed] = {}  # by number of nodes
        self._began = self._num_backwards = 0
        self._others: list[Tensor] = []  # leaves that are no parameters, found by the last look
        self._has_found_others = False
        self._unsummed: dict[str, Tensor] = {}
        _open.add(self)

    def begin(self) -> None:
        """Count the graph's nodes from here, before forward. Local."""
        self._began = torch._C._autograd._get_sequence_nr()

    def look(self, loss: Tensor, finds_others: bool = False) -> str | None:
        """Look at the leaves of a loss, before its backward; return why it must not be used, or None. Local.

        Args:
            loss: The loss.
            finds_others: Also walk a known graph, for `no_gradients_of_others`, if there have been such leaves.
        """
        number = torch._C._autograd._get_sequence_nr()
        graph, self._began = number - self._began, number
        self._num_backwards += 1
        if graph in self._graphs and self._num_backwards % EVERY_BACKWARDS:
            _mark_unsummed(self._graphs[graph])
            if finds_others:
                self._others = self.others_of(loss)
            return None
        leaves, mixing = _walk(loss)
        if self._group.size() > 1:
            for name in sorted(mixing - self._allowed):
                return _MIXING[name]
        refusal, passed = self._examine(leaves)
        if refusal is None:  # a graph that was refused stays unknown, to be refused again
            self._graphs[graph] = passed
        return refusal

    def look_at(self, inputs: Sequence[Tensor]) -> str | None:
        """Look at tensors that alone will get gradients; return why they must not, or None. Local."""
        return self._examine(inputs)[0]

    def others_of(self, loss: Tensor) -> list[Tensor]:
        """Return the leaves of a loss that are no parameters; none if `look` has never found such leaves. Local."""
        return [leaf for leaf in _walk(loss)[0] if not isinstance(leaf, nn.Parameter)] if self._has_found_others else []

    def _examine(self, leaves: Sequence[Tensor]) -> tuple[str | None, _Passed]:
        """Return why leaves must not get gradients, or None, and the parameters of other trainers among them. Local."""
        own = {id(parameter) for parameter in self._model.parameters()}
        passed: _Passed = {}
        self._others = []
        for leaf in leaves:
            if id(leaf) in own:
                continue
            owner = _owner(leaf)
            if owner is not None:
                check, name = owner
                passed.setdefault(check, {})[name] = leaf
            elif isinstance(leaf, nn.Parameter) or _has_optimizer(leaf):
                text = (
                    f"{_describe(leaf)} gets a gradient in this backward, but is not a parameter of the trainer's "
                    f"model, so the ranks would not add their gradients. Put it into the model before making the "
                    f"trainer (such as nn.ModuleList([model, criterion]), or a module that computes the loss), or "
                    f"freeze it with requires_grad_(False)."
                )
                return text, {}
            else:
                self._others.append(leaf)
                self._has_found_others = True
        _mark_unsummed(passed)
        return None, passed

    @contextlib.contextmanager
    def no_gradients_of_others(self) -> Iterator[None]:
        """Leave `.grad` of the leaves that are no parameters, which the last look has found, as it was. Local.

        In `train_step` they would get the gradient of this rank's samples.
        """
        earlier = [leaf.grad for leaf in self._others]
        for leaf in self._others:
            leaf.grad = None
        yield
        for leaf, gradient in zip(self._others, earlier, strict=True):
            leaf.grad = gradient

    def check_shared(self) -> None:
        """Compare the leaves that the last look has found with those of the other ranks. Collective, blocks.

        Raises:
            ValueError: A leaf has the same values on every rank. The same on every rank.
        """
        leaves, self._others = self._others, []
        own = [(tuple(leaf.shape), str(leaf.dtype), int(sum_of_bits(leaf.detach()))) for leaf in leaves]
        rows = gather_objects(self._group, ([_describe(leaf) for leaf in leaves], own))
        for name, leaf in zip(*rows[0], strict=True):
            if all(leaf in others for _, others in rows):
                self._graphs.clear()
                raise ValueError(
                    f"{name} is the same on every rank and gets a gradient in this backward, but is not a parameter "
                    f"of the trainer's model, so the ranks would not add their gradients. To train it, make it an "
                    f"nn.Parameter of the model before making the trainer. If its gradient is not needed, detach it, "
                    f"or call trainer.backward(..., inputs=list(model.parameters()))."
                )

    def unsummed(self) -> str | None:
        """Return why `.grad` must not be used, if another trainer's backward added to it; None otherwise. Local."""
        for name, parameter in self._unsummed.items():
            if parameter.grad is not None and bool(parameter.grad.any()):
                return (
                    f".grad of {name} holds gradients of another trainer's backward, which the ranks have not added. "
                    f"Call zero_grad() on this model's optimizer after the other trainer's backward, or make one "
                    f"trainer of both models, such as nn.ModuleList([first, second])."
                )
        self._unsummed = {}
        return None

    def start(self, keep: bool) -> None:
        """Begin a step, which keeps `.grad`, or drops also what other trainers have added to it. Local."""
        self._others = []
        if not keep:
            self._unsummed = {}

    def forget_graphs(self) -> None:
        """Walk the graphs of the next backwards again, since the model has changed. Local."""
        self._graphs.clear()

    def close(self) -> None:
        """Give up the parameters: other trainers' backwards no longer find an owner of them. Local."""
        _open.discard(self)

    @property
    def has_others(self) -> bool:
        """Whether `check_shared` is to be called: the last look has found leaves that are no parameters. Local."""
        return self._group.size() > 1 and bool(self._others)


_MIXING = {
    "batch_norm": (
        "F.batch_norm is called in training, but not by a BatchNorm module that the model has: its statistics would be "
        "those of each rank's part. Use nn.BatchNorm1d (2d, 3d) and make it a module of the model (nn.ModuleList in "
        "place of a list), or make the trainer with sync_batchnorm=False."
    ),
    "scale_grad_by_freq": (
        "an embedding has scale_grad_by_freq=True, which divides gradients by the counts of the indices in each rank's "
        "part, not in the batch. Leave it out."
    ),
}
"""Why a backward must not run on several ranks, by the operation that mixes samples."""

_Passed = dict[LeafCheck, dict[str, Tensor]]
"""Parameters of other trainers' models through which a loss passes, by those trainers' checks and by name."""


def _mark_unsummed(passed: _Passed) -> None:
    """Let other trainers know that a backward adds to `.grad` of their parameters. Local."""
    for check, parameters in passed.items():
        if check._group.size() > 1:
            check._unsummed.update(parameters)


def _owner(leaf: Tensor) -> tuple[LeafCheck, str] | None:
    """Return the check of the open trainer whose model has this parameter, and its name there. Local."""
    for check in _open:
        for name, parameter in check._model.named_parameters():
            if parameter is leaf:
                return check, name
    return None


def _walk(loss: Tensor) -> tuple[list[Tensor], set[str]]:
    """Return the leaves whose gradients a backward computes, and which keys of `_MIXING` it passes. Local."""
    if loss.grad_fn is None:
        return [loss] if loss.requires_grad else [], set()
    found, mixing = [], set[str]()
    seen: set[Any] = {loss.grad_fn}
    waiting: list[Any] = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        children = node.next_functions
        if not children and (leaf := getattr(node, "variable", None)) is not None:
            found.append(leaf)
        kind = type(node).__name__
        if kind.endswith("BatchNormBackward0") and node._saved_training and len(node._saved_input) > 1:
            mixing.add("batch_norm")  # instance norm makes one row of the batch
        elif kind.startswith("Embedding") and getattr(node, "_saved_scale_grad_by_freq", False):
            mixing.add("scale_grad_by_freq")
        for child, _ in children:
            if child is not None and child not in seen:
                seen.add(child)
                waiting.append(child)
    return found, mixing


def _has_optimizer(leaf: Tensor) -> bool:
    """Return whether any optimizer updates the leaf. Local."""
    optimizers = [found for found in gc.get_objects() if issubclass(type(found), torch.optim.Optimizer)]
    groups = itertools.chain.from_iterable(optimizer.param_groups for optimizer in optimizers)
    return any(leaf is parameter for group in groups for parameter in group["params"])


def _describe(leaf: Tensor) -> str:
    """Return a tensor's name for messages, from the first module that has it. Local."""
    kind = "parameter" if isinstance(leaf, nn.Parameter) else "tensor"
    for module in gc.get_objects():
        if issubclass(type(module), nn.Module):
            for name, value in [*vars(module).items(), *vars(module).get("_parameters", {}).items()]:
                if value is leaf:
                    return f"the {kind} {name} {list(leaf.shape)} of {type(module).__name__}"
    return f"a {kind} of shape {list(leaf.shape)}"
