# SPDX-License-Identifier: Apache-2.0
"""A training step beside DistributedDataParallel on gloo: mpirun -np 2 python benchmarks/training_step.py

"plain" is the same step on every rank without any exchange, all ranks running at once: what there is to reach.
"""

import copy
import runpy
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from mpi4py import MPI
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from distributed_trainer import create_distributed_trainer
from distributed_trainer import job as jobs

SECONDS_PER_MODEL = 45.0


class Transformer(nn.Module):
    """10.7 M parameters: 6 layers, width 384, 6 heads; input [N, 64] tokens of 65, output [N, 65, 64]."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(65, 384)
        self.position = nn.Parameter(torch.zeros(64, 384))
        layer = nn.TransformerEncoderLayer(384, 6, 4 * 384, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
        self.head = nn.Linear(384, 65)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits, classes second as nn.CrossEntropyLoss wants them."""
        return self.head(self.layers(self.embedding(tokens) + self.position)).transpose(1, 2)


def make_mlp() -> nn.Module:
    """25 M parameters; input [N, 1024], output [N, 1000]."""
    return nn.Sequential(nn.Linear(1024, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 1000))


def plain_step(model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> Callable[[], object]:
    """A step as one writes it in plain torch, with Adam."""
    optimizer, criterion = torch.optim.Adam(model.parameters()), nn.CrossEntropyLoss()

    def step() -> None:
        optimizer.zero_grad()
        criterion(model(inputs), targets).backward()
        optimizer.step()

    return step


def compare(title: str, model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> None:
    """Prints medians of interleaved steps. `inputs` and `targets` are one rank's."""
    world = MPI.COMM_WORLD
    trainer = create_distributed_trainer(copy.deepcopy(model))
    optimizer, criterion = torch.optim.Adam(trainer.model.parameters()), nn.CrossEntropyLoss()
    whole = [torch.cat([part] * trainer.world_size) for part in (inputs, targets)]
    contenders = {
        "plain": plain_step(copy.deepcopy(model), inputs, targets),
        "ours": lambda: trainer.train_step(*whole, criterion, optimizer),
        "DDP on gloo": plain_step(DistributedDataParallel(copy.deepcopy(model)), inputs, targets),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for step in contenders.values():
        for _ in range(2):  # buckets are built after the first
            step()
    started = time.perf_counter()
    while world.bcast(time.perf_counter() - started < SECONDS_PER_MODEL):
        for name, step in contenders.items():
            world.Barrier()
            before = time.perf_counter()
            for _ in range(3):
                step()
            seconds[name].append((time.perf_counter() - before) / 3)
    slowest = {name: world.allreduce(median(values), MPI.MAX) for name, values in seconds.items()}
    if trainer.rank == 0:
        columns = [f"{name} {1e3 * value:.1f} ({slowest['plain'] / value:.2f})" for name, value in slowest.items()]
        print(f"{title}: " + "   ".join(columns), flush=True)
    trainer.close()


def check_cost() -> None:
    """Prints what the check that all ranks have the same batch costs a step of the demo."""
    make_model = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "train_digits.py"))["make_model"]
    model = make_model()
    trainer = create_distributed_trainer(model)
    optimizer, criterion = torch.optim.Adam(model.parameters()), nn.CrossEntropyLoss()
    inputs, targets = torch.randn(128, 1, 8, 8), torch.randint(0, 10, (128,))
    contenders = {
        "step": lambda: trainer.train_step(inputs, targets, criterion, optimizer),
        "check": lambda: trainer._check_same_batch({"inputs": inputs, "targets": targets}),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(500):
        for name, call in contenders.items():
            # A rank that is late would be waited for in the step's next collective, were there no check. The engine's
            # barrier lets all ranks go within microseconds, MPI's does not.
            trainer._group.barrier().wait()
            before = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - before)
    step, check = (MPI.COMM_WORLD.allreduce(median(values), MPI.MAX) for values in seconds.values())
    if trainer.rank == 0:
        print(f"demo: step {1e3 * step:.2f} ms, of which comparing the batch {1e6 * check:.0f} us ({check / step:.1%})")
    trainer.close()


def main() -> None:
    """Prints one line for each model."""
    job = jobs.start(None, None)
    dist.init_process_group("gloo", store=job.store, rank=job.rank, world_size=job.engine.size)
    if job.rank == 0:
        print(f"training step with Adam, {job.summary}")
        print("median milliseconds of a step; in brackets, time of plain over it: 1 means that the exchange is free")
    torch.manual_seed(0)
    mlp, transformer = make_mlp(), Transformer()
    tokens = torch.randint(0, 65, (4, 64))
    compare("MLP 25 M, 32 samples per rank", mlp, torch.randn(32, 1024), torch.randint(0, 1000, (32,)))
    compare("transformer 10.7 M, 4x64 tokens per rank", transformer, tokens, tokens)
    check_cost()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
