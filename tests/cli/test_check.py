# SPDX-License-Identifier: Apache-2.0
"""`distributed-trainer check` on this machine, in good and bad set-ups. test_run_hosts.py tests several hosts."""

import argparse
import json
import mmap
import os
import re
import shutil
import subprocess
import sys

import pytest
from ranks import is_openmpi, mpirun_path
from scripts import shell_environment

from distributed_trainer.cli import check, check_ranks, run
from distributed_trainer.cli.check_report import make_report, render
from distributed_trainer.launch.host_facts import core_of, num_cores, warn_of_shared_memory

pytestmark = pytest.mark.each_mpi

CHECK = [sys.executable, "-m", "distributed_trainer", "check"]
AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


def call(*command, **extra):
    return subprocess.run(
        command, env=shell_environment(**extra), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=110
    )


@pytest.mark.slow
def test_this_machine():
    """On this machine nothing is wrong, so the exit code is 0."""
    result = call(*CHECK, "-np", "2", "--json")
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads(result.stdout)
    assert not any(item["is_fatal"] for item in report["problems"])
    [host] = report["hosts"]
    assert (report["world_size"], host["ranks"], host["shares_memory"]) == (2, [0, 1], True)
    assert host["name"] == os.uname().nodename
    assert host["cores"] == len({core_of(cpu) for cpu in os.sched_getaffinity(0)})
    assert ("Open MPI" if is_openmpi() else "MPICH") in report["mpi"]
    inside = report["all_reduce"]["inside"]
    assert 0 < inside["seconds"] < 5
    assert 0 < inside["copy_seconds"] < 5
    assert report["all_reduce"]["between"] is None


@pytest.mark.slow
def test_under_plain_mpirun():
    """Under mpirun rank 0 prints one screen. The ranks count as two machines, so the exchange between is measured."""
    result = call(mpirun_path(), "-np", "2", *CHECK, DTRAIN_RANKS_PER_NODE="1", **AS_ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) < 30
    assert result.stdout.count("all_reduce over all, ") == result.stdout.count("; the network alone takes ") == 1
    assert any(line.split()[:2] == ["host", "ranks"] for line in lines)
    assert "NOT SHARED" in result.stdout
    assert "look at: DTRAIN_RANKS_PER_NODE keeps ranks of one machine from sharing memory. Unset it." in lines


@pytest.mark.skipif(num_cores() < 2, reason="needs two cores")
@pytest.mark.slow
def test_ranks_on_one_core():
    result = call(mpirun_path(), "-np", "2", "taskset", "--cpu-list", "0", *CHECK, "--json", **AS_ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
    problems = "\n".join(item["text"] for item in json.loads(result.stdout)["problems"])
    assert re.search(r"the launcher binds the 2 rank\(s\) on \S+ to 1 of its \d+ cores", problems)
    assert "(several to one core); mpirun --bind-to none lets them use all." in problems


@pytest.mark.parametrize("launcher", ["another MPI's", "not MPI's"])
@pytest.mark.slow
def test_processes_that_mpi_does_not_connect(launcher):
    of_mpich = {"MPI_LOCALNRANKS": "2", "PMI_RANK": "0", "PMI_SIZE": "2"}
    of_openmpi = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}
    of_slurm = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    variables = (of_mpich if is_openmpi() else of_openmpi) if launcher == "another MPI's" else of_slurm
    result = call(*CHECK, **variables)
    assert result.returncode == 1
    assert result.stdout.startswith("1 problem:\nWILL NOT WORK: ")
    expected = {
        "another MPI's": "Each process would be a separate job",
        "not MPI's": "srun started 2 processes, but MPI made each of them rank 0 of 1",
    }
    assert expected[launcher] in result.stdout
    assert "Traceback" not in result.stderr
    others = {name: "1" if name.endswith(("RANK", "PROCID")) else value for name, value in variables.items()}
    result = call(*CHECK, **others)
    assert (result.returncode, result.stdout) == (1, "")  # rank 0 has printed the error


@pytest.mark.slow
def test_small_shared_memory():
    """With 16 MiB of /dev/shm Open MPI works without it, MPICH may crash; the cause is reported in both cases."""
    unshare = shutil.which("unshare")
    script = 'mount -t tmpfs -o size=16m tmpfs /dev/shm && exec "$@"'
    enter = [unshare, "--mount", "--propagation", "private", "sh", "-c", script, "sh"]
    if unshare is None or subprocess.run([*enter, "true"], capture_output=True).returncode != 0:
        assert "CI" not in os.environ  # CI must not skip this
        pytest.skip("no mount namespace can be made here")
    result = call(*enter, *CHECK, "-np", "2", "--json")
    report = json.loads(result.stdout)
    assert result.returncode == (1 if any(item["is_fatal"] for item in report["problems"]) else 0)
    if is_openmpi():
        assert report["world_size"] == 2
    assert any("has 16 MiB free, but 2 ranks need 17: " in item["text"] for item in report["problems"])


def test_ranks_that_do_not_come_up():
    """If ranks do not start, mpirun's last lines are reported."""
    result = call(*CHECK, "-np", "2", f"--mpirun-options={'--no-such-option' if is_openmpi() else '-no-such-option'}")
    assert result.returncode == 1
    assert "WILL NOT WORK: mpirun ended with " in result.stdout
    assert "no-such-option" in result.stdout


def test_warnings_of_the_start(monkeypatch):
    """Warnings of the start appear once, beside the ranks' own problems."""
    printed = f"print('A greeting', {json.dumps({'problems': [check.problem('a')]})!r}, sep=chr(10))"
    plan = run.Plan(lambda hosts: [sys.executable, "-c", printed], None, None, {}, ["a", "b"])
    monkeypatch.setattr(run, "make_plan", lambda *_: plan)
    report = check._start_ranks(argparse.Namespace(hostfile=None, num_ranks=2))
    assert [item["text"] for item in report["problems"]] == ["a", "b"]


