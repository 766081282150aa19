# SPDX-License-Identifier: Apache-2.0
"""Measure a training step with Adam beside plain torch and torch's DistributedDataParallel (DDP).

    mpirun --bind-to none -np 2 python benchmarks/training_step.py

All contenders but the first train on the same global batch. "plain" is the same step on every rank at once, on the
rank's part of the batch and without any exchange: the best that is possible. "one process" is plain torch on the whole
batch, with all cores, while the other ranks sleep: what a user has without ranks. The allocator's settings hold for a
whole process; with DTRAIN_MALLOC=default malloc's own settings are measured.
"""

import argparse
import copy
import os
import runpy
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from floor import Floor
from measure import interleave, start_groups
from models import Subject, describe, make_subjects, make_trainer_step
from mpi4py import MPI
from table import Table, make_parser
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distributed_trainer import create_distributed_trainer

NUM_CORES = len(os.sched_getaffinity(0))
CONTENDERS = ["plain", "ours", "ours, sharded", "DDP on shmpi", "DDP on gloo", "one process"]
PHASES = ["agreement", "forward", "backward", "exchange", "optimizer"]


class PlainStep:
    """Callable step with Adam in plain torch, which sums the seconds of its phases."""

    def __init__(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> None:
        self._model, self._inputs, self._targets = model, inputs, targets
        self._optimizer, self._criterion = torch.optim.Adam(model.parameters()), nn.CrossEntropyLoss()
        self._num_steps = 0
        self._seconds: dict[str, float] = defaultdict(float)

    def __call__(self) -> None:
        moments = [time.perf_counter()]
        self._optimizer.zero_grad()
        loss = self._criterion(self._model(self._inputs), self._targets)
        moments.append(time.perf_counter())
        loss.backward()
        moments.append(time.perf_counter())
        self._optimizer.step()
        moments.append(time.perf_counter())
        for phase, before, after in zip(("forward", "backward", "optimizer"), moments, moments[1:], strict=False):
            self._seconds[phase] += after - before
        self._num_steps += 1

    def phases(self) -> dict[str, float]:
        """Return each phase's mean over steps and ranks, as `trainer.summary()` does. Collective, blocks."""
        pairs = MPI.COMM_WORLD.allgather((self._num_steps, dict(self._seconds)))
        num_steps = sum(count for count, _ in pairs)
        return {phase: sum(seconds.get(phase, 0.0) for _, seconds in pairs) / num_steps for phase in pairs[0][1]}


def on_one_process(step: Callable[[], object], gloo: dist.ProcessGroup) -> Callable[[], object]:
    """Make rank 0 call `step` with all cores, while the other ranks sleep, as they do in gloo's barrier."""

    def call() -> None:
        if dist.get_rank() == 0:
            num_threads = torch.get_num_threads()
            torch.set_num_threads(NUM_CORES)
            step()
            torch.set_num_threads(num_threads)
        dist.barrier(group=gloo)

    return call


def compare(
    subject: Subject, options: argparse.Namespace, gloo: dist.ProcessGroup, steps: Table, exchange: Table, phases: Table
) -> None:
    """Add a subject's rows to the tables. Collective, blocks."""
    model = subject.model
    trainer = create_distributed_trainer(copy.deepcopy(model))
    sharded = create_distributed_trainer(copy.deepcopy(model), shard="optimizer")
    part = trainer.split(subject.batch)
    plain_steps = {
        "plain": PlainStep(copy.deepcopy(model), *part),
        "DDP on shmpi": PlainStep(DistributedDataParallel(copy.deepcopy(model)), *part),
        "DDP on gloo": PlainStep(DistributedDataParallel(copy.deepcopy(model), process_group=gloo), *part),
        "one process": PlainStep(copy.deepcopy(model) if dist.get_rank() == 0 else nn.Linear(1, 1), *subject.batch),
    }
    gradients = [torch.randn_like(parameter) for parameter in model.parameters()]
    buckets = [torch.empty_like(gradient) for gradient in gradients]
    unit = 16 * trainer.world_size
    contenders = {
        **plain_steps,
        "ours": make_trainer_step(trainer, *subject.batch),
        "ours, sharded": make_trainer_step(sharded, *subject.batch),
        "one process": on_one_process(plain_steps["one process"], gloo),
        # The least cost of an exchange: a copy of each gradient into a bucket, and the reduction of the buckets.
        "copy": lambda: torch._foreach_copy_(buckets, gradients),
        "floor": Floor(sum(gradient.numel() for gradient in gradients) // unit * unit),
    }
    for name in CONTENDERS:
        contenders[name]()  # buckets are built after the first step
    medians = interleave(contenders, options, turn_seconds=0.5)
    steps.add(subject.title, medians)
    cost = medians["ours"] - medians["plain"]
    exchange.add(subject.title, {"exchange": cost, "copy and floor": medians["copy"] + medians["floor"]})
    of_trainers = {"ours": trainer.summary().seconds, "ours, sharded": sharded.summary().seconds}
    for name in CONTENDERS:
        phases.add(f"{subject.title}, {name}", of_trainers[name] if name in of_trainers else plain_steps[name].phases())
    trainer.close()
    sharded.close()


def measure_agreement(options: argparse.Namespace) -> Table:
    """Measure the check that all ranks have the same batch, in a step of the demo. Collective, blocks."""
    example = Path(__file__).parents[1] / "examples" / "train_digits.py"
    trainer = create_distributed_trainer(runpy.run_path(str(example))["make_model"]())
    step = make_trainer_step(trainer, torch.randn(128, 1, 8, 8), torch.randint(0, 10, (128,)))
    # All ranks begin a step together, so that none waits for a late one when they compare the batch. From the barrier
    # of `shmpi` all ranks return within microseconds, from MPI's they do not.
    medians = interleave({"step": step}, options, align=dist.barrier, turn_seconds=0.5)
    table = Table("The comparison of the ranks' batches", "model", ["step", "agreement"], ratios="time")
    table.add("demo", {**medians, "agreement": trainer.summary().seconds["agreement"]})
    trainer.close()
    return table


def main() -> None:
    """Print the tables of steps, of the exchange's cost, of phases, and of the check of the batches."""
    parser = make_parser(__doc__, seconds=30.0)
    parser.add_argument("--only-mlp", action="store_true", help="leave out the transformer and the check of batches")
    options = parser.parse_args()
    gloo = start_groups()
    num_ranks = dist.get_world_size()
    subjects = make_subjects(num_ranks, options.quick)[: 1 if options.only_mlp else None]
    if dist.get_rank() == 0:
        allocator = os.environ.get("DTRAIN_MALLOC", "ours")
        print(f"global batch: {describe(subjects)}\none process: {NUM_CORES} threads; allocator: {allocator}")
    on_ranks = f"on {num_ranks} ranks"
    tables = (
        Table(f"A training step {on_ranks}", "model", CONTENDERS, ratios="speed"),
        Table(f"The exchange {on_ranks}: ours less plain", "model", ["exchange", "copy and floor"], ratios="speed"),
        Table(f"Phases of a step {on_ranks}, means", "step", PHASES),
    )
    for subject in subjects:
        compare(subject, options, gloo, *tables)
    for table in [*tables, *([] if options.only_mlp else [measure_agreement(options)])]:
        table.show(options.results)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
