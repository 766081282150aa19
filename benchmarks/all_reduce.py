# SPDX-License-Identifier: Apache-2.0
"""Measure all_reduce (float32, sum, in place) beside gloo and MPI_Allreduce.

    mpirun --bind-to none -np 2 python benchmarks/all_reduce.py

torch.distributed on `shmpi` reduces "bucket", which is memory that the ranks allocated together, like the trainer's
buckets, and "any tensor", which is ordinary memory. "floor" is a plain loop with the same loads and stores (floor.cpp).
"""

import torch
import torch.distributed as dist
from floor import Floor
from measure import allocate_bucket, interleave, start_groups
from mpi4py import MPI
from table import Table, make_parser

SIZES = {"8 B": 8, "64 KiB": 64 << 10, "1 MiB": 1 << 20, "4 MiB": 4 << 20, "25 MiB": 25 << 20, "100 MiB": 100 << 20}


def main() -> None:
    """Print the table: a row for each size."""
    options = make_parser(__doc__, seconds=2.0).parse_args()
    gloo, world = start_groups(), MPI.COMM_WORLD
    columns = ["bucket", "any tensor", "MPI_Allreduce", "gloo", "floor"]
    table = Table(f"all_reduce on {world.size} ranks", "size", columns, ratios="speed")
    for size, num_bytes in list(SIZES.items())[: 3 if options.quick else None]:
        bucket = allocate_bucket(num_bytes)
        ordinary = torch.zeros(num_bytes // 4)
        array = ordinary.numpy()
        contenders = {
            "bucket": lambda tensor=bucket: dist.all_reduce(tensor),
            "any tensor": lambda tensor=ordinary: dist.all_reduce(tensor),
            "MPI_Allreduce": lambda array=array: world.Allreduce(MPI.IN_PLACE, array),
            "gloo": lambda tensor=ordinary: dist.all_reduce(tensor, group=gloo),
        }
        if num_bytes >= 64 << 10:
            contenders["floor"] = Floor(num_bytes // 4 // (16 * world.size) * 16 * world.size)
        table.add(size, interleave(contenders, options, dist.barrier))
        dist.group.WORLD.release(bucket)
    table.show(options.results)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
