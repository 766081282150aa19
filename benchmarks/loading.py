# SPDX-License-Identifier: Apache-2.0
"""Measure an epoch in which every rank reads whole batches beside one with trainer.loader, and loaders of all kinds.

    mpirun --bind-to none -np 2 python benchmarks/loading.py

An epoch has 512 images of 3x64x64, which the reading rank itself resizes and flips, and trains a small convolutional
network. "nothing read" trains on batches that are in memory already.

The second table has the samples that all ranks together read in a second from each kind of loader, without training,
beside torch's DataLoader with its DistributedSampler (or the same sampler, in which each rank draws its share of the
samples), or with a dataset that divides the samples by itself. Where every rank reads the whole stream, both do.
"""

from collections import deque
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from measure import interleave
from mpi4py import MPI
from table import Table, make_parser
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    WeightedRandomSampler,
    get_worker_info,
)
from torch.utils.data.distributed import DistributedSampler

from distributed_trainer import DistributedTrainer, create_distributed_trainer

BATCH_SIZE = 32
NUM_WORKERS = 2


class Images(Dataset):
    """Random images, with some work for each that is read."""

    def __init__(self, num_samples: int) -> None:
        self.raw = torch.randint(0, 256, (num_samples, 3, 256, 256), dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self.raw)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image = F.interpolate(self.raw[index : index + 1].float(), 64, mode="bilinear", antialias=True)[0]
        return image.flip(-1) if torch.rand(()) < 0.5 else image, index % 10


class Stream(IterableDataset):
    """Images of some numbers, of which each worker reads its share."""

    def __init__(self, images: Images, numbers: range) -> None:
        self.images, self.numbers = images, numbers

    def shard(self, num_shards: int, index: int) -> "Stream":
        return Stream(self.images, self.numbers[index::num_shards])

    def __iter__(self) -> Iterator[tuple[torch.Tensor, int]]:
        info = get_worker_info()
        numbers = self.numbers if info is None else self.numbers[info.id :: info.num_workers]
        return (self.images[number] for number in numbers)


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


def read(loader: object) -> Callable[[], object]:
    """Return a function that reads an epoch of a loader."""
    return lambda: deque(loader, maxlen=0)


def loaders_of_all_kinds(
    trainer: DistributedTrainer, images: Images
) -> Iterator[tuple[str, dict[str, Callable[[], object]]]]:
    """Yield the name of each kind, and functions that read an epoch of torch's loader and of ours."""
    num_samples, rank, world_size = len(images), trainer.rank, trainer.world_size
    own_size, weights = BATCH_SIZE // world_size, torch.rand(num_samples)
    stream = Stream(images, range(num_samples))

    def distributed() -> DistributedSampler:
        return DistributedSampler(images, world_size, rank)

    for workers in (0, NUM_WORKERS):
        options = {"num_workers": workers, "persistent_workers": True} if workers else {}
        kinds = {
            "shuffled": (
                DataLoader(images, own_size, sampler=distributed(), **options),
                trainer.loader(images, BATCH_SIZE, shuffle=True, **options),
            ),
            "sampler": (
                DataLoader(
                    images, own_size, sampler=WeightedRandomSampler(weights, num_samples // world_size), **options
                ),
                trainer.loader(images, BATCH_SIZE, sampler=WeightedRandomSampler(weights, num_samples), **options),
            ),
            "batch_sampler": (
                DataLoader(images, batch_sampler=BatchSampler(distributed(), own_size, False), **options),
                trainer.loader(images, batch_sampler=BatchSampler(RandomSampler(images), BATCH_SIZE, False), **options),
            ),
            "stream": (
                DataLoader(stream, BATCH_SIZE, **options),
                trainer.loader(stream, BATCH_SIZE, **options),
            ),
            "sharded stream": (
                DataLoader(stream.shard(world_size, rank), own_size, **options),
                trainer.loader(stream, BATCH_SIZE, stream="sharded", **options),
            ),
        }
        for name, (plain, ours) in kinds.items():
            row = f"{name}, {workers} workers" if workers else name
            yield row, {"torch": read(plain), "trainer.loader": read(ours)}


def main() -> None:
    """Print the tables."""
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
    title = f"Loaders on {MPI.COMM_WORLD.size} ranks"
    table = Table(title, "kind", ["torch", "trainer.loader"], unit="samples per second", scale=1.0, ratios="size")
    with create_distributed_trainer(make_model()) as trainer:
        for kind, contenders in loaders_of_all_kinds(trainer, dataset):
            times = interleave(contenders, options, turn_seconds=0.0, warm=False)
            table.add(kind, {name: num_samples / seconds for name, seconds in times.items()})
    table.show(options.results)


if __name__ == "__main__":
    main()
