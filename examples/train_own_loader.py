# SPDX-License-Identifier: Apache-2.0
"""Train with batches that each rank reads itself: `split_batches=False`.

mpirun -np 3 python examples/train_own_loader.py

The data are in files, and of N ranks each reads every N-th file. So ranks have loaders of different lengths and batches
of different sizes. The mean of each step is over all samples in it, and each sample counts once in an epoch.
"""

import argparse
from collections.abc import Iterator

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from distributed_trainer import create_distributed_trainer


class Files(IterableDataset):
    """One rank's digits, as if all digits were in 10 files of different sizes."""

    def __init__(self, rank: int, world_size: int) -> None:
        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32).flatten(1) / 16
        sizes = [80 + 22 * number for number in range(9)]
        sizes.append(len(images) - sum(sizes))
        files = zip(images.split(sizes), torch.tensor(digits.target).split(sizes), strict=True)
        self.files = list(files)[rank::world_size]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in self.files:
            yield from zip(images, labels, strict=True)


def main() -> None:
    """Train, and print the loss over all data after each epoch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-gpus", type=int, help="devices per machine (default: as launched)")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=32, help="samples in a batch of each rank")
    options = parser.parse_args()

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    trainer = create_distributed_trainer(model, num_gpus=options.num_gpus, split_batches=False)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    criterion = nn.CrossEntropyLoss()
    loader = DataLoader(Files(trainer.rank, trainer.world_size), batch_size=options.batch_size)

    for epoch in range(1, options.epochs + 1):
        for inputs, targets in trainer.batches(loader):  # continues until every rank has read all of its files
            trainer.train_step(inputs, targets, criterion, optimizer)
        result = trainer.evaluate(loader, criterion, {"accuracy": lambda outputs, y: outputs.argmax(1) == y})
        if trainer.is_main:
            print(f"epoch {epoch}: loss {result['loss']:.4f}, accuracy {result['accuracy']:.1%}", flush=True)


if __name__ == "__main__":
    main()
