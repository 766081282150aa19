# SPDX-License-Identifier: Apache-2.0
"""Training whose ranks kill themselves at places that a test names, and the same in a plain loop; for test_recovery.py.

Usage: elastic_training.py FOLDER KIND [STEP:RANK:PLACE ...]. RANK is a rank's number at the start. A PLACE that begins
with "held" kills no rank: there a rank has received all that a step, an evaluation or `close` needs from the others,
but is told first that another rank has died.
"""

import gc
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

from distributed_trainer.data.rng import mix

NUM_STEPS, BATCH_SIZE, NUM_SAMPLES, SEED = 12, 24, 96, 3
NONFINITE_STEP = 4
EVALUATE_STEP = 5  # the evaluation is before this step
CRITERION = nn.CrossEntropyLoss()


@dataclass(frozen=True)
class Kind:
    """Kind of training: model, data and options."""

    optimizer: Any = torch.optim.Adam
    has_batchnorm: bool = False
    dropout: float = 0.0
    workers: int | None = None
    """Argument `num_workers` of trainer.loader; None passes whole batches without a loader."""
    has_nonfinite_step: bool = False
    counts: bool = False
    """Whether the criterion returns a `MeanLoss`. A rank may be killed in it, while others wait for its count."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the trainer."""
    of_step: dict[str, Any] = field(default_factory=dict)


def adam_and_sgd(parameters, lr):
    """Return an optimizer for the first layer and one for the others."""
    first, second, *others = parameters
    return [torch.optim.Adam([first, second], lr), torch.optim.SGD(others, lr, momentum=0.9)]


KINDS = {
    "whole": Kind(has_nonfinite_step=True, options={"nonfinite_gradients": "raise"}),
    "batchnorm": Kind(torch.optim.SGD, True, has_nonfinite_step=True, options={"nonfinite_gradients": "skip"}),
    "float16": Kind(torch.optim.SGD, has_nonfinite_step=True, options={"precision": "float16"}),
    "loader": Kind(workers=0),
    "worker": Kind(workers=1),
    "reproducible": Kind(dropout=0.3, options={"reproducible": 8}),
    "microbatches": Kind(of_step={"microbatches": 2}),
    "counted": Kind(counts=True),
    "auto": Kind(of_step={"microbatches": "auto"}),
    "two-optimizers": Kind(adam_and_sgd, has_nonfinite_step=True, options={"nonfinite_gradients": "skip"}),
}


class Counter(nn.Module):
    """Module that counts its forward calls in training, in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.count += 1
        return x


def make_model(kind: Kind) -> nn.Module:
    """Return a model with input [N, 20] and output [N, 5]."""
    torch.manual_seed(SEED)
    norm = nn.BatchNorm1d(96) if kind.has_batchnorm else nn.Identity()
    layers = nn.Linear(20, 96), norm, nn.ReLU(), nn.Dropout(kind.dropout), nn.Linear(96, 64), nn.ReLU(), Counter()
    return nn.Sequential(*layers, nn.Linear(64, 5))


def make_data() -> tuple[torch.Tensor, torch.Tensor]:
    """Return all samples, and their classes."""
    inputs = torch.randn(NUM_SAMPLES, 20, generator=torch.Generator().manual_seed(5))
    return inputs, inputs[:, :5].argmax(1)


def infinite(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return a loss whose gradients are infinite or NaN."""
    return CRITERION(outputs, targets) * math.inf


def plain(kind: Kind) -> tuple[list[float], nn.Module, float]:
    """Train in one process; return the loss of each step, the model, and the accuracy before EVALUATE_STEP."""
    model, (inputs, targets) = make_model(kind), make_data()
    optimizer = kind.optimizer(model.parameters(), lr=0.01)
    torch.manual_seed(SEED)
    seed = mix(mix(torch.get_rng_state().numpy().tobytes()), "loader", 0)  # as the trainer finds it
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
        model.zero_grad()
        with torch.autocast("cpu", torch.float16, enabled="precision" in kind.options):
            loss = CRITERION(model(inputs[batch]), targets[batch])
        if kind.has_nonfinite_step and step == NONFINITE_STEP:
            losses.append(math.inf)
            continue
        loss.backward()
        for one in optimizer if isinstance(optimizer, list) else [optimizer]:
            one.step()
        losses.append(loss.item())
    return losses, model, accuracy


