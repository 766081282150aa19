# SPDX-License-Identifier: Apache-2.0
"""Training on hosts that share no memory, made of namespaces, with the MPI of this environment."""

import functools

import pytest
from hosts import Hosts, require
from on_hosts import OWN, run_tests
from sshd import sshd

pytestmark = pytest.mark.long

# Of those that run on one machine: training beside one process, with the same bits, from a loader, and evaluation.
TESTS = {
    4: [
        "tests/test_exactness.py::test_fifty_steps[4-ranks-adam]",
        "tests/test_exactness.py::test_fifty_steps_with_batchnorm[4-ranks-sgd]",
        "tests/test_reproducible.py::test_batches[4-ranks-2-per-node-8]",
        "tests/test_loader.py::test_training[4-ranks-2-per-node-NormNet]",
        "tests/test_evaluate.py::test_loss[4-ranks-2-per-node-(13, 4)-weights]",
    ],
    3: [
        "tests/test_exactness.py::test_fifty_steps[3-ranks-adam]",
        "tests/test_exactness.py::test_batchnorm_with_empty_parts[3-ranks]",
        "tests/test_reproducible.py::test_batches[3-ranks-8]",
    ],
}


@pytest.fixture(scope="module")
def hosts():
    require()
    with Hosts(3) as hosts:
        yield hosts


@pytest.mark.parametrize("ranks_of_host", [(2, 2, 0), (1, 1, 1), (2, 1, 0)], ids=str)
def test_training(hosts, ranks_of_host, tmp_path):
    start = functools.partial(hosts.mpirun, ranks_of_host, capture=True)
    run_tests(start, ranks_of_host, [*OWN, *TESTS[sum(ranks_of_host)]], tmp_path)


@pytest.fixture(scope="module")
def ssh(hosts):
    require("sshd")
    with sshd(hosts):
        yield


def test_by_ssh(hosts, ssh, tmp_path):
    """An sshd on each host, and keys; mpirun gets no option that has to do with it."""
    start = functools.partial(hosts.mpirun, (1, 1, 0), capture=True, by_ssh=True)
    run_tests(start, (1, 1, 0), [*OWN, "tests/test_exactness.py::test_fifty_steps[2-ranks-adam]"], tmp_path)


def test_in_pbs(hosts, ssh, tmp_path):
    """mpirun takes the hosts from the node file that PBS leaves for a job, and reaches them by ssh."""
    nodes = tmp_path / "nodes"
    first, second, _ = hosts.names
    nodes.write_text(f"{first}\n{first}\n{second}\n")
    job = {"PBS_JOBID": "7.server", "PBS_ENVIRONMENT": "PBS_BATCH", "PBS_NODEFILE": str(nodes)}
    folder = tmp_path / "ranks"
    folder.mkdir()
    start = functools.partial(hosts.mpirun, (2, 1, 0), capture=True, by_ssh=True, hostfile=False, **job)
    run_tests(start, (2, 1, 0), OWN[:1], folder)
