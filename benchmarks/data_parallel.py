# SPDX-License-Identifier: Apache-2.0
"""torch's DistributedDataParallel and fully_shard on shmpi beside the same on gloo: steps with Adam.

mpirun -np 2 python benchmarks/data_parallel.py
"""

import copy
import runpy
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from measure import interleave, report
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import distributed_trainer  # noqa: F401  makes the backend known

SECONDS_PER_MODEL = 20.0


def step_of(model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> Callable[[], object]:
    """A step of a wrapped model."""
    optimizer, criterion = torch.optim.Adam(model.parameters()), nn.CrossEntropyLoss()

    def step() -> None:
        optimizer.zero_grad()
        criterion(model(inputs), targets).backward()
        optimizer.step()

    return step


def sharded(model: nn.Module, group: dist.ProcessGroup) -> nn.Module:
    """The model under fully_shard, each layer with parameters by itself and then the rest."""
    mesh = DeviceMesh.from_group(group, "cpu")
    layers = model.layers.layers if hasattr(model, "layers") else [m for m in model if isinstance(m, nn.Linear)]
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def compare(title: str, model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> None:
    """Reports medians of interleaved steps. `inputs` and `targets` are one rank's."""
    groups = {"shmpi": dist.group.WORLD, "gloo": dist.new_group(backend="gloo", timeout=timedelta(minutes=2))}
    contenders = {}
    for name, group in groups.items():
        ddp = DistributedDataParallel(copy.deepcopy(model), process_group=group)
        contenders[f"DDP on {name}"] = step_of(ddp, inputs, targets)
        contenders[f"FSDP2 on {name}"] = step_of(sharded(copy.deepcopy(model), group), inputs, targets)
    medians = interleave(contenders, SECONDS_PER_MODEL, turn_seconds=1.0)
    ratios = [f"{kind} {medians[f'{kind} on gloo'] / medians[f'{kind} on shmpi']:.2f}" for kind in ("DDP", "FSDP2")]
    report(
        {"benchmark": "data_parallel", "model": title, "ranks": dist.get_world_size(), "seconds": medians},
        f"{title}: "
        + "   ".join(f"{name} {1e3 * value:.1f} ms" for name, value in medians.items())
        + f"; gloo's time over shmpi's: {', '.join(ratios)}",
    )


def main() -> None:
    """Reports each model."""
    dist.init_process_group("shmpi")
    models = runpy.run_path(str(Path(__file__).parent / "training_step.py"))
    torch.manual_seed(0)
    tokens = torch.randint(0, 65, (4, 64))
    mlp_batch = torch.randn(32, 1024), torch.randint(0, 1000, (32,))
    compare("MLP 25 M, 32 samples per rank", models["make_mlp"](), *mlp_batch)
    compare("transformer 10.7 M, 4x64 tokens per rank", models["Transformer"](), tokens, tokens)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