class Victim:
    """Rank that kills itself at the places that `words` names for it."""

    def __init__(self, rank: int, words: list[str]) -> None:
        self.step = 0
        kills = [word.split(":") for word in words]
        self._places = {(int(step), place) for step, of_rank, place in kills if int(of_rank) == rank}

    def passes(self, place: str) -> None:
        """Kill this rank if `words` names this step and place. Called at each place where a rank may be killed."""
        if (self.step, place) in self._places:
            os.kill(os.getpid(), signal.SIGKILL)

    def holds(self, place: str) -> None:
        """Raise an error, once a killed rank is known, if `words` names this step and place for this rank."""
        from distributed_trainer import DistributedTrainerError
        from distributed_trainer.backend import job

        if (self.step, place) in self._places:
            assert job.start(None, None).engine.has_lost_rank(30.0), "no rank was killed"
            raise DistributedTrainerError("held")

    def watch(self, model: nn.Module, optimizer: Any) -> None:
        """Make training, evaluation and `close` call `passes` and `holds` at the places inside them."""
        from distributed_trainer.checkpoint import checkpointer
        from distributed_trainer.gradients import layout, reducer
        from distributed_trainer.replica import divergence, replica
        from distributed_trainer.trainer import evaluation

        model[4].register_forward_pre_hook(lambda *_: self.passes("forward"))
        model[0].weight.register_hook(lambda _: self.passes("backward"))  # the last bucket waits for this gradient
        optimizer = optimizer[-1] if isinstance(optimizer, list) else optimizer  # others have made their step then
        optimizer.register_step_pre_hook(lambda *_: self.passes("optimizer"))
        optimizer.register_step_post_hook(lambda *_: self.passes("updated"))
        layout.BUCKET_BYTES = 4096
        sum_numbers, commit = reducer.GradientReducer._sum, replica.Replica._commit
        compare = divergence.DivergenceCheck.check

        def sum_watched(self_, values, dtype):
            self.passes("sum")
            sums = sum_numbers(self_, values, dtype)
            self.holds("held")
            return sums

        def commit_watched(self_, committed):
            self.passes("commit")
            commit(self_, committed)

        def compare_watched(self_, step):
            if (self.step, "compare") in self._places:
                time.sleep(0.5)  # until the other ranks compare their weights, or have passed
                self.passes("compare")
            compare(self_, step)

        reducer.GradientReducer._sum, replica.Replica._commit = sum_watched, commit_watched
        divergence.DivergenceCheck.check = compare_watched
        evaluation.gather_objects = self._held(evaluation.gather_objects, "held-in-evaluate")
        checkpointer.gather_bytes = self._held(checkpointer.gather_bytes, "held-in-close")

    def _held(self, gather: Callable[..., Any], place: str) -> Callable[..., Any]:
        def gather_and_hold(*arguments: Any) -> Any:
            rows = gather(*arguments)
            self.passes(place.replace("held", "passed"))
            self.holds(place)
            return rows

        return gather_and_hold


def num_watched_processes() -> int:
    """Return the number of processes whose end this process would be told by a descriptor."""
    links = (Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd"))
    return sum(os.readlink(link) == "anon_inode:[pidfd]" for link in links if link.is_symlink())


def main(folder: Path, name: str, *words: str) -> None:
    """Train, and save the results in the folder."""
    from distributed_trainer import MeanLoss, create_distributed_trainer

    gc.disable()  # descriptors of what a recovery replaces are closed without the garbage collector
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

    def counted(outputs, targets):
        victim.passes("criterion")
        return MeanLoss(nn.functional.cross_entropy(outputs, targets, reduction="sum"), len(targets))

    def batches():
        if kind.workers is None:
            for step in range(NUM_STEPS):
                start = step * BATCH_SIZE % NUM_SAMPLES
                yield inputs[start:][:BATCH_SIZE], targets[start:][:BATCH_SIZE]
            return
        loader = trainer.loader(TensorDataset(inputs, targets), BATCH_SIZE, shuffle=True, num_workers=kind.workers)
        for _ in trainer.epochs(NUM_STEPS * BATCH_SIZE // NUM_SAMPLES):
            yield from loader

    criterion = counted if kind.counts else CRITERION
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
            loss = trainer.train_step(x, y, infinite if is_nonfinite else criterion, optimizer, **kind.of_step)
        except FloatingPointError:
            assert is_nonfinite and kind.options["nonfinite_gradients"] == "raise"
            loss = torch.tensor(math.inf)
        losses.append(loss.item())
        victim.step += 1
    num_watched = num_watched_processes()
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
        "loss_scale": trainer._session.progress.loss_scale.value,
        "num_watched": num_watched,
    }
    torch.save(result, folder / f"{first_rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
