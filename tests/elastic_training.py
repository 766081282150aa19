# SPDX-License-Identifier: Apache-2.0
"""A training whose ranks kill themselves where a test says, and the same one in a plain loop, for test_elastic.py.

Usage: elastic_training.py FOLDER KIND [STEP:RANK:PLACE ...], with the ranks that there are at the start. A place
"held" kills nobody: there a rank has got from the others all that a step, or an evaluation, needs, but learns of a
death first.
"""

import math
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

NUM_STEPS, BATCH_SIZE, NUM_SAMPLES, SEED = 12, 24, 96, 3
NONFINITE_STEP = 4
EVALUATE_STEP = 5  # before it
CRITERION = nn.CrossEntropyLoss()


@dataclass(frozen=True)
class Kind:
    """What is trained, and how."""

    optimizer: Any = torch.optim.Adam
    has_batchnorm: bool = False
    dropout: float = 0.0
    workers: int | None = None
    """Of trainer.loader; None passes whole batches."""
    has_nonfinite_step: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    """Of the trainer."""
    of_step: dict[str, Any] = field(default_factory=dict)


KINDS = {
    "whole": Kind(has_nonfinite_step=True, options={"nonfinite_gradients": "raise"}),
    "batchnorm": Kind(torch.optim.SGD, True, has_nonfinite_step=True, options={"nonfinite_gradients": "skip"}),
    "loader": Kind(workers=0),
    "worker": Kind(workers=1),
    "reproducible": Kind(dropout=0.3, options={"reproducible": 8}),
    "microbatches": Kind(of_step={"microbatches": 2}),
    "auto": Kind(of_step={"microbatches": "auto"}),
}


class Counter(nn.Module):
    """Counts its forwards in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.count += 1
        return x


def make_model(kind: Kind) -> nn.Module:
    """Input [N, 20], output [N, 5]."""
    torch.manual_seed(SEED)
    norm = nn.BatchNorm1d(96) if kind.has_batchnorm else nn.Identity()
    layers = nn.Linear(20, 96), norm, nn.ReLU(), nn.Dropout(kind.dropout), nn.Linear(96, 64), nn.ReLU(), Counter()
    return nn.Sequential(*layers, nn.Linear(64, 5))


def make_data() -> tuple[torch.Tensor, torch.Tensor]:
    """All samples, and their classes."""
    inputs = torch.randn(NUM_SAMPLES, 20, generator=torch.Generator().manual_seed(5))
    return inputs, inputs[:, :5].argmax(1)


def infinite(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """A loss whose gradients are infinite or NaN."""
    return CRITERION(outputs, targets) * math.inf


def plain(kind: Kind) -> tuple[list[float], nn.Module, float]:
    """One process: the loss of each step, the model, the accuracy before EVALUATE_STEP."""
    model, (inputs, targets) = make_model(kind), make_data()
    optimizer = kind.optimizer(model.parameters(), lr=0.01)
    torch.manual_seed(SEED)
    seed = int(torch.empty((), dtype=torch.int64).random_())  # as the loader draws it
    losses, accuracy, num_batches = [], 0.0, NUM_SAMPLES // BATCH_SIZE
    for step in range(NUM_STEPS):
        order = torch.arange(NUM_SAMPLES)
        if kind.workers is not None:
            order = torch.randperm(NUM_SAMPLES, generator=torch.Generator().manual_seed(seed + step // num_batches))
        batch = order[step % num_batches * BATCH_SIZE :][:BATCH_SIZE]
        if step == EVALUATE_STEP:
            model.eval()
            accuracy = (model(inputs).argmax(1) == targets).float().mean().item()
            model.train()
        optimizer.zero_grad()
        loss = CRITERION(model(inputs[batch]), targets[batch])
        if kind.has_nonfinite_step and step == NONFINITE_STEP:
            losses.append(math.inf)
            continue
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, model, accuracy


class Victim:
    """Kills this rank at its places."""

    def __init__(self, rank: int, words: list[str]) -> None:
        self.step = 0
        kills = [word.split(":") for word in words]
        self._places = {(int(step), place) for step, of_rank, place in kills if int(of_rank) == rank}

    def passes(self, place: str) -> None:
        """To be called where it may be killed."""
        if (self.step, place) in self._places:
            os.kill(os.getpid(), signal.SIGKILL)

    def holds(self, place: str) -> None:
        """To be called where a rank may be held."""
        from distributed_trainer import DistributedTrainerError, job

        if (self.step, place) in self._places:
            assert job._job_of_world.engine.has_lost_rank(30.0), "nobody was killed"
            raise DistributedTrainerError("held")

    def watch(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Has them met inside of a step."""
        from distributed_trainer import evaluate, gradients, replica, saving

        model[4].register_forward_pre_hook(lambda *_: self.passes("forward"))
        model[0].weight.register_hook(lambda _: self.passes("backward"))  # the last bucket waits for it
        optimizer.register_step_pre_hook(lambda *_: self.passes("optimizer"))
        optimizer.register_step_post_hook(lambda *_: self.passes("updated"))
        gradients.BUCKET_BYTES = 4096
        sum_numbers, pass_commit_point = gradients.GradientSum._sum, replica.Replica._pass_commit_point

        def sum_watched(self_, values, dtype):
            self.passes("sum")
            sums = sum_numbers(self_, values, dtype)
            self.holds("held")
            return sums

        def pass_watched(self_, outcome):
            self.passes("commit")
            pass_commit_point(self_, outcome)

        gradients.GradientSum._sum, replica.Replica._pass_commit_point = sum_watched, pass_watched
        evaluate.gather_objects = self._held(evaluate.gather_objects, "held-in-evaluate")
        saving.gather_bytes = self._held(saving.gather_bytes, "held-in-close")

    def _held(self, gather: Callable[..., Any], place: str) -> Callable[..., Any]:
        def gather_and_hold(*arguments: Any) -> Any:
            rows = gather(*arguments)
            self.holds(place)
            return rows

        return gather_and_hold


