# SPDX-License-Identifier: Apache-2.0
"""The same training with torch's DistributedDataParallel, with this package, and in one process.

mpirun -np 3 python examples/from_ddp.py

The batches do not divide by the ranks. DistributedDataParallel takes the mean of the ranks' means, and its sampler adds
samples so that all ranks have as many; so it trains another function than one process does. What goes away on the way
here: the sampler, `set_epoch`, the wrapped model, the process group's address and port.
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
    """As with torchrun, but that MPI tells the ranks of each other (`shmpi`, this package's backend)."""
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
    """The same with a trainer. Returns this rank."""
    trainer = create_distributed_trainer(model)
    loader = trainer.loader(dataset, batch_size=BATCH_SIZE)  # of the global batch
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    criterion = nn.CrossEntropyLoss()
    for _ in range(NUM_EPOCHS):
        for inputs, targets in loader:
            trainer.train_step(inputs, targets, criterion, optimizer)
    return trainer.rank


def in_one_process(model: nn.Module, dataset: TensorDataset) -> None:
    """What both stand for."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    criterion = nn.CrossEntropyLoss()
    for _ in range(NUM_EPOCHS):
        for inputs, targets in DataLoader(dataset, batch_size=BATCH_SIZE):
            optimizer.zero_grad()
            criterion(model(inputs), targets).backward()
            optimizer.step()


def main() -> None:
    """Prints how far the weights are from those of one process."""
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
