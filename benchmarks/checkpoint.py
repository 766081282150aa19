# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint costs training: mpirun -np 2 python benchmarks/checkpoint.py FOLDER

25 M parameters with Adam, 300 MB in all, to a folder of its own in FOLDER. "pause" is how long the step that begins it
stands still, "steps" how much longer all steps until it is on the disk take, together, since the thread that writes
needs a core as well; "synchronous" is how long it takes if training waits until it is on the disk.
"""

import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from measure import report
from mpi4py import MPI
from torch import nn
from training_step import make_mlp

from distributed_trainer import create_distributed_trainer

NUM_ROUNDS = 7


def main() -> None:
    """Reports the medians of the slowest rank."""
    torch.manual_seed(0)
    world = MPI.COMM_WORLD
    model, inputs, targets = make_mlp(), torch.randn(32, 1024), torch.randint(0, 1000, (32,))
    trainer = create_distributed_trainer(model)
    optimizer, criterion = torch.optim.Adam(model.parameters()), nn.CrossEntropyLoss()
    parent = sys.argv[1] if len(sys.argv) > 1 else "."
    folder = Path(world.bcast(tempfile.mkdtemp(dir=parent) if world.rank == 0 else None))

    def step() -> float:
        world.Barrier()
        began = time.perf_counter()
        trainer.train_step(inputs, targets, criterion, optimizer)
        return time.perf_counter() - began

    pauses: list[float] = []
    take_part = trainer._saving.take_part

    def timed(flags: int) -> None:
        began = time.perf_counter()
        take_part(flags)
        pauses.append(time.perf_counter() - began)

    trainer._saving.take_part = timed

    def save() -> None:
        trainer.save(folder, keep=1, optimizer=optimizer)

    def is_writing() -> bool:
        return world.allreduce(not trainer._saving._writing._is_over.is_set(), MPI.LOR)

    for _ in range(5):
        step()
    figures: dict[str, list[float]] = {"step": [], "pause": [], "steps": [], "synchronous": []}
    for _ in range(NUM_ROUNDS):
        usual = median(step() for _ in range(10))
        save()
        slower = step() - usual
        pause = pauses[-1]
        while is_writing():
            slower += step() - usual
        save()
        step()
        while is_writing():
            time.sleep(0.001)
        began = time.perf_counter()
        save()
        trainer._saving.take_part(trainer._saving.flags)
        while is_writing():
            time.sleep(0.001)
        values = usual, pause, slower, time.perf_counter() - began
        for name, value in zip(figures, values, strict=True):
            figures[name].append(world.allreduce(value, MPI.MAX))
    medians = {name: median(values) for name, values in figures.items()}
    text = ", ".join(f"{name} {seconds * 1e3:.0f} ms" for name, seconds in medians.items())
    ratio = medians["pause"] / medians["synchronous"]
    report({"benchmark": "checkpoint", "ranks": world.size, **medians}, f"{world.size} ranks: {text}; {ratio:.1%}")
    trainer.close()
    if world.rank == 0:
        for path in sorted(folder.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        folder.rmdir()


if __name__ == "__main__":
    main()
