# SPDX-License-Identifier: Apache-2.0
"""all_reduce (float32, sum, in place) beside gloo and MPI_Allreduce: mpirun -np 2 python benchmarks/all_reduce.py

"engine" is the engine's call on memory that the ranks allocated together, as the trainer's buckets are; "dist, bucket"
the same memory through torch.distributed; "dist, any tensor" ordinary memory. "floor" is a bare loop that does the same
loads and stores (floor.cpp).
"""

from datetime import timedelta

import torch
import torch.distributed as dist
from floor import Floor
from measure import interleave, report
from mpi4py import MPI

from distributed_trainer import job as jobs

SIZES_BYTES = [8, 64 << 10, 1 << 20, 4 << 20, 25 << 20, 100 << 20]
SECONDS_PER_SIZE = 2.0


def main() -> None:
    """Prints one line for each size: milliseconds of every contender."""
    job = jobs.start(None, None)
    dist.init_process_group("shmpi", init_method="mpi://")
    group = dist.group.WORLD
    gloo = dist.ProcessGroupGloo(dist.PrefixStore("bench", job.store), job.rank, job.engine.size, timedelta(minutes=2))
    if job.rank == 0:
        print(f"all_reduce, {job.summary}, kernels {job.module.kernel_isa()}")
        print("median milliseconds; in brackets, the time of the engine over that")
    for num_bytes in SIZES_BYTES:
        bucket = group.allocate(num_bytes).view(torch.float32)
        ordinary = torch.zeros(num_bytes // 4)
        array = ordinary.numpy()
        contenders = {
            "engine": lambda tensor=bucket: group._group.all_reduce(tensor).wait(),
            "dist, bucket": lambda tensor=bucket: dist.all_reduce(tensor),
            "dist, any tensor": lambda tensor=ordinary: dist.all_reduce(tensor),
            "MPI_Allreduce": lambda array=array: MPI.COMM_WORLD.Allreduce(MPI.IN_PLACE, array),
            "gloo": lambda tensor=ordinary: gloo.allreduce([tensor]).wait(),
        }
        if num_bytes >= 64 << 10:
            contenders["floor"] = Floor(num_bytes // 4 // (16 * job.engine.size) * 16 * job.engine.size)
        results = interleave(contenders, SECONDS_PER_SIZE, lambda: group.barrier().wait())
        ours = results["engine"]
        columns = [f"{name} {1e3 * value:.4g} ({ours / value:.2f})" for name, value in results.items()]
        report(
            {"benchmark": "all_reduce", "KiB": num_bytes / 1024, "ranks": job.engine.size, "seconds": results},
            f"{num_bytes / 1024:8.5g} KiB  " + "   ".join(columns),
        )
        group.release(bucket)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
