# SPDX-License-Identifier: Apache-2.0
"""What it costs that every rank reads whole batches, beside trainer.loader: mpirun -np 2 python benchmarks/loading.py

An epoch over 512 images of 3x64x64 that are resized and flipped as they are read, by the reading rank itself, with a
small convolutional network. "nothing" trains on batches that are there already.
"""

import os
from collections.abc import Callable

import torch
import torch.nn.functional as F
from measure import interleave, report
from mpi4py import MPI
from torch import nn
from torch.utils.data import DataLoader, Dataset

from distributed_trainer import create_distributed_trainer

SECONDS = float(os.environ.get("BENCH_SECONDS", "20"))
NUM_SAMPLES, BATCH_SIZE = 512, 32


class Images(Dataset):
    """Made up, with work for each that is read."""

    def __init__(self) -> None:
        self.raw = torch.randint(0, 256, (NUM_SAMPLES, 3, 256, 256), dtype=torch.uint8)

    def __len__(self) -> int:
        return NUM_SAMPLES

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image = F.interpolate(self.raw[index : index + 1].float(), 64, mode="bilinear", antialias=True)[0]
        return image.flip(-1) if torch.rand(()) < 0.5 else image, index % 10


def make_model() -> nn.Module:
    """Input [N, 3, 64, 64], output [N, 10]."""
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, stride=2), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(512, 10)),
    )


def epoch_of(batches_of: Callable[[object], object]) -> Callable[[], object]:
    """Trains for an epoch on what `batches_of` makes of a trainer."""
    trainer = create_distributed_trainer(model := make_model())
    optimizer, criterion = torch.optim.SGD(model.parameters(), lr=0.01), nn.CrossEntropyLoss()
    batches = batches_of(trainer)

    def epoch() -> None:
        for inputs, targets in batches:
            trainer.train_step(inputs, targets, criterion, optimizer)

    return epoch


def main() -> None:
    """Reports the three."""
    torch.manual_seed(0)
    dataset = Images()
    ready = [(torch.randn(BATCH_SIZE, 3, 64, 64), torch.arange(BATCH_SIZE) % 10)] * (NUM_SAMPLES // BATCH_SIZE)
    medians = interleave(
        {
            "whole batches": epoch_of(lambda _: DataLoader(dataset, BATCH_SIZE, shuffle=True)),
            "trainer.loader": epoch_of(lambda trainer: trainer.loader(dataset, BATCH_SIZE, shuffle=True)),
            "nothing": epoch_of(lambda _: ready),
        },
        SECONDS,
        turn_seconds=0.0,
        warm=False,
    )
    report(
        {"benchmark": "loading", "ranks": MPI.COMM_WORLD.size, "seconds": medians},
        f"an epoch of {NUM_SAMPLES} images, {MPI.COMM_WORLD.size} ranks: "
        + "   ".join(f"{name} {1e3 * value:.0f} ms" for name, value in medians.items()),
    )


if __name__ == "__main__":
    main()
