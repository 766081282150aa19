# SPDX-License-Identifier: Apache-2.0
"""Measure torch.distributed's operations on shmpi beside gloo, on CPU tensors of float32.

    mpirun --bind-to none -np 2 python benchmarks/collectives.py
    python benchmarks/collectives.py --hosts 2 --gbit 10    two hosts made of namespaces; needs root

Sizes are those of the larger tensor of a call: for all_gather its output, for reduce_scatter its input.
"""

import argparse
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path

from table import Table, make_parser

SIZES = {"8 B": 8, "1 KiB": 1 << 10, "64 KiB": 64 << 10, "1 MiB": 1 << 20, "25 MiB": 25 << 20, "100 MiB": 100 << 20}


def calls(group: object, num_bytes: int) -> dict[str, Callable[[], object]]:
    """Return a function that calls each operation on a group."""
    import torch
    import torch.distributed as dist

    all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # its name before torch 2.13
    reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    whole = torch.zeros(max(1, num_bytes // 4 // num_ranks) * num_ranks)
    part = torch.zeros(len(whole) // num_ranks)
    other = torch.zeros_like(whole)

    def ring() -> None:
        received = dist.irecv(other, (rank - 1) % num_ranks, group)
        dist.send(whole, (rank + 1) % num_ranks, group)
        received.wait()

    return {
        "all_reduce": lambda: dist.all_reduce(whole, group=group),
        "broadcast": lambda: dist.broadcast(whole, 0, group),
        "all_gather": lambda: all_gather(whole, part, group),
        "reduce_scatter": lambda: reduce_scatter(part, whole, group=group),
        "all_to_all": lambda: dist.all_to_all_single(other, whole, group=group),
        "send and recv": ring,
        **({"barrier": lambda: dist.barrier(group)} if num_bytes == SIZES["8 B"] else {}),
    }


def run_rank(options: argparse.Namespace) -> None:
    """Measure everything and print the tables, of operations and of the largest ratios. Runs on each rank."""
    import torch.distributed as dist
    from measure import interleave, start_groups

    gloo = start_groups()
    # gloo sleeps while it waits, so no rank disturbs the last one.
    align = functools.partial(dist.barrier, gloo if options.hosts > 1 else dist.group.WORLD)
    on_ranks = f"on {dist.get_world_size()} ranks"
    table = Table(f"Operations {on_ranks}", "operation, size", ["shmpi", "gloo"], ratios="speed")
    worst: dict[str, float] = {}
    sizes = ["8 B", "64 KiB"] if options.quick else options.sizes
    for size in sizes:
        ours, theirs = calls(dist.group.WORLD, SIZES[size]), calls(gloo, SIZES[size])
        for name in ours:
            if options.only and name not in options.only:
                continue
            seconds = interleave({"shmpi": ours[name], "gloo": theirs[name]}, options, align)
            table.add(f"{name}, {size}", seconds)
            worst[name] = max(worst.get(name, 0.0), seconds["shmpi"] / seconds["gloo"])
    largest = Table(f"Largest time over gloo's {on_ranks}", "operation", ["ratio"], "of all sizes", 1)
    for name, ratio in worst.items():
        largest.add(name, {"ratio": ratio})
    table.show(options.results)
    largest.show(options.results)
    dist.destroy_process_group()


def main() -> int:
    """Run on this machine, or on hosts that this function makes."""
    parser = make_parser(__doc__, seconds=1.0)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--only", nargs="+", default=[], help="names of operations")
    parser.add_argument("--hosts", type=int, default=1)
    parser.add_argument("--ranks-per-host", type=int, default=1)
    parser.add_argument("--gbit", type=float, default=10, help="rate of each host's link in each direction")
    options = parser.parse_args()
    if options.hosts == 1 or "OMPI_COMM_WORLD_RANK" in os.environ:
        run_rank(options)
        return 0
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
    from hosts import Hosts

    with Hosts(options.hosts) as hosts:
        hosts.set_rate(options.gbit)
        process = hosts.mpirun([options.ranks_per_host] * options.hosts, [sys.executable, *sys.argv], [])
        process.communicate()
        return process.returncode


if __name__ == "__main__":
    sys.exit(main())
