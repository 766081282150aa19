# SPDX-License-Identifier: Apache-2.0
"""Choose a rank's device and number of threads, from what all ranks found on their machines."""

from __future__ import annotations

import functools
import logging
import math
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch

from ..launch import devices
from ..launch.launcher import Launcher, cpus_of_launcher
from ..launch.relaunch import command_line
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
    other_ranks: str
    """Text for the start-up line that names a process of another job on the same cores; empty if there is none."""


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
    facts = devices.visible_devices(), cpu_limit, os.getpid()
    visible, limits, pids = zip(*gather_objects(group, facts), strict=True)
    cores = [set(engine.cores_of(rank)) for rank in local_ranks]
    local_limits = [limits[rank] for rank in local_ranks]
    own_cpus = cpus_of_launcher(launcher)
    threads = devices.fit_threads(cores, local_rank, os.environ, own_cpus, local_limits)
    _set_threads(threads.number, engine.size, cpu_limit)
    crowding, other_ranks = "", ""
    if local_rank == 0 and not any(visible):  # GPUs need few cores
        num_cores = devices.num_usable_cores(cores, own_cpus, local_limits)
        if len(local_ranks) > num_cores:
            crowding = _describe_crowding(len(local_ranks), num_cores, num_gpus, max(nodes) == 0)
        # Ranks with fewer threads than cores, by OMP_NUM_THREADS, leave room for others.
        if len(local_ranks) * torch.get_num_threads() >= num_cores or threads.number is not None:
            other_ranks = _describe_ranks(devices.find_other_ranks(set(pids), set().union(*cores)))
    texts = threads.text, threads.warning or crowding, other_ranks
    threads_of_ranks, warnings, others = zip(*gather_objects(group, texts), strict=True)
    local_visible = [visible[rank] for rank in local_ranks]
    num_visible = len({name for names in local_visible for name in names})
    devices.resolve_num_gpus(num_gpus, len(local_ranks) if launcher else None, num_visible)
    accelerator = torch.accelerator.current_accelerator()
    device = devices.pick_device(local_visible, local_rank, accelerator.type if accelerator else "cpu")
    if engine.rank == 0:
        warn_of_num_gpus(num_gpus, nodes, launcher is not None)
        _warn_of_cores([warnings[nodes.index(node)] for node in range(max(nodes) + 1)])
    return Placement(device, threads_of_ranks, next(filter(None, others), ""))


def warn_of_num_gpus(num_gpus: int | None, nodes: Sequence[int], is_launched: bool) -> None:
    """Log a line if `num_gpus` has no effect, and only once, however many trainers a script makes. Local, for rank 0.

    Args:
        num_gpus: Devices per machine that the script requests.
        nodes: Number of each rank's machine.
        is_launched: Whether a launcher has started the ranks.
    """
    _, notice = devices.resolve_num_gpus(num_gpus, nodes.count(nodes[0]), 0, is_launched)
    if num_gpus is not None and notice is not None:
        _warn_once(notice + (f" For {num_gpus} type `{command_line(num_gpus)}`." if max(nodes) == 0 else ""))


def _describe_crowding(num_ranks: int, num_cores: int, num_gpus: int | None, is_only_machine: bool) -> str:
    """Return the line about more ranks than cores."""
    remedy = f"start {num_cores} there"
    if is_only_machine:
        remedy = f"type `{command_line(num_cores)}`{f', or pass num_gpus={num_cores}' if num_gpus == num_ranks else ''}"
    return (
        f"{num_ranks} ranks share the {num_cores} core(s) of {os.uname().nodename}: they compute by turns, and each "
        f"step waits for all of them. {num_cores} are usually faster: {remedy}."
    )


def _describe_ranks(pids: Sequence[int]) -> str:
    if not pids:
        return ""
    command = Path(f"/proc/{pids[0]}/cmdline").read_text(errors="replace").split("\0")[:-1]
    others = f" and {len(pids) - 1} more" if len(pids) > 1 else ""
    return f"on cores where another job computes, too (process {pids[0]}{others}: {shlex.join(command)[:80]})"


def _set_threads(number: int | None, num_ranks: int, cpu_limit: tuple[int, float] | None) -> None:
    if number is None:  # the user has set the number
        return
    if num_ranks > 1:
        torch.set_num_threads(number)
    elif cpu_limit is not None:  # torch does not know the limit
        torch.set_num_threads(min(torch.get_num_threads(), math.ceil(cpu_limit[1])))


def _warn_of_cores(warnings_of_nodes: Sequence[str]) -> None:
    first, *others = [*filter(None, warnings_of_nodes), ""]
    if first:
        logger.warning(first + (f" (and the same on {len(others) - 1} more)" if len(others) > 1 else ""))


@functools.cache
def _warn_once(line: str) -> None:
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
    facts += [placement.other_ranks] if placement.other_ranks else []
    if size > 1:
        facts.append("over shared memory" if num_nodes == 1 else "over shared memory and, between machines, MPI")
    return ", ".join(facts)
