# SPDX-License-Identifier: Apache-2.0
"""Measure the bytes that PowerSGD saves, the time that it costs, and the accuracy that it loses.

    mpirun --bind-to none -np 2 python benchmarks/compression.py

This takes about four minutes, mostly to train a small transformer to the end of its schedule (trainings.py).
"""

import argparse
import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from measure import interleave, start_groups
from models import Subject, make_subjects, make_trainer_step
from table import Table, make_parser
from trainings import train_characters, train_digits

from distributed_trainer import PowerSGD, create_distributed_trainer

COMPRESSIONS = {"exact": None, "rank 4": PowerSGD(rank=4)}


class CountedAllReduce:
    """Wrapper of a group's all_reduce that counts the calls and their bytes."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self._method = method
        self.num_bytes = self.num_calls = 0

    def __call__(self, tensors: list[torch.Tensor], *options: Any) -> Any:
        self.num_bytes += sum(tensor.nbytes for tensor in tensors)
        self.num_calls += 1
        return self._method(tensors, *options)


def measure_steps(subjects: list[Subject], options: argparse.Namespace) -> Table:
    """Measure the time that compression adds to a step whose exchange costs little. Collective, blocks."""
    table = Table(f"A training step on {dist.get_world_size()} ranks", "model", list(COMPRESSIONS), ratios="time")
    for subject in subjects:
        contenders = {}
        for name, compression in COMPRESSIONS.items():
            trainer = create_distributed_trainer(copy.deepcopy(subject.model), compression=compression)
            contenders[name] = make_trainer_step(trainer, *subject.batch)
        table.add(subject.title, interleave(contenders, options, turn_seconds=1.0))
    return table


def count_bytes(subjects: list[Subject]) -> Table:
    """Count the bytes that a rank passes to all_reduce in a step, with a group that counts. Collective, blocks."""
    columns = [f"{what}, {name}" for what in ("bytes", "calls") for name in COMPRESSIONS]
    table = Table("What a rank gives to all_reduce in a step", "model", columns, "bytes and calls", 1)
    for subject in subjects:
        values = {}
        for name, compression in COMPRESSIONS.items():
            model, group = copy.deepcopy(subject.model), dist.new_group()
            trainer = create_distributed_trainer(model, compression=compression, group=group)
            step = make_trainer_step(trainer, *subject.batch)
            step()  # buckets are built after the first step
            group.allreduce = counted = CountedAllReduce(group.allreduce)
            step()
            values |= {f"bytes, {name}": counted.num_bytes, f"calls, {name}": counted.num_calls}
            trainer.close()
        table.add(subject.title, values)
    return table


def train_all(is_quick: bool) -> tuple[Table, Table]:
    """Train, to measure the accuracy that compression loses. Collective, blocks."""
    digits = Table("Test accuracy on digits", "training", list(COMPRESSIONS), "%", 100)
    num_epochs = 1 if is_quick else 10
    accuracies = {name: train_digits(one, num_epochs) for name, one in COMPRESSIONS.items()}
    digits.add("1 epoch" if num_epochs == 1 else f"{num_epochs} epochs", accuracies)
    columns = [f"{what}, {name}" for what in ("loss", "accuracy") for name in COMPRESSIONS]
    characters = Table("Characters held back", "training", columns, "loss, accuracy", 1)
    for num_steps in (10,) if is_quick else (400, 6000):
        values = {}
        for name, compression in COMPRESSIONS.items():
            values[f"loss, {name}"], values[f"accuracy, {name}"] = train_characters(compression, num_steps)
        characters.add(f"{num_steps} steps", values)
    return digits, characters


def main() -> None:
    """Print the tables."""
    options = make_parser(__doc__, seconds=10.0).parse_args()
    start_groups()
    subjects = make_subjects(dist.get_world_size(), options.quick)
    for table in (measure_steps(subjects, options), count_bytes(subjects), *train_all(options.quick)):
        table.show(options.results)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