def test_no_mpi():
    result = call(*CHECK, DTRAIN_LIBMPI="/no/libmpi.so")
    assert result.returncode == 1
    assert result.stdout.startswith("1 problem:\nWILL NOT WORK: DTRAIN_LIBMPI=/no/libmpi.so does not load: ")


@pytest.mark.slow
def test_ranks_that_do_not_reach_each_other():
    """Ranks that do not reach each other wait in MPI_Init, and report that after the limit."""
    code = """
import os, sys, time
sys.argv[0] = "distributed-trainer"
from distributed_trainer.cli import check
from distributed_trainer.backend import job
from distributed_trainer.launch.launcher import Launcher
check._START_SECONDS = 1
job.start = lambda *_: time.sleep(60)
check._be_rank(Launcher("mpirun of Open MPI", 0, 2, 0, 2), False)
"""
    result = call(sys.executable, "-c", code)
    assert result.returncode == 1
    assert "has waited 1 s in MPI_Init or its first exchange. A firewall is between" in result.stdout
    assert "OMPI_MCA_btl_tcp_if_include=" in result.stdout


def test_leftovers(monkeypatch):
    """Leftovers are the files that no process has mapped."""
    path = f"/dev/shm/sm_segment.test.{os.getpid()}"
    with open(path, "wb+") as file:
        try:
            file.truncate(4096)
            assert path in check_ranks._leftovers()
            with mmap.mmap(file.fileno(), 4096):
                assert path not in check_ranks._leftovers()
        finally:
            os.unlink(path)


@pytest.mark.parametrize(
    ("family", "num_ranks", "mib", "is_enough"),
    [
        ("openmpi", 16, 64, True),
        ("openmpi", 2, 16, False),
        ("openmpi", 1, 4, True),
        ("mpich", 2, 16, False),
        ("mpich", 8, 64, True),
        ("mpich", 16, 64, False),
    ],
)
def test_shared_memory_that_mpi_needs(family, num_ranks, mib, is_enough):
    assert (warn_of_shared_memory(family, num_ranks, mib << 20) == []) == is_enough


def fact(rank, **changes):
    return {
        "rank": rank,
        "name": f"node{rank // 2}",
        "machine": [f"boot{rank // 2}", "uts", "net"],
        "node": rank // 2,
        "network": "1",
        "is_apart": False,
        "core_ids": [0, 1],
        "cpu_limit": None,
        "threads": 1,
        "binding": None,
        "device": "cpu",
        "gpu": None,
        "has_gpu_driver": False,
        "free_shared_memory": 1 << 30,
        "leftovers": [],
        "family": "openmpi",
        "mpi": "Open MPI v5.0.11",
        "python": "3.11",
        "torch": "2.13.0",
        "package": "aaa",
        "engine": "bbb",
        "kernels": "avx2",
        "launcher": "/usr/bin/prted",
        "paths": dict.fromkeys(("python", "torch", "package", "mpi"), "/venv"),
    } | changes


SPEED = {"inside": None, "between": None}


def problems_of(*changes):
    facts = [fact(rank, **change) for rank, change in enumerate(changes)]
    report = make_report(facts, SPEED)
    return [(item["is_fatal"], item["text"]) for item in report["problems"]]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"node": 2}, "node1: ranks of one machine can't map each other's memory"),
        (
            {"node": 2, "network": "2", "machine": ["boot1", "uts", "net2"]},
            "node1 are one machine, but its ranks have separate networks, so they share no memory and use MPI. ",
        ),
        ({"is_apart": True}, "node1: its ranks are in separate containers. They do share the engine's memory"),
    ],
)
def test_what_one_rank_has_otherwise(change, text):
    assert problems_of({}, {}, {}, {}) == []
    [(is_fatal, found)] = problems_of({}, {}, {}, change)
    assert text in found
    assert not is_fatal


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"binding": "the launcher binds"}, "node0: the launcher binds."),
        ({"core_ids": [3]}, "node0: 2 ranks share 1 core(s) and take turns. Start fewer ranks there."),
        ({"cpu_limit": (7, 0.5)}, "node0: 2 ranks share 1 core(s) and take turns. Start fewer ranks there."),
        ({"has_gpu_driver": True}, "node0 has GPUs, but torch 2.13.0 uses none."),
        ({"free_shared_memory": 1 << 20}, "/dev/shm of node0 has 1 MiB free"),
        (
            {"leftovers": ["/dev/shm/a", "/dev/shm/b", "/dev/shm/c", "/dev/shm/d"]},
            "`rm /dev/shm/a /dev/shm/b /dev/shm/c ...`",
        ),
    ],
)
def test_what_a_host_has(change, text):
    [(is_fatal, found)] = problems_of(change, change)
    assert text in found
    assert not is_fatal


def test_one_screen():
    """The report fits on one screen with any number of hosts and problems."""
    facts = [fact(rank, leftovers=["/dev/shm/a"]) for rank in range(400)]
    between = {
        "bytes": 25 << 20,
        "seconds": 0.2,
        "wire_seconds": 0.19,
        "wire_bytes_per_second": 1e8,
        "interfaces": ["eth0"],
    }
    inside = {"bytes": 25 << 20, "seconds": 0.002, "copy_seconds": 0.003}
    report = make_report(facts, {"inside": inside, "between": between})
    lines = render(report).splitlines()
    assert len(lines) < 45
    assert "... and 188 more" in lines
    assert any("over eth0; the network alone takes 190 ms (100 MB/s each way)" in line for line in lines)
    assert json.loads(json.dumps(report)) == report
