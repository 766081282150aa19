# SPDX-License-Identifier: Apache-2.0
"""Measure the time that a checkpoint costs training.

    mpirun --bind-to none -np 2 python benchmarks/checkpoint.py FOLDER

The model has 25 M parameters, 300 MB with Adam's state, and is saved to a new folder in FOLDER. "pause" is the extra
time of the step in which the save begins. "training" is the extra time of all steps until the checkpoint is on the
disk, since the thread that writes needs a core, too. "waiting" is the time of the save if training waits until the
checkpoint is on the disk.
"""

import shutil
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from models import make_subjects
from mpi4py import MPI
from table import Table, make_parser
from torch import nn

from distributed_trainer import create_distributed_trainer


def main() -> None:
    """Print the table, which has one row with medians of the slowest rank."""
    parser = make_parser(__doc__, seconds=0.0)
    parser.add_argument("folder", nargs="?", default=".")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    num_rounds, num_steps = (1, 2) if options.quick else (options.rounds, 10)
    world = MPI.COMM_WORLD
    subject = make_subjects(1, options.quick)[0]
    trainer = create_distributed_trainer(subject.model)
    optimizer, criterion = torch.optim.Adam(subject.model.parameters()), nn.CrossEntropyLoss()
    folder = Path(world.bcast(tempfile.mkdtemp(dir=options.folder) if world.rank == 0 else None))

    def step() -> float:
        world.Barrier()
        began = time.perf_counter()
        trainer.train_step(*subject.batch, criterion, optimizer)
        return time.perf_counter() - began

    def newest() -> str:
        return world.bcast(max((path.name for path in folder.glob("step-*")), default=""))

    def begin_save() -> tuple[str, float]:
        """Save in the next step; return the checkpoint that was there before, and the step's seconds."""
        before = newest()
        trainer.save(folder, keep=1, optimizer=optimizer)
        return before, step()

    for _ in range(5):
        step()
    figures: dict[str, list[float]] = {"step": [], "pause": [], "training": [], "waiting": []}
    for _ in range(num_rounds):
        usual = median(step() for _ in range(num_steps))
        before, seconds = begin_save()
        pause = later = seconds - usual
        while newest() == before:
            later += step() - usual
        began = time.perf_counter()
        before, _ = begin_save()
        while newest() == before:
            time.sleep(0.001)
        values = usual, pause, later, time.perf_counter() - began - usual
        for name, value in zip(figures, values, strict=True):
            figures[name].append(world.allreduce(value, MPI.MAX))
    table = Table(f"A checkpoint of {world.size} ranks", "model", list(figures), ratios="time")
    table.add(subject.title, {name: median(values) for name, values in figures.items()})
    table.show(options.results)
    trainer.close()
    if world.rank == 0:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
