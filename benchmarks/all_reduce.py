# SPDX-License-Identifier: Apache-2.0
"""all_reduce (float32, sum, in place) beside gloo and MPI_Allreduce: mpirun -np 2 python benchmarks/all_reduce.py

All contenders run in one job and take turns, round by round, so that a noisy moment meets all of them alike.
"""

import time
from collections.abc import Callable
from datetime import timedelta
from statistics import median

import torch
import torch.distributed as dist
from mpi4py import MPI

from distributed_trainer import job as jobs

SIZES_BYTES = [64 << 10, 1 << 20, 4 << 20, 25 << 20, 100 << 20]
SECONDS_PER_SIZE = 6.0


def measure(contenders: dict[str, Callable[[], object]], align: Callable[[], object]) -> dict[str, float]:
    """Median seconds of each contender's call, over rounds in which each runs once, aligned by a barrier."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for call in contenders.values():
        call()
    started = time.perf_counter()
    num_rounds = 0
    while True:
        for name, call in contenders.items():
            align()
            before = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - before)
        num_rounds += 1
        # Rank 0's clock decides for all how many rounds there are.
        is_over = time.perf_counter() - started > SECONDS_PER_SIZE and num_rounds >= 5
        if MPI.COMM_WORLD.bcast(is_over):
            return {name: MPI.COMM_WORLD.allreduce(median(values), MPI.MAX) for name, values in seconds.items()}


def main() -> None:
    """Prints one line for each size: milliseconds of every contender."""
    job = jobs.start(None, None)
    group = job.create_group()
    gloo = dist.ProcessGroupGloo(dist.PrefixStore("bench", job.store), job.rank, job.engine.size, timedelta(minutes=2))
    if job.rank == 0:
        print(f"all_reduce, {job.summary}, kernels {job.module.kernel_isa()}")
        print("median milliseconds; in brackets, how many times ours on a bucket")
    for num_bytes in SIZES_BYTES:
        bucket = group.allocate(num_bytes).view(torch.float32)
        ordinary = torch.zeros(num_bytes // 4)
        array = ordinary.numpy()
        contenders = {
            "ours, bucket": lambda bucket=bucket: group.allreduce([bucket]).wait(),
            "ours, any tensor": lambda tensor=ordinary: group.allreduce([tensor]).wait(),
            "MPI_Allreduce": lambda array=array: MPI.COMM_WORLD.Allreduce(MPI.IN_PLACE, array),
            "gloo": lambda tensor=ordinary: gloo.allreduce([tensor]).wait(),
        }
        results = measure(contenders, lambda: group.barrier().wait())
        if job.rank == 0:
            ours = results["ours, bucket"]
            columns = [f"{name} {1e3 * value:.4g} ({value / ours:.2f})" for name, value in results.items()]
            print(f"{num_bytes / 1024:8.0f} KiB  " + "   ".join(columns), flush=True)
        group.release(bucket)


if __name__ == "__main__":
    main()
