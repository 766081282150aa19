# SPDX-License-Identifier: Apache-2.0
"""What `run --elastic` costs, and how soon training goes on: python benchmarks/elastic.py

"recovery" is from the kill of a rank between two steps, while the others are in the next one, until these have made
it. "step" is the median of the slowest rank, and of launches with `--elastic` and without, which take turns.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from torch import nn

NUM_KILLS = 12
NUM_STEPS = {"small": 1000, "batchnorm": 200}
NUM_LAUNCHES = 7  # of each kind
NUM_FIRST_STEPS = 40  # do not count


def make_model(name: str) -> nn.Module:
    """Input [N, 256], output [N, 10]."""
    if name == "small":
        return nn.Sequential(nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10))
    blocks = [(nn.Linear(512, 512), nn.BatchNorm1d(512), nn.ReLU()) for _ in range(3)]
    layers = [layer for block in blocks for layer in block]
    return nn.Sequential(nn.Linear(256, 512), *layers, nn.Linear(512, 10))


def train(name: str, num_steps: int, folder: Path, victims: list[int]) -> None:
    """On each rank: writes the times of its steps, and of its death, to the folder."""
    from distributed_trainer import create_distributed_trainer

    torch.manual_seed(0)
    model = make_model(name)
    optimizer, criterion = torch.optim.SGD(model.parameters(), lr=0.01), nn.CrossEntropyLoss()
    inputs, targets = torch.randn(64, 256), torch.randint(0, 10, (64,))
    trainer = create_distributed_trainer(model)
    rank, steps = trainer.rank, []
    for step in range(num_steps):
        if victims and step >= 20 and step % 20 == 0 and victims[step // 20 - 1 :][:1] == [rank]:
            time.sleep(0.1)  # the others wait in the step by now
            (folder / f"killed-{step}").write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
        began = time.time()
        trainer.train_step(inputs, targets, criterion, optimizer)
        steps.append((began, time.time()))
    (folder / f"steps-{rank}").write_text(json.dumps(steps))
    trainer.close()


def launch(options: list[str], num_ranks: int, name: str, num_steps: int, victims: list[int]) -> Path:
    """Has `train` run on ranks; returns the folder."""
    folder = Path(tempfile.mkdtemp())
    command = [sys.executable, "-m", "distributed_trainer", "run", *options, "-np", str(num_ranks), __file__]
    words = [name, str(num_steps), str(folder), json.dumps(victims)]
    subprocess.run([*command, *words], check=True, capture_output=True, stdin=subprocess.DEVNULL, timeout=300)
    return folder


def steps_of(folder: Path) -> list[list[tuple[float, float]]]:
    """Of each rank that has lived: when its steps began and ended."""
    return [json.loads(file.read_text()) for file in folder.glob("steps-*")]


def recovery_seconds(num_ranks: int) -> list[float]:
    """Of one launch: for each rank that is killed, with others, until one is left."""
    folder = launch(["--elastic"], num_ranks, "small", 20 * num_ranks, list(range(num_ranks - 1)))
    kills = {int(file.name.split("-")[1]): float(file.read_text()) for file in folder.glob("killed-*")}
    return [max(rank[step][1] for rank in steps_of(folder)) - at for step, at in sorted(kills.items())]


def step_seconds(options: list[str], num_ranks: int, name: str) -> float:
    """Of one launch: the median on the slowest rank."""
    ranks = steps_of(launch(options, num_ranks, name, NUM_STEPS[name], []))
    return max(median(end - began for began, end in steps[NUM_FIRST_STEPS:]) for steps in ranks)


def main() -> None:
    """Reports both."""
    for num_ranks in (3, 4):
        times = [one for _ in range(NUM_KILLS // (num_ranks - 1)) for one in recovery_seconds(num_ranks)]
        text = f"median {1e3 * median(times):.0f} ms, max {1e3 * max(times):.0f} ms of {len(times)} kills"
        print(f"recovery, from {num_ranks} ranks to 1: {text}", flush=True)
    for name in NUM_STEPS:
        num_parameters = sum(parameter.numel() for parameter in make_model(name).parameters())
        kinds = ([], ["--elastic"])
        pairs = [[step_seconds(options, 2, name) for options in kinds] for _ in range(NUM_LAUNCHES)]
        usual, elastic = (median(times) for times in zip(*pairs, strict=True))
        text = f"{1e3 * usual:.3f} ms, elastic {1e3 * elastic:.3f} ms of {NUM_LAUNCHES} launches each"
        print(f"step of {name}, {num_parameters} parameters, 2 ranks: {text}", flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        train(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), json.loads(sys.argv[4]))
    else:
        main()
