# SPDX-License-Identifier: Apache-2.0
"""torch.distributed's operations on shmpi beside gloo, on CPU tensors of float32.

    mpirun -np 2 python benchmarks/collectives.py
    python benchmarks/collectives.py --hosts 2 --gbit 10    two hosts made of namespaces; needs root

Sizes are of the larger tensor of a call: for all_gather its output, for reduce_scatter its input.
"""

import argparse
import functools
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

SIZES_BYTES = [8, 1 << 10, 64 << 10, 1 << 20, 25 << 20, 100 << 20]


def calls(group: object, num_bytes: int) -> dict[str, Callable[[], object]]:
    """What each operation does on a group."""
    import torch
    import torch.distributed as dist

    rank, size = group.rank(), group.size()
    whole = torch.zeros(max(1, num_bytes // 4 // size) * size)
    part = torch.zeros(len(whole) // size)
    other = torch.zeros_like(whole)

    def ring() -> None:
        received = group.recv([other], (rank - 1) % size, 0)
        group.send([whole], (rank + 1) % size, 0).wait()
        received.wait()

    return {
        "all_reduce": lambda: group.allreduce([whole]).wait(),
        "broadcast": lambda: group.broadcast([whole], dist.BroadcastOptions()).wait(),
        "all_gather": lambda: group._allgather_base(whole, part).wait(),
        "reduce_scatter": lambda: group._reduce_scatter_base(part, whole).wait(),
        "all_to_all": lambda: group.alltoall_base(other, whole, [], []).wait(),
        "send and recv": ring,
        **({"barrier": lambda: group.barrier().wait()} if num_bytes == SIZES_BYTES[0] else {}),
    }


def run_rank(options: argparse.Namespace) -> None:
    """On each rank: measures everything and prints a line for each operation and size."""
    import torch.distributed as dist
    from measure import interleave, report
    from mpi4py import MPI

    from distributed_trainer import job as jobs

    job = jobs.start(None, None)
    group = job.create_group()
    gloo = dist.ProcessGroupGloo(dist.PrefixStore("bench", job.store), job.rank, job.engine.size, timedelta(minutes=2))
    # gloo sleeps while it waits: no rank disturbs the last one.
    align = functools.partial(lambda barrier: barrier().wait(), gloo.barrier if options.hosts > 1 else group.barrier)
    worst: dict[str, float] = {}
    for num_bytes in options.bytes:
        ours, theirs = calls(group, num_bytes), calls(gloo, num_bytes)
        for name in ours:
            if options.only and name not in options.only:
                continue
            seconds = interleave({"shmpi": ours[name], "gloo": theirs[name]}, options.seconds, align)
            ratio = seconds["shmpi"] / seconds["gloo"]
            worst[name] = max(worst.get(name, 0.0), ratio)
            columns = "   ".join(f"{who} {1e3 * value:.4g} ms" for who, value in seconds.items())
            report(
                {"benchmark": name, "KiB": num_bytes / 1024, "ranks": job.engine.size, "seconds": seconds},
                f"{name:15} {num_bytes / 1024:9.5g} KiB   {columns}   ratio {ratio:.2f}",
            )
    if MPI.COMM_WORLD.rank == 0:
        print("largest ratios: " + ", ".join(f"{name} {ratio:.2f}" for name, ratio in worst.items()), flush=True)


def main() -> int:
    """Runs here, or on hosts that it makes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--bytes", type=int, nargs="+", default=SIZES_BYTES)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each operation and size")
    parser.add_argument("--only", nargs="+", default=[], help="names of operations")
    parser.add_argument("--hosts", type=int, default=1)
    parser.add_argument("--ranks-per-host", type=int, default=1)
    parser.add_argument("--gbit", type=float, default=10, help="rate of each host's link, each way")
    options = parser.parse_args()
    if options.hosts == 1 or "OMPI_COMM_WORLD_RANK" in os.environ:
        run_rank(options)
        return 0
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from hosts import Hosts

    with Hosts(options.hosts) as hosts:
        hosts.set_rate(options.gbit)
        process = hosts.mpirun([options.ranks_per_host] * options.hosts, [sys.executable, *sys.argv], [])
        process.communicate()
        return process.returncode


if __name__ == "__main__":
    sys.exit(main())
