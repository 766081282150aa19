# SPDX-License-Identifier: Apache-2.0
"""Run the same training with torch's DistributedDataParallel, with this package, and in one process.

mpirun -np 3 python examples/from_ddp.py

The number of ranks does not divide the batches. DistributedDataParallel takes the mean of the ranks' means, and its
sampler adds samples so that all ranks have equally many. So it minimizes another function than one process does. With
this package a script needs no sampler, `set_epoch`, wrapped model, or address and port of the process group.
"""

import copy

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from distributed_trainer import create_distributed_trainer

NUM_EPOCHS, BATCH_SIZE = 3, 30


def with_ddp(model: nn.Module, dataset: TensorDataset) -> None:
    """Train with DistributedDataParallel as with torchrun, but ranks find each other by MPI (the backend `shmpi`)."""
    dist.init_process_group("shmpi", init_method="mpi://")
    wrapped = DistributedDataParallel(model)
    sampler = DistributedSampler(dataset, shuffle=False)
    loader = DataLoader(dataset, batch_size=BATCH_SIZE // dist.get_world_size(), sampler=sampler)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    criterion = nn.CrossEntropyLoss()
    for epoch in range(NUM_EPOCHS):
        sampler.set_epoch(epoch)
        for inputs, targets in loader:
            optimizer.zero_grad()
            loss = criterion(wrapped(inputs), targets)
            loss.backward()
            optimizer.step()
    dist.destroy_process_group()


def with_trainer(model: nn.Module, dataset: TensorDataset) -> int:
    """Train with a trainer of this package; return this rank."""
    trainer = create_distributed_trainer(model)
    loader = trainer.loader(dataset, batch_size=BATCH_SIZE)  # BATCH_SIZE is that of the global batch
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    criterion = nn.CrossEntropyLoss()
    for _ in range(NUM_EPOCHS):
        for inputs, targets in loader:
            trainer.train_step(inputs, targets, criterion, optimizer)
    return trainer.rank


def in_one_process(model: nn.Module, dataset: TensorDataset) -> None:
    """Train in one process, as the reference for both."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    criterion = nn.CrossEntropyLoss()
    for _ in range(NUM_EPOCHS):
        for inputs, targets in DataLoader(dataset, batch_size=BATCH_SIZE):
            optimizer.zero_grad()
            criterion(model(inputs), targets).backward()
            optimizer.step()


def main() -> None:
    """Print how much the weights differ from those of one process."""
    torch.manual_seed(0)
    dataset = TensorDataset(torch.randn(100, 20, dtype=torch.float64), torch.arange(100) % 3)
    alone = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 3)).double()
    ddp, ours = copy.deepcopy(alone), copy.deepcopy(alone)
    in_one_process(alone, dataset)
    with_ddp(ddp, dataset)
    rank = with_trainer(ours, dataset)
    weights = [nn.utils.parameters_to_vector(model.parameters()) for model in (alone, ddp, ours)]
    apart = [((other - weights[0]).abs().max() / weights[0].abs().max()).item() for other in weights[1:]]
    if rank == 0:
        print(f"apart from one process: DistributedDataParallel {apart[0]:.1e}, distributed_trainer {apart[1]:.1e}")


if __name__ == "__main__":
    main()