def main(folder: Path, name: str, *words: str) -> None:
    """Trains, and leaves what has come of it in the folder."""
    from distributed_trainer import create_distributed_trainer

    kind = KINDS[name]
    model, (inputs, targets) = make_model(kind), make_data()
    optimizer = kind.optimizer(model.parameters(), lr=0.01)
    torch.manual_seed(SEED)
    trainer = create_distributed_trainer(model, **kind.options)
    first_rank = trainer.rank
    victim = Victim(first_rank, list(words))
    victim.watch(model, optimizer)

    def correct(outputs, targets):
        victim.passes("evaluate")
        return outputs.argmax(1) == targets

    def batches():
        if kind.workers is None:
            for step in range(NUM_STEPS):
                start = step * BATCH_SIZE % NUM_SAMPLES
                yield inputs[start:][:BATCH_SIZE], targets[start:][:BATCH_SIZE]
            return
        loader = trainer.loader(TensorDataset(inputs, targets), BATCH_SIZE, shuffle=True, num_workers=kind.workers)
        for _ in trainer.epochs(NUM_STEPS * BATCH_SIZE // NUM_SAMPLES):
            yield from loader

    losses, accuracy = [], 0.0
    for x, y in batches():
        if victim.step == EVALUATE_STEP:
            whole = [(inputs, targets)]
            loader = whole if kind.workers is None else trainer.loader(TensorDataset(inputs, targets), 40)
            accuracy = trainer.evaluate(loader, metrics={"correct": correct})["correct"]
            victim.passes("evaluated")
        victim.passes("between")
        is_nonfinite = kind.has_nonfinite_step and victim.step == NONFINITE_STEP
        try:
            loss = trainer.train_step(x, y, infinite if is_nonfinite else CRITERION, optimizer, **kind.of_step)
        except FloatingPointError:
            assert is_nonfinite and kind.options["nonfinite_gradients"] == "raise"
            loss = torch.tensor(math.inf)
        losses.append(loss.item())
        victim.step += 1
    victim.passes("summary")
    trainer.summary()
    victim.passes("close")
    trainer.close()
    victim.passes("closed")
    result = {
        "losses": losses,
        "state": model.state_dict(),
        "accuracy": accuracy,
        "num_ranks": trainer.world_size,
        "num_skipped_steps": trainer.num_skipped_steps,
    }
    torch.save(result, folder / f"{first_rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
