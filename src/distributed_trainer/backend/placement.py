# SPDX-License-Identifier: Apache-2.0
"""Choose a rank's device and number of threads, from what all ranks found on their machines."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

import torch

from ..launch import devices
from ..launch.launcher import Launcher, cpus_of_launcher
from .engine_group import EngineGroup
from .gather import gather_objects

if TYPE_CHECKING:
    from .._engine import Engine

logger = logging.getLogger("distributed_trainer")


@dataclass(frozen=True)
class Placement:
    """Device of a rank, and the threads of all ranks for the start-up line."""

    device: torch.device
    """The rank's device."""
    threads_of_ranks: Sequence[str]
    """`Threads.text` of all ranks."""


def place(
    group: EngineGroup,
    engine: Engine,
    num_gpus: int | None,
    launcher: Launcher | None,
    cpu_limit: tuple[int, float] | None,
) -> Placement:
    """Choose this rank's device and number of threads, and set the latter. Rank 0 logs warnings. Collective, blocks.

    Args:
        group: All ranks of the engine.
        engine: The engine of these ranks.
        num_gpus: Devices per machine, None for as many as the launcher started ranks.
        launcher: Launcher that started this process, None without one.
        cpu_limit: `host_facts.cpu_limit` of this rank.

    Raises:
        LaunchError: The machine's devices do not suffice for its ranks.
    """
    nodes = engine.node_of_rank
    local_ranks = [rank for rank, node in enumerate(nodes) if node == nodes[engine.rank]]
    local_rank = local_ranks.index(engine.rank)
    visible, limits = zip(*gather_objects(group, (devices.visible_devices(), cpu_limit)), strict=True)
    cores = [set(engine.cores_of(rank)) for rank in local_ranks]
    local_limits = [limits[rank] for rank in local_ranks]
    threads = devices.fit_threads(cores, local_rank, os.environ, cpus_of_launcher(launcher), local_limits)
    threads_of_ranks, warnings = zip(*gather_objects(group, (threads.text, threads.warning)), strict=True)
    local_visible = [visible[rank] for rank in local_ranks]
    num_visible = len({name for names in local_visible for name in names})
    _, notice = devices.resolve_num_gpus(num_gpus, len(local_ranks) if launcher else None, num_visible)
    accelerator = torch.accelerator.current_accelerator()
    device = devices.pick_device(local_visible, local_rank, accelerator.type if accelerator else "cpu")
    _set_threads(threads.number, engine.size, cpu_limit)
    if engine.rank == 0:
        _warn(notice, [warnings[nodes.index(node)] for node in range(max(nodes) + 1)])
    return Placement(device, threads_of_ranks)


def _set_threads(number: int | None, num_ranks: int, cpu_limit: tuple[int, float] | None) -> None:
    if number is None:  # the user has set the number
        return
    if num_ranks > 1:
        torch.set_num_threads(number)
    elif cpu_limit is not None:  # torch does not know the limit
        torch.set_num_threads(min(torch.get_num_threads(), math.ceil(cpu_limit[1])))


def _warn(notice: str | None, bindings_of_nodes: Sequence[str | None]) -> None:
    badly_bound = list(filter(None, bindings_of_nodes))
    if len(badly_bound) > 1:
        badly_bound = [f"{badly_bound[0]} (and the same on {len(badly_bound) - 1} more)"]
    for line in filter(None, [notice, *badly_bound]):
        logger.warning(line)


def summarize(module: ModuleType, nodes: Sequence[int], placement: Placement) -> str:
    """Return the start-up line: MPI, ranks, machines, devices and threads. Local.

    Args:
        module: The engine's module.
        nodes: Number of each rank's machine.
        placement: This rank's placement.
    """

    def count(number: int, what: str) -> str:
        return f"{number} {what}{'s' if number > 1 else ''}"

    size, num_nodes = len(nodes), max(nodes) + 1
    device = placement.device
    threads = list(dict.fromkeys(placement.threads_of_ranks))  # machines may differ
    threads[2:] = ["others"] if len(threads) > 2 else []
    facts = [
        " ".join(module.library_version().split(",")[0].split()),
        f"{count(size, 'rank')} on {count(num_nodes, 'machine')}",
        "CPU (no GPU found)" if device.type == "cpu" else f"one {device.type} device per rank",
        " or ".join(threads) if size > 1 else f"{count(torch.get_num_threads(), 'thread')}",
    ]
    if size > 1:
        facts.append("over shared memory" if num_nodes == 1 else "over shared memory and, between machines, MPI")
    return ", ".join(facts)
