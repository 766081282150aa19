# SPDX-License-Identifier: Apache-2.0
"""Measure all_reduce over two hosts made of namespaces, beside plain TCP, MPI_Allreduce and gloo; needs root.

    python benchmarks/two_hosts.py --gbit 1 10 --ranks-per-host 1 2

"wire" is one TCP connection that carries the same bytes in both directions at once: with two hosts each must send and
receive a buffer's bytes, whatever the algorithm. "bucket" is memory that the ranks of a host allocated together,
"any tensor" ordinary memory; torch.distributed on `shmpi` reduces both. "step" is a training step that has as many
bytes of gradients and little to compute.

All contenders run in one job and take turns, round by round. A contender starts on all ranks at a time agreed before,
until which all ranks sleep; the hosts share a clock. A round's figure is that of the last rank, and the table has
medians.
"""

import argparse
import functools
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from table import Table, make_parser

CONTENDERS = ["wire", "bucket", "any tensor", "MPI_Allreduce", "gloo", "step", "step, bfloat16"]
WIRE_PORT = 7077
# Settings with which Open MPI is fastest here. Its component han waits without sleeping on hosts with fewer cores than
# ranks. Rabenseifner's algorithm, number 6, first halves the data between neighbours, which are on one host.
MPI_SETTINGS = {
    "coll": "^han",
    "mpi_yield_when_idle": "1",
    "coll_tuned_use_dynamic_rules": "1",
    "coll_tuned_allreduce_algorithm": "6",
}


class Wire:
    """Plain TCP between the first ranks of both hosts; the other ranks take no part."""

    def __init__(self, world: object, host: int, is_first: bool, num_bytes: int) -> None:
        self._socket = None
        own_address = socket.gethostbyname(socket.gethostname())
        addresses = world.allgather(own_address if is_first and host == 0 else None)
        if is_first and host == 0:
            with socket.create_server((own_address, WIRE_PORT)) as server:
                world.Barrier()
                self._socket, _ = server.accept()
        else:
            world.Barrier()
            if is_first:
                self._socket = socket.create_connection((next(filter(None, addresses)), WIRE_PORT))
        self._outgoing, self._incoming = bytearray(num_bytes), bytearray(num_bytes)

    def __call__(self) -> None:
        if self._socket is None:
            return
        sender = threading.Thread(target=self._socket.sendall, args=(self._outgoing,))
        sender.start()
        received = self._socket.recv_into(self._incoming, 0, socket.MSG_WAITALL)
        sender.join()
        assert received == len(self._incoming), f"the connection ended after {received} bytes"

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()


def measure(contenders: dict[str, Callable[[], object]], options: argparse.Namespace, gloo: object) -> dict:
    """Return medians in seconds; the same on every rank. Collective, blocks."""
    import torch
    import torch.distributed as dist
    from mpi4py import MPI

    times: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    end = time.monotonic() + (0.0 if options.quick else options.seconds)
    num_rounds = 0
    while True:
        for name in names[num_rounds % len(names) :] + names[: num_rounds % len(names)]:
            start = torch.tensor([time.monotonic() + 0.02, float(time.monotonic() > end)], dtype=torch.float64)
            dist.broadcast(start, 0, gloo)  # gloo sleeps while it waits, so that no rank disturbs the last one's call
            start_time, is_over = start.tolist()
            if is_over and num_rounds > (1 if options.quick else 2):
                slowest = {
                    name: [max(row) for row in zip(*MPI.COMM_WORLD.allgather(t), strict=True)]
                    for name, t in times.items()
                }
                return {name: median(rows[1:]) for name, rows in slowest.items()}
            time.sleep(max(0.0, start_time - time.monotonic()))
            contenders[name]()
            times[name].append(time.monotonic() - start_time)
        num_rounds += 1


