# SPDX-License-Identifier: Apache-2.0
"""Measure the time that `run --elastic` costs, and that a recovery takes: python benchmarks/elastic.py

A rank is killed between two steps, while the others are in the next step. "recovery" lasts from the kill until these
have completed that step. A step's figure is the median of the slowest rank, and of launches with `--elastic` and
without, which take turns.
"""

import json
import os
import signal
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from table import Table, make_parser, run_on_ranks
from torch import nn

NUM_STEPS = {"small": 1000, "batchnorm": 200}
NUM_FIRST_STEPS = 40  # these steps do not count


def make_model(name: str) -> nn.Module:
    """Make a model with input [N, 256] and output [N, 10]."""
    if name == "small":
        return nn.Sequential(nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10))
    blocks = [(nn.Linear(512, 512), nn.BatchNorm1d(512), nn.ReLU()) for _ in range(3)]
    layers = [layer for block in blocks for layer in block]
    return nn.Sequential(nn.Linear(256, 512), *layers, nn.Linear(512, 10))


def train(name: str, num_steps: int, folder: Path, victims: list[int]) -> None:
    """Write the times of this rank's steps, and of its kill, to the folder. Runs on each rank."""
    from distributed_trainer import create_distributed_trainer

    torch.manual_seed(0)
    model = make_model(name)
    optimizer, criterion = torch.optim.SGD(model.parameters(), lr=0.01), nn.CrossEntropyLoss()
    inputs, targets = torch.randn(64, 256), torch.randint(0, 10, (64,))
    trainer = create_distributed_trainer(model)
    rank, steps = trainer.rank, []
    for step in range(num_steps):
        if victims and step >= 20 and step % 20 == 0 and victims[step // 20 - 1 :][:1] == [rank]:
            time.sleep(0.1)  # by now the other ranks wait in the step
            (folder / f"killed-{step}").write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
        began = time.time()
        trainer.train_step(inputs, targets, criterion, optimizer)
        steps.append((began, time.time()))
    (folder / f"steps-{rank}").write_text(json.dumps(steps))
    trainer.close()


def launch(run_options: list[str], num_ranks: int, name: str, num_steps: int, victims: list[int]) -> tuple[list, list]:
    """Run `train` on ranks.

    Returns:
        The begins and ends of the steps of each rank that survived, and (step, time) of each kill.
    """
    with tempfile.TemporaryDirectory() as folder:
        words = ["--train", name, str(num_steps), folder, json.dumps(victims)]
        run_on_ranks(num_ranks, Path(__file__), *words, is_quiet=True, run_options=run_options)
        steps = [json.loads(file.read_text()) for file in Path(folder).glob("steps-*")]
        files = Path(folder).glob("killed-*")
        return steps, sorted((int(file.name.split("-")[1]), float(file.read_text())) for file in files)


def recovery_seconds(num_ranks: int) -> list[float]:
    """Return the seconds of the recovery from each kill in one launch, which leaves one rank."""
    steps, kills = launch(["--elastic"], num_ranks, "small", 20 * num_ranks, list(range(num_ranks - 1)))
    return [max(rank[step][1] for rank in steps) - at for step, at in kills]


def step_seconds(run_options: list[str], num_ranks: int, name: str, num_steps: int) -> float:
    """Return the median seconds of a step in one launch, on the slowest rank."""
    ranks, _ = launch(run_options, num_ranks, name, num_steps, [])
    return max(median(end - began for began, end in steps[NUM_FIRST_STEPS:]) for steps in ranks)


def main() -> None:
    """Print the tables."""
    parser = make_parser(__doc__, seconds=0.0)
    parser.add_argument("--kills", type=int, default=12, help="kills for each number of ranks")
    parser.add_argument("--launches", type=int, default=7, help="launches of each kind")
    parser.add_argument("--train", nargs=4, metavar=("NAME", "STEPS", "FOLDER", "VICTIMS"), help="used on ranks")
    options = parser.parse_args()
    if options.train:
        name, num_steps, folder, victims = options.train
        train(name, int(num_steps), Path(folder), json.loads(victims))
        return
    if options.quick:
        options.kills, options.launches = 1, 1
    recovery = Table("Recovery after a kill", "ranks", ["median", "max"])
    for num_ranks in (3, 4):
        num_launches = max(1, options.kills // (num_ranks - 1))
        times = [one for _ in range(num_launches) for one in recovery_seconds(num_ranks)]
        recovery.add(f"from {num_ranks} to 1", {"median": median(times), "max": max(times)})
    recovery.show(options.results)
    kinds = {"run": [], "run --elastic": ["--elastic"]}
    steps = Table("A training step on 2 ranks", "model", list(kinds), ratios="time")
    for name, num_steps in NUM_STEPS.items():
        num_steps = 2 * NUM_FIRST_STEPS if options.quick else num_steps
        times = {kind: [] for kind in kinds}
        for _ in range(options.launches):
            for kind, run_options in kinds.items():
                times[kind].append(step_seconds(run_options, 2, name, num_steps))
        steps.add(name, {kind: median(values) for kind, values in times.items()})
    steps.show(options.results)


if __name__ == "__main__":
    main()
