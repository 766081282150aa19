# SPDX-License-Identifier: Apache-2.0
"""Memory of all ranks at the peak of backward, beside plain processes: mpirun -np 2 python benchmarks/memory.py ours

The other contenders are "sharded" and "plain".

Pss (proportional set size: a shared page counts once in all) of all ranks, in backward of the first layer, where all
gradients are there. A rank may take its buckets in the gradients' place, and 15 MiB beside its largest single gradient.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from measure import report
from mpi4py import MPI
from torch import nn
from training_step import make_mlp

from distributed_trainer import DistributedTrainer, create_distributed_trainer

MIB = 1 << 20


def pss_bytes() -> int:
    """Of this process."""
    (line,) = (line for line in Path("/proc/self/smaps_rollup").read_text().splitlines() if line.startswith("Pss:"))
    return int(line.split()[1]) * 1024


def peak(model: nn.Module, step: Callable[[], object]) -> int:
    """Summed Pss of all ranks where the first layer's gradient is known, in the last of some steps. Collective."""
    sums = []

    def look(gradient: torch.Tensor) -> None:
        MPI.COMM_WORLD.Barrier()
        sums.append(MPI.COMM_WORLD.allreduce(pss_bytes()))
        MPI.COMM_WORLD.Barrier()

    for _ in range(3):
        step()
    hook = model[1].register_full_backward_hook(lambda module, inputs, outputs: look(outputs[0]))
    step()
    hook.remove()
    return sums[-1]


def plain_step(model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> Callable[[], object]:
    """A step in plain torch, with Adam."""
    optimizer, criterion = torch.optim.Adam(model.parameters()), nn.CrossEntropyLoss()

    def step() -> None:
        optimizer.zero_grad()
        criterion(model(inputs), targets).backward()
        optimizer.step()

    return step


def our_step(trainer: DistributedTrainer, inputs: torch.Tensor, targets: torch.Tensor) -> Callable[[], object]:
    """The same with a trainer."""
    optimizer, criterion = torch.optim.Adam(trainer.model.parameters()), nn.CrossEntropyLoss()
    whole = [torch.cat([part] * trainer.world_size) for part in (inputs, targets)]
    return lambda: trainer.train_step(*whole, criterion, optimizer)


def main() -> None:
    """Reports the peak of one contender: what one leaves behind would count as the other's."""
    torch.manual_seed(0)
    model, inputs, targets = make_mlp(), torch.randn(32, 1024), torch.randint(0, 1000, (32,))
    contender = sys.argv[1]
    trainer = create_distributed_trainer(model, shard_optimizer=contender == "sharded")
    if contender == "plain":
        trainer.close()
        bytes_in_all = peak(model, plain_step(model, inputs, targets))
    else:
        bytes_in_all = peak(model, our_step(trainer, inputs, targets))
    largest = max(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    report(
        {"benchmark": "memory", "contender": contender, "ranks": trainer.world_size, "bytes": bytes_in_all},
        f"MLP 25 M, {contender}, {trainer.world_size} ranks: Pss {bytes_in_all / MIB:.0f} MiB in all "
        f"(largest gradient {largest / MIB:.0f} MiB)",
    )


if __name__ == "__main__":
    main()
