# SPDX-License-Identifier: Apache-2.0
"""Scripts as users write them, run by plain torch and by a trainer: same answer, or refused on every rank.

A test of tests/compatibility is such a script: a function of a `Run`, decorated with `works` or `refused`. It becomes a
test on 1, 2 and 3 ranks, with `train_step` and with a manual loop, and a row of the table in docs/compatibility.md
(compatibility_table.py).
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from one_process import assert_same
from ranks import World, on_ranks
from torch import Tensor, nn

from distributed_trainer import DistributedTrainer, create_distributed_trainer


class Run:
    """A run of a script. This class runs it in one process, by plain torch; `trainer` is None here.

    Attributes:
        model: Model that the script has passed to `start`.
        before: Copy of the model's state after the last complete step.
        losses: Loss of each step.
    """

    trainer: DistributedTrainer | None = None

    def __init__(self) -> None:
        self.model: nn.Module
        self.before: dict[str, Any] = {}
        self.losses: list[float] = []

    def start(self, model: nn.Module, **options: Any) -> nn.Module:
        """Make the trainer, if there is one, with these options; return the model."""
        self.model = model
        self._remember()
        return model

    def step(
        self,
        inputs: Any,
        targets: Any,
        criterion: Callable[..., Any],
        optimizer: torch.optim.Optimizer,
        *,
        weight: Callable[[Any], float] | float | None = None,
        **options: Any,
    ) -> float:
        """Train a step on a global batch; return its loss.

        Args:
            inputs: Inputs of the global batch.
            targets: Targets of the same samples.
            criterion: Loss, called as criterion(outputs, targets).
            optimizer: Optimizer of the model's parameters.
            weight: Weight of this rank's part in a manual loop, or a function of its targets; None for its number of
                samples.
            options: Options of `train_step`, without effect elsewhere.
        """
        loss = self._step(inputs, targets, criterion, optimizer, weight, options)
        self.losses.append(float(loss))
        self._remember()
        return self.losses[-1]

    def end(self) -> None:
        """Close the trainer, if there is one."""
        if self.trainer is not None:
            self.trainer.close()

    def _step(self, inputs, targets, criterion, optimizer, weight, options) -> Tensor:
        optimizer.zero_grad()
        loss = criterion(_call(self.model, inputs), targets)
        loss.backward()
        optimizer.step()
        return loss

    def _remember(self) -> None:
        self.before = copy.deepcopy(self.model.state_dict())


class StepRun(Run):
    """A run by `train_step`."""

    def start(self, model, **options):
        self.trainer = create_distributed_trainer(model, **options)
        return super().start(model)

    def _step(self, inputs, targets, criterion, optimizer, weight, options):
        assert self.trainer is not None
        return self.trainer.train_step(inputs, targets, criterion, optimizer, **options)


class LoopRun(StepRun):
    """A run by a manual loop: `split`, `forward`, `backward` and `step`."""

    def _step(self, inputs, targets, criterion, optimizer, weight, options):
        assert self.trainer is not None
        inputs, targets = self.trainer.split((inputs, targets))
        with self.trainer.forward():
            loss = criterion(_call(self.model, inputs), targets)
        optimizer.zero_grad()
        if weight is None or callable(weight):
            weight = num_samples((inputs, targets)) if weight is None else weight(targets)
        total = self.trainer.backward(loss, weight=weight)
        self.trainer.step(optimizer)
        return total


WAYS: dict[str, type[Run]] = {"train_step": StepRun, "manual-loop": LoopRun}


@dataclass(frozen=True)
class Row:
    """A row of docs/compatibility.md."""

    what: str
    """Action of a user's script."""
    script: Callable[[Run], Any]
    way: type[Run]
    refusal: str | None
    """Pattern of the error's text; None if the answer is that of one process."""
    instead: str
    """Remedy for what is refused, or a remark."""


ROWS: dict[str, list[Row]] = {}  # by the test file's name, in the order of the tests


def works(
    what: str, *, ways: tuple[str, ...] = tuple(WAYS), ranks: tuple[int, ...] = (1, 2, 3), rtol: float = 1e-9, note=""
):
    """Make a test: the script's final weights, buffers, losses and result are those of plain torch in one process.

    Args:
        what: Action of the script, for the table.
        ways: Ways in which the script is run.
        ranks: Numbers of ranks.
        rtol: Relative tolerance of the comparison.
        note: Remark for the table.
    """

    def decorate(script):
        ROWS.setdefault(script.__module__, []).append(Row(what, script, WAYS[ways[0]], None, note))

        def test(world: World, way: str) -> None:
            plain, run = Run(), WAYS[way]()
            expected = script(plain)
            found = script(run)
            run.end()
            torch.testing.assert_close(run.losses, plain.losses, rtol=rtol, atol=rtol)
            assert_same(run.model, plain.model, rtol)
            torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol)
            assert len(set(world.gather(repr(run.losses)))) == 1

        return _as_test(test, script, ways, ranks)

    return decorate


def refused(
    what: str,
    match: str,
    *,
    instead: str,
    error: type[Exception] = ValueError,
    ways: tuple[str, ...] = tuple(WAYS),
    ranks: tuple[int, ...] = (1, 2, 3),
):
    """Make a test: the script ends with the same error on every rank, before the failing step has changed a weight.

    Args:
        what: Action of the script, for the table.
        match: Pattern that is found in the error's text.
        instead: Remedy, for the table; the error's text says it, too.
        error: Type of the error.
        ways: Ways in which the script is run.
        ranks: Numbers of ranks.
    """

    def decorate(script):
        ROWS.setdefault(script.__module__, []).append(Row(what, script, WAYS[ways[0]], match, instead))

        def test(world: World, way: str) -> None:
            run = WAYS[way]()
            with pytest.raises(error, match=match) as caught:
                script(run)
            assert len(set(world.gather(str(caught.value)))) == 1, "the ranks' messages differ"
            assert_same(run.model.state_dict(), run.before, rtol=0)
            run.end()

        return _as_test(test, script, ways, ranks)

    return decorate


def num_samples(tree: Any) -> int:
    """The length of the first tensor or list of numbers in a batch."""
    if isinstance(tree, Tensor):
        return len(tree)
    values = list(tree.values()) if hasattr(tree, "values") else list(tree)
    return num_samples(values[0]) if isinstance(values[0], (Tensor, list, tuple, dict)) else len(values)


def _call(model, inputs):
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


def _as_test(test, script, ways, ranks):
    @functools.wraps(script)
    def named(world, way):
        test(world, way)

    del named.__wrapped__  # pytest would take the arguments of the script for fixtures
    return on_ranks(*ranks)(pytest.mark.parametrize("way", ways)(named))
