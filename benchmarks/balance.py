# SPDX-License-Identifier: Apache-2.0
"""balance="speed" beside equal parts, where a busy neighbour takes half of the last rank's core.

    mpirun -np 2 python benchmarks/balance.py

Each rank has a core of its own, and with it its engine's thread. The two trainers take turns, a block of steps each.
"""

import argparse
import os
import subprocess
import sys
import time
from statistics import median

import torch
from measure import report
from torch import nn

from distributed_trainer import create_distributed_trainer


def main() -> None:
    """Prints samples per second of both."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=12, help="of each block")
    parser.add_argument("--blocks", type=int, default=7)
    parser.add_argument("--samples", type=int, default=2048)
    options = parser.parse_args()

    models = [nn.Sequential(*(nn.Sequential(nn.Linear(512, 512), nn.ReLU()) for _ in range(4))) for _ in range(2)]
    trainers = [
        create_distributed_trainer(model, balance=kind) for model, kind in zip(models, (None, "speed"), strict=True)
    ]
    rank, num_ranks = trainers[0].rank, trainers[0].world_size
    cores = sorted(os.sched_getaffinity(0))
    assert len(cores) >= num_ranks, f"{num_ranks} ranks need a core each, here are {len(cores)}"
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), {cores[rank]})
    torch.set_num_threads(1)
    neighbour = None
    if rank == num_ranks - 1:
        neighbour = subprocess.Popen([sys.executable, "-c", "while True: pass"])  # on the same core
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.01) for model in models]
    x, y = torch.randn(options.samples, 512), torch.randn(options.samples, 512)
    seconds: list[list[float]] = [[], []]
    try:
        for block in range(options.blocks + 1):
            for trainer, optimizer, times in zip(trainers, optimizers, seconds, strict=True):
                start = time.perf_counter()
                for _ in range(options.steps):
                    trainer.train_step(x, y, nn.MSELoss(), optimizer)
                if block:  # the first finds the split
                    times.append((time.perf_counter() - start) / options.steps)
    finally:
        if neighbour is not None:
            neighbour.kill()
            neighbour.wait()
    equal, balanced = map(median, seconds)
    own = len(trainers[1].split(x))
    report(
        {"benchmark": "balance", "ranks": num_ranks, "seconds": {"equal": equal, "balanced": balanced}},
        f"equal parts {1e3 * equal:.1f} ms a step, by speed {1e3 * balanced:.1f} ms: {equal / balanced:.2f} times as "
        f"fast; rank 0 has {own} of {options.samples} samples",
    )


if __name__ == "__main__":
    main()
