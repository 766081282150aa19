# SPDX-License-Identifier: Apache-2.0
"""Tests for ranks of several hosts, and a function that runs tests there; pytest collects the tests only when named.

The variable TEST_NODES has the expected number of each rank's host.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import ranks
import torch
from ranks import on_ranks
from torch import nn

from distributed_trainer import create_distributed_trainer
from distributed_trainer.backend import job as jobs

MIB = 1 << 20
OWN = ["tests/support/on_hosts.py::test_nodes[{}-ranks]", "tests/support/on_hosts.py::test_wire[{}-ranks]"]


def run_tests(
    start: Callable[..., "subprocess.Popen[bytes]"],
    ranks_of_host: Sequence[int],
    tests: Sequence[str],
    folder: Path,
    timeout_seconds: float = 100,
) -> str:
    """Run tests on ranks as ranks.py does, but let the caller start the ranks; return what the launcher printed.

    Args:
        start: Function of a command and variables; it starts the command on all ranks, with its output in a pipe.
        ranks_of_host: Number of ranks that `start` starts on each host.
        tests: Ids of the tests; {} stands for the number of ranks.
        folder: An empty folder.
        timeout_seconds: Time limit of all tests together.
    """
    (folder / "tests.txt").write_text("\n".join(test.format(sum(ranks_of_host)) for test in tests))
    nodes = [str(host) for host, count in enumerate(filter(None, ranks_of_host)) for _ in range(count)]
    variables = {"TEST_RANKS_FOLDER": str(folder), "TEST_NODES": ",".join(nodes)}
    variables["OMP_NUM_THREADS"] = "1"  # each host believes that all cores of this machine are its own
    process = start([sys.executable, ranks.__file__], **variables)
    try:
        output = process.communicate(timeout=timeout_seconds)[0].decode()
    except subprocess.TimeoutExpired:
        ranks.end(process)
        output = process.communicate()[0].decode() + "\nthe ranks did not end"
    failures = []
    for file in sorted(folder.glob("test-*.json")):
        reports = [pytest.TestReport._from_json(data) for data in json.loads(file.read_text())]
        failures += [report.longreprtext for report in reports if report.failed]
    num_reports = len(list(folder.glob("test-*.json")))
    logs = [file.read_text() for file in sorted(folder.glob("rank-*.log"))]
    assert process.returncode == 0, "\n".join([*failures, *logs, output])
    assert num_reports == len(nodes) * len(tests)
    return output


def bytes_sent() -> int:
    """Return the number of bytes that this host has sent over its link, headers included."""
    (line,) = (line for line in Path("/proc/self/net/dev").read_text().splitlines() if "eth0:" in line)
    return int(line.partition(":")[2].split()[8])


def check_wire(world, job, num_bytes: int, call: Callable[[], object], num_calls: int = 2) -> None:
    """Check that in each call each of `num_bytes` bytes crosses the link once each way per host, not once per rank."""
    call()
    world.comm.Barrier()
    before, counted_before = bytes_sent(), job.engine.counters()["bytes_sent"]
    world.comm.Barrier()
    for _ in range(num_calls):
        call()
    counted = job.engine.counters()["bytes_sent"] - counted_before
    world.comm.Barrier()
    on_wire = bytes_sent() - before
    num_hosts = max(job.node_of_rank) + 1
    # Each host sends the others the parts that they sum, and then its own part of the result.
    wanted = num_calls * 2 * num_bytes * (num_hosts - 1) / num_hosts
    assert wanted <= on_wire <= 1.1 * wanted
    total = sum(world.gather(counted))
    assert num_hosts * wanted <= total <= 1.001 * num_hosts * wanted  # the trainer sends the loss as well


def nodes() -> list[int]:
    return [int(number) for number in os.environ["TEST_NODES"].split(",")]


@on_ranks(2, 3, 4)
def test_nodes(world):
    """Ranks of one host share memory, ranks of two hosts do not; the start-up line reports machines and transports."""
    job = jobs.start(None, None)
    assert job.node_of_rank == nodes()
    names = world.gather(os.uname().nodename)
    assert [names.index(name) for name in names] == [nodes().index(node) for node in nodes()]
    group = world.group()
    memory = group.allocate(MIB)
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if "/memfd:dtrain" in line]
    inodes = world.gather({words[4] for words in lines})
    shared_memory = world.gather(os.stat("/dev/shm").st_dev)  # /dev/shm of the host, which MPI uses
    for rank, own in enumerate(inodes):
        for peer, others in enumerate(inodes):
            is_neighbour = nodes()[rank] == nodes()[peer]
            assert bool(own & others) == is_neighbour, (rank, peer)
            assert (shared_memory[rank] == shared_memory[peer]) == is_neighbour, (rank, peer)
    num_hosts = max(nodes()) + 1
    what = "shared memory" if num_hosts == 1 else "shared memory and, between machines, MPI"
    machines = f"{num_hosts} machine{'s' if num_hosts > 1 else ''}"
    assert f"{world.size} ranks on {machines}, " in job.summary
    assert job.summary.endswith(f"over {what}")
    del memory


@on_ranks(4)
def test_threads(world):
    """Each rank has the number of threads that the start-up line says, at most one for each core that it may use."""
    job = jobs.start(None, None)
    number, cores = torch.get_num_threads(), len(os.sched_getaffinity(0))
    assert f"{number} thread{'s' if number > 1 else ''} per rank (" in job.summary
    assert 1 <= number <= cores


@on_ranks(2, 3, 4)
def test_wire(world):
    """Each byte crosses the link once: in an all_reduce of a bucket, and in a training step."""
    job = jobs.start(None, None)
    group = world.group()
    buffer = group.allocate(6 * MIB).view(torch.float32)
    index = torch.arange(len(buffer)) % 1000

    def all_reduce():
        buffer.copy_(index + world.rank)
        group.allreduce([buffer]).wait()
        assert torch.equal(buffer, (index * world.size + sum(range(world.size))).float())

    check_wire(world, job, 6 * MIB, all_reduce)

    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(2)))
    trainer = create_distributed_trainer(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = torch.randn(8, 1024), torch.randn(8, 1024)
    num_bytes = sum(parameter.nbytes for parameter in model.parameters())
    check_wire(world, job, num_bytes, lambda: trainer.train_step(x, y, nn.MSELoss(), optimizer))
    trainer.close()