def make_step(num_bytes: int, wire_dtype: str | None) -> Callable[[], object]:
    """Return a training step of a linear layer with SGD, which has gradients of `num_bytes` and computes little."""
    import torch
    from torch import nn

    from distributed_trainer import create_distributed_trainer

    torch.manual_seed(0)
    model = nn.Linear(1024, max(1, num_bytes // 4 // 1024), bias=False)
    trainer = create_distributed_trainer(model, compression=wire_dtype)
    optimizer, criterion = torch.optim.SGD(model.parameters(), lr=0.01), nn.MSELoss()
    inputs, targets = torch.randn(trainer.world_size, 1024), torch.randn(trainer.world_size, model.out_features)
    return lambda: trainer.train_step(inputs, targets, criterion, optimizer)


def run_rank(options: argparse.Namespace) -> None:
    """Measure all sizes; rank 0 prints a line of JSON for each. Runs on each rank."""
    import torch
    import torch.distributed as dist
    from measure import allocate_bucket, start_groups
    from mpi4py import MPI

    gloo, world = start_groups(), MPI.COMM_WORLD
    names = world.allgather(socket.gethostname())
    is_first = names.index(names[world.rank]) == world.rank
    torch.set_num_threads(1)
    for num_bytes in options.bytes:
        wire = Wire(world, sorted(set(names)).index(names[world.rank]), is_first, num_bytes)
        ordinary, bucket = torch.zeros(num_bytes // 4), allocate_bucket(num_bytes)
        contenders = {
            "wire": wire,
            "bucket": functools.partial(dist.all_reduce, bucket),
            "any tensor": functools.partial(dist.all_reduce, ordinary),
            "MPI_Allreduce": functools.partial(world.Allreduce, MPI.IN_PLACE, ordinary.numpy()),
            "gloo": functools.partial(dist.all_reduce, ordinary, group=gloo),
            "step": make_step(num_bytes, None),
            "step, bfloat16": make_step(num_bytes, "bfloat16"),
        }
        if options.only:
            contenders = {name: call for name, call in contenders.items() if name in options.only}
        results = measure(contenders, options, gloo)
        if world.rank == 0:
            print(json.dumps({"bytes": num_bytes, "seconds": results}), flush=True)
        wire.close()
        dist.group.WORLD.release(bucket)
    dist.destroy_process_group()


def main() -> int:
    """Make the hosts, run every combination, and print the table."""
    parser = make_parser(__doc__, seconds=25.0)
    parser.add_argument("--gbit", type=float, nargs="+", default=[1, 10], help="rates of the link in each direction")
    parser.add_argument("--ranks-per-host", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--bytes", type=int, nargs="+", default=[25 << 20])
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=[], help="names of contenders")
    options = parser.parse_args()
    if options.quick:
        options.gbit, options.bytes = [10], [1 << 20]
    if "OMPI_COMM_WORLD_RANK" in os.environ:
        run_rank(options)
        return 0

    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
    from hosts import Hosts, why_not

    if reason := why_not():
        print(f"two_hosts: {reason}", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # removes the hosts in this case, too
    settings = [word for name, value in MPI_SETTINGS.items() for word in ("--mca", name, value)]
    table = Table("all_reduce and steps over two hosts", "network, ranks per host, size", CONTENDERS, ratios="time")
    with Hosts(2) as hosts:
        for gbit in options.gbit:
            hosts.set_rate(gbit)
            for ranks in options.ranks_per_host:
                command = [sys.executable, *sys.argv]
                process = hosts.mpirun([ranks, ranks], command, settings, capture=True)
                output, _ = process.communicate()
                if process.returncode != 0:
                    print(output.decode(), file=sys.stderr)
                    return process.returncode
                for line in output.decode().splitlines():
                    if line.startswith("{"):
                        row = json.loads(line)
                        table.add(f"{gbit:g} Gbit/s, {ranks}, {row['bytes'] / 2**20:g} MiB", row["seconds"])
    table.show(options.results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
