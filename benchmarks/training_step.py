# SPDX-License-Identifier: Apache-2.0
"""A training step beside plain torch and torch's DistributedDataParallel on gloo.

mpirun -np 2 python benchmarks/training_step.py [mlp]

"plain" is the same step on every rank without any exchange, all ranks running at once: what there is to reach. The
allocator's settings are those of the whole process: DTRAIN_MALLOC=default measures plain torch with torch's own.
"""

import contextlib
import copy
import os
import runpy
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from floor import Floor
from measure import interleave, report
from mpi4py import MPI
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from distributed_trainer import DistributedTrainer, create_distributed_trainer
from distributed_trainer import job as jobs

SECONDS_PER_MODEL = float(os.environ.get("BENCH_SECONDS", "30"))


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


class Phases:
    """Seconds that the phases of a step take; `mark` ends one."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self._since = 0.0

    def start(self) -> None:
        """Begins a step."""
        self._since = time.perf_counter()

    def mark(self, phase: str) -> None:
        """Ends a phase, at whose end the next begins."""
        now = time.perf_counter()
        self.seconds[phase].append(now - self._since)
        self._since = now

    def medians(self) -> dict[str, float]:
        """Of each phase, of the rank where it is longest. Collective."""
        return {name: MPI.COMM_WORLD.allreduce(median(values), MPI.MAX) for name, values in self.seconds.items()}


def plain_step(model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor, phases: Phases) -> Callable[[], object]:
    """A step as one writes it in plain torch, with Adam."""
    optimizer, criterion = torch.optim.Adam(model.parameters()), nn.CrossEntropyLoss()

    def step() -> None:
        phases.start()
        optimizer.zero_grad()
        loss = criterion(model(inputs), targets)
        phases.mark("forward")
        loss.backward()
        phases.mark("backward")
        optimizer.step()
        phases.mark("optimizer")

    return step


def our_step(
    trainer: DistributedTrainer, inputs: torch.Tensor, targets: torch.Tensor, phases: Phases
) -> Callable[[], object]:
    """The same with a trainer; `inputs` and `targets` are of the global batch."""
    optimizer, criterion = torch.optim.Adam(trainer.model.parameters()), nn.CrossEntropyLoss()
    gradients = trainer._replica.gradients
    backward, finish, optimizer_step = gradients.backward, gradients.finish, optimizer.step

    def marked_backward(**options: bool) -> contextlib.AbstractContextManager[None]:
        phases.mark("forward")
        return backward(**options)

    def marked_finish(numbers: list[float]) -> list[float]:
        phases.mark("backward")
        result = finish(numbers)
        phases.mark("exchange that is waited for")
        return result

    def marked_step() -> None:
        optimizer_step()
        phases.mark("optimizer")

    gradients.backward, gradients.finish, optimizer.step = marked_backward, marked_finish, marked_step

    def step() -> None:
        phases.start()
        trainer.train_step(inputs, targets, criterion, optimizer)

    return step


def compare(title: str, model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> None:
    """Reports medians of interleaved steps. `inputs` and `targets` are one rank's."""
    trainer = create_distributed_trainer(copy.deepcopy(model))
    sharded = create_distributed_trainer(copy.deepcopy(model), shard_optimizer=True)
    whole = [torch.cat([part] * trainer.world_size) for part in (inputs, targets)]
    phases = {name: Phases() for name in ("plain", "ours", "ours, sharded", "DDP on gloo")}
    gradients = [torch.randn_like(parameter) for parameter in model.parameters()]
    buckets = [torch.empty_like(gradient) for gradient in gradients]
    unit = 16 * trainer.world_size
    contenders = {
        "plain": plain_step(copy.deepcopy(model), inputs, targets, phases["plain"]),
        "ours": our_step(trainer, *whole, phases["ours"]),
        "ours, sharded": our_step(sharded, *whole, phases["ours, sharded"]),
        "DDP on gloo": plain_step(
            DistributedDataParallel(copy.deepcopy(model)), inputs, targets, phases["DDP on gloo"]
        ),
        # What an exchange costs at least: each gradient once into a bucket, and the reduction of these.
        "copy": lambda: torch._foreach_copy_(buckets, gradients),
        "floor": Floor(sum(gradient.numel() for gradient in gradients) // unit * unit),
    }
    for name in phases:
        contenders[name]()  # buckets are built after the first step
    medians = interleave(contenders, SECONDS_PER_MODEL, turn_seconds=1.0)
    exchange = (medians["ours"] - medians["plain"]) / (medians["copy"] + medians["floor"])
    report(
        {
            "benchmark": "training_step",
            "model": title,
            "ranks": trainer.world_size,
            "allocator": os.environ.get("DTRAIN_MALLOC", "ours"),
            "seconds": medians,
            "phases": {name: of_step.medians() for name, of_step in phases.items()},
        },
        f"{title}: "
        + "   ".join(f"{name} {1e3 * value:.1f} ms" for name, value in medians.items())
        + f"; plain over ours {medians['plain'] / medians['ours']:.2f}, exchange over copy and floor {exchange:.2f}",
    )
    trainer.close()
    sharded.close()


def check_cost() -> None:
    """Reports what the check that all ranks have the same batch costs a step of the demo."""
    make_model = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "train_digits.py"))["make_model"]
    model = make_model()
    trainer = create_distributed_trainer(model)
    optimizer, criterion = torch.optim.Adam(model.parameters()), nn.CrossEntropyLoss()
    inputs, targets = torch.randn(128, 1, 8, 8), torch.randint(0, 10, (128,))
    contenders = {
        "step": lambda: trainer.train_step(inputs, targets, criterion, optimizer),
        "check": lambda: trainer._check_same_batch({"inputs": inputs, "targets": targets}),
    }
    # Every check behind a step, as in training. A rank that is late would be waited for in the step's next collective,
    # were there no check. The engine's barrier lets all ranks go within microseconds, MPI's does not.
    medians = interleave(contenders, 10.0, align=lambda: trainer._group.barrier().wait(), turn_seconds=0.0, warm=False)
    report(
        {"benchmark": "check_cost", "seconds": medians},
        f"demo: step {1e3 * medians['step']:.2f} ms, of which comparing the batch {1e6 * medians['check']:.0f} us "
        f"({medians['check'] / medians['step']:.1%})",
    )
    trainer.close()


def main() -> None:
    """Reports each model, and the check of the batches."""
    job = jobs.start(None, None)
    dist.init_process_group("gloo", store=job.store, rank=job.rank, world_size=job.engine.size)
    if job.rank == 0:
        print(f"training step with Adam, {job.summary}, allocator: {os.environ.get('DTRAIN_MALLOC', 'ours')}")
    torch.manual_seed(0)
    mlp, transformer = make_mlp(), Transformer()
    tokens = torch.randint(0, 65, (4, 64))
    compare("MLP 25 M, 32 samples per rank", mlp, torch.randn(32, 1024), torch.randint(0, 1000, (32,)))
    if "mlp" not in sys.argv:
        compare("transformer 10.7 M, 4x64 tokens per rank", transformer, tokens, tokens)
        check_cost()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
