# SPDX-License-Identifier: Apache-2.0
"""What reproducible=8 costs a training step with Adam, beside the ordinary one.

    python benchmarks/reproducible.py               one rank
    mpirun -np 2 python benchmarks/reproducible.py  two

The global batch is the same in both. Reproducible steps compute with one thread, ordinary ones with those that fit the
cores.
"""

import copy
import runpy
from collections.abc import Callable
from pathlib import Path

import torch
from measure import interleave, report
from mpi4py import MPI
from torch import nn

from distributed_trainer import create_distributed_trainer

SECONDS_PER_MODEL = 20.0


def step_of(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor], shards: int | None) -> Callable[[], object]:
    """A step of a trainer with its number of threads."""
    trainer = create_distributed_trainer(model, reproducible=shards)
    num_threads = torch.get_num_threads()
    optimizer, criterion = torch.optim.Adam(model.parameters()), nn.CrossEntropyLoss()

    def step() -> None:
        torch.set_num_threads(num_threads)
        trainer.train_step(*batch, criterion, optimizer)

    return step


def main() -> None:
    """Reports each model."""
    models = runpy.run_path(str(Path(__file__).parent / "training_step.py"))
    num_threads = torch.get_num_threads()
    torch.manual_seed(0)
    tokens = torch.randint(0, 65, (8, 64))
    for title, model, batch in (
        ("MLP 25 M, 64 samples", models["make_mlp"](), (torch.randn(64, 1024), torch.randint(0, 1000, (64,)))),
        ("transformer 10.7 M, 8x64 tokens", models["Transformer"](), (tokens, tokens)),
    ):
        contenders = {"ordinary": step_of(copy.deepcopy(model), batch, None)}
        contenders["reproducible"] = step_of(copy.deepcopy(model), batch, 8)
        torch.set_num_threads(num_threads)
        medians = interleave(contenders, SECONDS_PER_MODEL, turn_seconds=1.0)
        report(
            {"benchmark": "reproducible", "model": title, "ranks": MPI.COMM_WORLD.size, "seconds": medians},
            f"{title}, {MPI.COMM_WORLD.size} ranks: "
            + "   ".join(f"{name} {1e3 * value:.0f} ms" for name, value in medians.items())
            + f"   ratio {medians['reproducible'] / medians['ordinary']:.2f}",
        )


if __name__ == "__main__":
    main()
