# SPDX-License-Identifier: Apache-2.0
"""Measure batches split by speed beside equal parts, while another process takes half of the last rank's core.

    mpirun --bind-to none -np 2 python benchmarks/balance.py

Each rank has its own core, which it shares with its engine's thread. The two trainers take turns, a block of steps
each.
"""

import os
import subprocess
import sys
import time
from statistics import median

import torch
from table import Table, make_parser
from torch import nn

from distributed_trainer import create_distributed_trainer


def main() -> None:
    """Print the tables of steps and of each rank's samples."""
    parser = make_parser(__doc__, seconds=0.0)
    parser.add_argument("--steps", type=int, default=12, help="steps of each block")
    parser.add_argument("--blocks", type=int, default=7)
    parser.add_argument("--samples", type=int, default=2048)
    options = parser.parse_args()
    if options.quick:
        options.steps, options.blocks, options.samples = 6, 1, 256
    num_steps, num_blocks = options.steps, options.blocks

    models = [nn.Sequential(*(nn.Sequential(nn.Linear(512, 512), nn.ReLU()) for _ in range(4))) for _ in range(2)]
    trainers = {
        "equal parts": create_distributed_trainer(models[0]),
        "by speed": create_distributed_trainer(models[1], balance_speed=True),
    }
    rank, num_ranks = trainers["by speed"].rank, trainers["by speed"].world_size
    cores = sorted(os.sched_getaffinity(0))
    assert len(cores) >= num_ranks, f"{num_ranks} ranks need a core each, here are {len(cores)}"
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), {cores[rank]})
    torch.set_num_threads(1)
    neighbour = None
    if rank == num_ranks - 1:
        neighbour = subprocess.Popen([sys.executable, "-c", "while True: pass"])  # runs on the same core
    optimizers = {name: torch.optim.SGD(one.model.parameters(), lr=0.01) for name, one in trainers.items()}
    x, y = torch.randn(options.samples, 512), torch.randn(options.samples, 512)
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    try:
        for block in range(num_blocks + 1):
            for name, trainer in trainers.items():
                start = time.perf_counter()
                for _ in range(num_steps):
                    trainer.train_step(x, y, nn.MSELoss(), optimizers[name])
                if block:  # the first block finds the split, so it does not count
                    seconds[name].append((time.perf_counter() - start) / num_steps)
    finally:
        if neighbour is not None:
            neighbour.kill()
            neighbour.wait()
    steps = Table(f"A training step on {num_ranks} ranks", "what is timed", list(trainers), ratios="speed")
    steps.add("step", {name: median(times) for name, times in seconds.items()})
    samples = Table("Samples of rank 0", "batch", list(trainers), "samples", 1)
    samples.add(f"{options.samples}", {name: len(trainer.split(x)) for name, trainer in trainers.items()})
    for table in (steps, samples):
        table.show(options.results)


if __name__ == "__main__":
    main()
