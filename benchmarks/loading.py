# SPDX-License-Identifier: Apache-2.0
"""Measure an epoch in which every rank reads whole batches beside an epoch with trainer.loader.

    mpirun --bind-to none -np 2 python benchmarks/loading.py

An epoch has 512 images of 3x64x64, which the reading rank itself resizes and flips, and trains a small convolutional
network. "nothing read" trains on batches that are in memory already.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from measure import interleave
from mpi4py import MPI
from table import Table, make_parser
from torch import nn
from torch.utils.data import DataLoader, Dataset

from distributed_trainer import create_distributed_trainer

BATCH_SIZE = 32


class Images(Dataset):
    """Random images, with some work for each that is read."""

    def __init__(self, num_samples: int) -> None:
        self.raw = torch.randint(0, 256, (num_samples, 3, 256, 256), dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self.raw)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image = F.interpolate(self.raw[index : index + 1].float(), 64, mode="bilinear", antialias=True)[0]
        return image.flip(-1) if torch.rand(()) < 0.5 else image, index % 10


def make_model() -> nn.Module:
    """Make a model with input [N, 3, 64, 64] and output [N, 10]."""
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, stride=2), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(512, 10)),
    )


def epoch_of(batches_of: Callable[[object], object]) -> Callable[[], object]:
    """Return a function that trains a new trainer for an epoch on the batches `batches_of(trainer)`."""
    trainer = create_distributed_trainer(model := make_model())
    optimizer, criterion = torch.optim.SGD(model.parameters(), lr=0.01), nn.CrossEntropyLoss()
    batches = batches_of(trainer)

    def epoch() -> None:
        for inputs, targets in batches:
            trainer.train_step(inputs, targets, criterion, optimizer)

    return epoch


def main() -> None:
    """Print the table, which has one row."""
    options = make_parser(__doc__, seconds=20.0).parse_args()
    torch.manual_seed(0)
    num_samples = 64 if options.quick else 512
    dataset = Images(num_samples)
    ready = [(torch.randn(BATCH_SIZE, 3, 64, 64), torch.arange(BATCH_SIZE) % 10)] * (num_samples // BATCH_SIZE)
    contenders = {
        "whole batches": epoch_of(lambda _: DataLoader(dataset, BATCH_SIZE, shuffle=True)),
        "trainer.loader": epoch_of(lambda trainer: trainer.loader(dataset, BATCH_SIZE, shuffle=True)),
        "nothing read": epoch_of(lambda _: ready),
    }
    title = f"An epoch of {num_samples} images on {MPI.COMM_WORLD.size} ranks"
    table = Table(title, "what is timed", list(contenders), ratios="speed")
    table.add("epoch", interleave(contenders, options, turn_seconds=0.0, warm=False))
    table.show(options.results)


if __name__ == "__main__":
    main()
