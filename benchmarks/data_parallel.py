# SPDX-License-Identifier: Apache-2.0
"""Measure torch's DistributedDataParallel and fully_shard on shmpi beside gloo: steps with Adam.

    mpirun --bind-to none -np 2 python benchmarks/data_parallel.py

Each rank has a different part of the batch. Each layer with parameters is a unit of fully_shard.
"""

import argparse
import copy

import torch.distributed as dist
from measure import interleave, start_groups
from models import Subject, make_step, make_subjects
from table import Table, make_parser
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel


def sharded(model: nn.Module, group: dist.ProcessGroup) -> nn.Module:
    """Put each layer with parameters under fully_shard, and then the rest of the model; return the model."""
    mesh = DeviceMesh.from_group(group, "cpu")
    layers = model.layers.layers if hasattr(model, "layers") else [m for m in model if isinstance(m, nn.Linear)]
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def compare(subject: Subject, groups: dict[str, dist.ProcessGroup], options: argparse.Namespace, table: Table) -> None:
    """Add a subject's rows to the table. Collective, blocks."""
    rank, size = dist.get_rank(), dist.get_world_size()
    part = [tensor.chunk(size)[rank] for tensor in subject.batch]
    contenders = {}
    for name, group in groups.items():
        ddp = DistributedDataParallel(copy.deepcopy(subject.model), process_group=group)
        contenders[f"DDP {name}"] = make_step(ddp, *part)
        contenders[f"FSDP2 {name}"] = make_step(sharded(copy.deepcopy(subject.model), group), *part)
    medians = interleave(contenders, options, turn_seconds=1.0)
    for wrapper in ("DDP", "FSDP2"):
        table.add(f"{subject.title}, {wrapper}", {name: medians[f"{wrapper} {name}"] for name in groups})


def main() -> None:
    """Print the table, which has a row for each model and wrapper."""
    options = make_parser(__doc__, seconds=20.0).parse_args()
    gloo = start_groups()
    groups = {"shmpi": dist.group.WORLD, "gloo": gloo}
    title = f"A training step on {dist.get_world_size()} ranks"
    table = Table(title, "model, wrapper", list(groups), ratios="time")
    for subject in make_subjects(dist.get_world_size(), options.quick):
        compare(subject, groups, options, table)
    table.show(options.results)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
