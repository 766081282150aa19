# SPDX-License-Identifier: Apache-2.0
"""Ranks on hosts that share no memory, made of namespaces: what pretended nodes within one launch can't show."""

import os
import sys

import pytest
from hosts import Hosts, why_not

pytestmark = pytest.mark.long

RANK = """
import sys, torch
from distributed_trainer import job as jobs

job, mib = jobs.start(None, None), int(sys.argv[1])
group = job.create_group()
nodes = [int(word) for word in sys.argv[2].split(",")]
assert job.node_of_rank == nodes, job.node_of_rank
buffer = group.allocate(mib << 20).view(torch.float32)
before = job.engine.counters()["bytes_sent"]
for _ in range(2):
    buffer.copy_(torch.arange(len(buffer)) % 1000 + job.rank)
    group.allreduce([buffer]).wait()
    wanted = torch.arange(len(buffer)) % 1000 * job.engine.size + sum(range(job.engine.size))
    assert torch.equal(buffer, wanted.float())
print("sent", job.engine.counters()["bytes_sent"] - before, flush=True)
"""


@pytest.mark.parametrize("ranks_of_host", [(1, 1), (2, 2), (2, 1)])
def test_all_reduce(ranks_of_host):
    """Right sums; ranks of a host found by mapping memory; each byte crosses once each way, not once per rank."""
    if reason := why_not():
        assert "CI" not in os.environ, reason  # there it would be missed
        pytest.skip(reason)
    nodes = ",".join(str(host) for host, count in enumerate(ranks_of_host) for _ in range(count))
    with Hosts(2) as hosts:
        sent = {}
        for mib in (1, 9):
            before = hosts.bytes_sent()
            process = hosts.mpirun(ranks_of_host, [sys.executable, "-c", RANK, str(mib), nodes], capture=True)
            output, _ = process.communicate(timeout=60)
            assert process.returncode == 0
            counted = [int(line.split()[1]) for line in output.decode().splitlines() if line.startswith("sent")]
            assert sum(counted) == 2 * 2 * mib << 20  # two calls, two hosts
            sent[mib] = [after - start for after, start in zip(hosts.bytes_sent(), before, strict=True)]
        for small, large in zip(sent[1], sent[9], strict=True):  # the difference leaves out the start of the ranks
            assert 2 * 8 << 20 <= large - small < 1.1 * (2 * 8 << 20)
