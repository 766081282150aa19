# SPDX-License-Identifier: Apache-2.0
"""Training on hosts that share no memory, made of namespaces, with the MPI of this environment."""

import functools
import os
import subprocess

import pytest
from hosts import Hosts, require
from on_hosts import OWN, run_tests
from ranks import is_openmpi, mpirun_path
from scripts import shell_environment
from sshd import sshd

pytestmark = pytest.mark.each_mpi

# Tests that also run on one machine: training compared with one process, to the same bits, from a loader; evaluation.
TESTS = {
    4: [
        "tests/trainer/test_exactness.py::test_fifty_steps[4-ranks-adam]",
        "tests/trainer/test_exactness.py::test_fifty_steps_with_batchnorm[4-ranks-sgd]",
        "tests/replica/test_reproducible.py::test_batches[4-ranks-2-per-node-8]",
        "tests/data/test_loader.py::test_training[4-ranks-2-per-node-NormNet]",
        "tests/trainer/test_evaluation.py::test_loss[4-ranks-2-per-node-(13, 4)-weights]",
    ],
    3: [
        "tests/trainer/test_exactness.py::test_fifty_steps[3-ranks-adam]",
        "tests/trainer/test_exactness.py::test_batchnorm_with_empty_parts[3-ranks]",
        "tests/replica/test_reproducible.py::test_batches[3-ranks-8]",
    ],
}


@pytest.fixture(scope="module")
def hosts():
    require()
    with Hosts(3) as hosts:
        yield hosts


@pytest.mark.parametrize("ranks_of_host", [(2, 2, 0), (3, 1, 0), (1, 1, 1), (2, 1, 0)], ids=str)
def test_training(hosts, ranks_of_host, tmp_path):
    start = functools.partial(hosts.mpirun, ranks_of_host, capture=True)
    run_tests(start, ranks_of_host, [*OWN, *TESTS[sum(ranks_of_host)]], tmp_path)


@pytest.fixture(scope="module")
def ssh(hosts):
    require("sshd")
    with sshd(hosts):
        yield


def test_bare_mpirun(hosts, ssh, tmp_path):
    """Start mpirun as the README does: by a hostfile, without other options or variables, by the hosts' ssh and keys.

    Open MPI then binds each rank to a core, and would refuse more ranks than cores on a host.
    """
    if is_openmpi() and len(os.sched_getaffinity(0)) < 2:
        pytest.skip("this machine has one core")
    option, line = ("--hostfile", "{} slots=2\n") if is_openmpi() else ("-f", "{}:2\n")
    (tmp_path / "hosts.txt").write_text("".join(line.format(name) for name in hosts.names[:2]))
    environment = shell_environment(OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")

    def start(command, **variables):
        del variables["OMP_NUM_THREADS"]
        variables["PYTHONPATH"] = environment["PYTHONPATH"]
        command = ["env", *map("=".join, variables.items()), *command]  # variables that only tests need
        return subprocess.Popen(
            hosts.inside(0, [mpirun_path(), option, str(tmp_path / "hosts.txt"), "-np", "4", *command]),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )

    folder = tmp_path / "ranks"
    folder.mkdir()
    exact = "tests/trainer/test_exactness.py::test_fifty_steps[4-ranks-adam]"
    run_tests(start, (2, 2, 0), [*OWN, "tests/support/on_hosts.py::test_threads[4-ranks]", exact], folder)


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
