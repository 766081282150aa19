# SPDX-License-Identifier: Apache-2.0
"""all_reduce over two hosts made of namespaces, beside a bare TCP transfer, MPI_Allreduce and gloo; needs root.

    python benchmarks/two_hosts.py --gbit 1 10 --ranks-per-host 1 2

"wire" is one TCP connection that carries the same bytes, both ways at once: with two hosts each has to send a buffer's
bytes and to receive as many, whatever the algorithm. All contenders run in one job and take turns, round by round. They
start at a moment agreed on beforehand, until which all ranks sleep; the hosts share a clock. A round's figure is that
of the last rank, and the table has medians.
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
from datetime import timedelta
from pathlib import Path
from statistics import median

WIRE_PORT = 7077
# Open MPI's best here. Its han component waits without sleeping on hosts with fewer cores than ranks; Rabenseifner's
# algorithm, number 6, first halves the data between neighbours, which are on one host.
MPI_SETTINGS = {
    "coll": "^han",
    "mpi_yield_when_idle": "1",
    "coll_tuned_use_dynamic_rules": "1",
    "coll_tuned_allreduce_algorithm": "6",
}


class Wire:
    """Bare TCP between the first ranks of both hosts; the other ranks take no part."""

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


def measure(contenders: dict[str, Callable[[], object]], world: object, gloo: object, seconds: float) -> dict:
    """Medians in milliseconds; the same on every rank."""
    import torch

    times: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    end = time.monotonic() + seconds
    num_rounds = 0
    while True:
        for name in names[num_rounds % len(names) :] + names[: num_rounds % len(names)]:
            start = torch.tensor([time.monotonic() + 0.02, float(time.monotonic() > end)], dtype=torch.float64)
            gloo.broadcast(start, 0).wait()  # gloo sleeps while it waits, so that no rank disturbs the last one's call
            start_time, is_over = start.tolist()
            if is_over and num_rounds > 2:
                slowest = {
                    name: [max(row) for row in zip(*world.allgather(t), strict=True)] for name, t in times.items()
                }
                return {name: 1e3 * median(rows[1:]) for name, rows in slowest.items()}
            time.sleep(max(0.0, start_time - time.monotonic()))
            contenders[name]()
            times[name].append(time.monotonic() - start_time)
        num_rounds += 1


def run_rank(options: argparse.Namespace) -> None:
    """On each rank: measures all sizes and, on rank 0, prints a line of JSON for each."""
    import torch
    import torch.distributed as dist
    from mpi4py import MPI

    from distributed_trainer import job as jobs

    job = jobs.start(None, None)
    world = MPI.COMM_WORLD
    torch.set_num_threads(1)
    gloo = dist.ProcessGroupGloo(dist.PrefixStore("bench", job.store), job.rank, job.engine.size, timedelta(minutes=2))
    group = job.create_group()
    narrow_group = job.create_group(wire_dtype="bfloat16") if options.wire_dtype else None
    for num_bytes in options.bytes:
        wire = Wire(world, job.node_of_rank[job.rank], job.local_rank == 0, num_bytes)
        ordinary = torch.zeros(num_bytes // 4)
        contenders = {
            "wire": wire,
            "ours, bucket": in_place(group, num_bytes),
            "ours, any tensor": functools.partial(reduce, group, ordinary),
            "MPI_Allreduce": functools.partial(world.Allreduce, MPI.IN_PLACE, ordinary.numpy()),
            "gloo": functools.partial(reduce, gloo, ordinary),
        }
        if options.wire_dtype:
            contenders["ours, bfloat16"] = in_place(narrow_group, num_bytes)
        if options.only:
            contenders = {name: call for name, call in contenders.items() if name in options.only}
        results = measure(contenders, world, gloo, options.seconds)
        if job.rank == 0:
            print(json.dumps({"bytes": num_bytes, "ms": results}), flush=True)
        wire.close()


def reduce(group: object, tensor: object) -> None:
    group.allreduce([tensor]).wait()


def in_place(group: object, num_bytes: int) -> Callable[[], None]:
    """all_reduce in memory that the ranks allocated together, as the trainer's buckets are."""
    import torch

    return functools.partial(reduce, group, group.allocate(num_bytes).view(torch.float32))


def main() -> int:
    """Makes the hosts, runs every combination and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gbit", type=float, nargs="+", default=[1, 10], help="rates, each way")
    parser.add_argument("--ranks-per-host", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--bytes", type=int, nargs="+", default=[25 << 20])
    parser.add_argument("--seconds", type=float, default=25, help="for each combination and size")
    parser.add_argument("--only", nargs="+", default=[], help="names of contenders")
    parser.add_argument("--wire-dtype", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args()
    if "OMPI_COMM_WORLD_RANK" in os.environ:
        run_rank(options)
        return 0

    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from hosts import Hosts, why_not

    if reason := why_not():
        print(f"two_hosts: {reason}", file=sys.stderr)
        return 1
    print("all_reduce over two hosts, float32, sum, in place: median milliseconds (times the wire)")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the hosts are removed then, too
    settings = [word for name, value in MPI_SETTINGS.items() for word in ("--mca", name, value)]
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
                        print_row(f"{gbit:g} Gbit/s, {ranks} per host", json.loads(line))
    return 0


def print_row(title: str, row: dict) -> None:
    columns = [f"{name} {ms:.4g} ({ms / row['ms'].get('wire', ms):.2f})" for name, ms in row["ms"].items()]
    print(f"{title}, {row['bytes'] / 2**20:g} MiB:  " + "   ".join(columns), flush=True)


if __name__ == "__main__":
    sys.exit(main())
