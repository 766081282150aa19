# SPDX-License-Identifier: Apache-2.0
"""Measure a training step with Adam with reproducible=8 beside an ordinary one.

    python benchmarks/reproducible.py                               one rank
    mpirun --bind-to none -np 2 python benchmarks/reproducible.py   two ranks

The global batch is the same in both. Reproducible steps compute with one thread, ordinary steps with as many threads as
fit the cores.
"""

import copy
from collections.abc import Callable

import torch
from measure import interleave
from models import Subject, make_subjects, make_trainer_step
from mpi4py import MPI
from table import Table, make_parser

from distributed_trainer import create_distributed_trainer


def step_of(subject: Subject, num_shards: int | None) -> Callable[[], object]:
    """Return a step of a trainer, which sets its number of threads."""
    model = copy.deepcopy(subject.model)
    trainer = create_distributed_trainer(model, reproducible=num_shards)
    num_threads = torch.get_num_threads()
    trainer_step = make_trainer_step(trainer, *subject.batch)

    def step() -> None:
        torch.set_num_threads(num_threads)
        trainer_step()

    return step


def main() -> None:
    """Print the table, which has a row for each model."""
    options = make_parser(__doc__, seconds=20.0).parse_args()
    num_threads = torch.get_num_threads()
    title = f"A training step on {MPI.COMM_WORLD.size} ranks"
    table = Table(title, "model", ["ordinary", "reproducible"], ratios="time")
    for subject in make_subjects(2, options.quick):
        contenders = {"ordinary": step_of(subject, None), "reproducible": step_of(subject, 8)}
        torch.set_num_threads(num_threads)
        table.add(subject.title, interleave(contenders, options, turn_seconds=1.0))
    table.show(options.results)


if __name__ == "__main__":
    main()
