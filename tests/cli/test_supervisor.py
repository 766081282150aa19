# SPDX-License-Identifier: Apache-2.0
"""`distributed-trainer run --restarts`: which jobs are started again, on which hosts, and with which exit code."""

import os
import signal
import subprocess
import sys
import time

import forked
import pytest
from scripts import HEAD, START_SECONDS, is_alive, shell_environment

from distributed_trainer.cli import supervisor
from distributed_trainer.cli.hostfile import Host
from distributed_trainer.launch import job_record

# Script that records its attempts, and in the first ones runs a test's code.
SCRIPT = """
trainer = create_distributed_trainer(model)
rank = trainer.rank
step(trainer)
if rank == 0:
    open("attempts", "a").write("x")
open(f"{rank}.pid", "w").write(str(os.getpid()))
trainer.summary()  # all ranks have come
if len(open("attempts").read()) <= %d and rank == 1:
    %s
step(trainer)
print("end", rank, flush=True)
"""


@pytest.fixture
def start(tmp_path):
    processes = []

    def start(fault, num_faults=1, restarts=1):
        (tmp_path / "train.py").write_text(HEAD + SCRIPT % (num_faults, fault))
        words = ["-m", "distributed_trainer", "run", "--restarts", str(restarts), "-np", "2"]
        words += [*forked.client(), "train.py"]
        processes.append(
            subprocess.Popen(
                [sys.executable, *words],
                cwd=tmp_path,
                env=shell_environment(TMPDIR=str(tmp_path)),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        return processes[-1]

    yield start
    for process in processes:
        if process.poll() is None:
            process.kill()
            process.communicate()
    assert not list(tmp_path.glob(".distributed-trainer*"))


def test_restarts_that_do_not_help(start, tmp_path):
    job = start("os.kill(os.getpid(), signal.SIGKILL)", num_faults=9)
    _, err = job.communicate(timeout=START_SECONDS)
    assert job.returncode > 0
    assert (tmp_path / "attempts").read_text() == "xx"
    assert f"the job has ended with exit code {job.returncode} after" in err
    assert "; 1 restart did not help" in err


@pytest.mark.parametrize("fault", ["1 / 0", "sys.exit(3)"])
def test_errors_of_the_script(start, tmp_path, fault):
    """A job that ended by the script's error is not started again, since it would fail again."""
    job = start(fault)
    _, err = job.communicate(timeout=START_SECONDS)
    assert job.returncode > 0, err
    assert (tmp_path / "attempts").read_text() == "x"


def test_told_to_end(start, tmp_path):
    job = start("time.sleep(60)")
    deadline = time.monotonic() + START_SECONDS
    while len(list(tmp_path.glob("*.pid"))) < 2:
        assert time.monotonic() < deadline and job.poll() is None
        time.sleep(0.05)
    pids = [int(file.read_text()) for file in tmp_path.glob("*.pid")]
    job.send_signal(signal.SIGTERM)
    _, err = job.communicate(timeout=20)
    assert job.returncode > 0
    assert "restart 1" not in err
    deadline = time.monotonic() + 5
    while any(map(is_alive, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def supervise(tmp_path, script, hosts=None, lost=(), restarts=2):
    """Call `supervise` with a shell script instead of mpirun; return the exit code and the commands.

    The script may write to $DTRAIN_JOB_RECORD.
    """
    commands = []

    def make_command(on):
        commands.append([host.name for host in on or ()])
        return ["sh", "-c", script]

    def find_lost(asked):
        return {host.name: "does not answer" for host in asked if host.name in lost}

    environment = {**os.environ, job_record.VARIABLE: str(tmp_path / "record")}
    code = supervisor.supervise(make_command, hosts, find_lost, environment, restarts)
    assert not (tmp_path / "record").exists()
    return code, commands


@pytest.mark.parametrize(
    ("script", "code", "num_starts"),
    [
        ("echo started >> $DTRAIN_JOB_RECORD; echo completed >> $DTRAIN_JOB_RECORD", 0, 1),
        ("echo started >> $DTRAIN_JOB_RECORD", 1, 3),  # a job that has lost a host, for which mpirun returns 0
        ("echo started >> $DTRAIN_JOB_RECORD; exit 7", 7, 3),
        ("echo started >> $DTRAIN_JOB_RECORD; echo failed: E >> $DTRAIN_JOB_RECORD", 1, 1),
        ("echo started >> $DTRAIN_JOB_RECORD; echo completed >> $DTRAIN_JOB_RECORD; exit 3", 3, 1),
        ("exit 0", 0, 1),  # ranks could not write a record, or train without this package
        ("exit 5", 5, 1),  # the script's own error
        ("kill -9 $$", 137, 3),
    ],
)
def test_exit_codes(tmp_path, script, code, num_starts):
    found, commands = supervise(tmp_path, script)
    assert (found, len(commands)) == (code, num_starts)


def test_lost_hosts(tmp_path, capsys):
    """Before each restart lost hosts are found and left out; with no host left the job ends."""
    hosts = [Host("a", 2), Host("b", 1)]
    code, commands = supervise(tmp_path, "exit 255", hosts, lost={"b"})
    assert (code, commands) == (255, [["a", "b"], ["a"], ["a"]])
    assert "; b is left out: does not answer; restart 1 of 2" in capsys.readouterr().err
    code, commands = supervise(tmp_path, "exit 255", hosts, lost={"a", "b"})
    assert (code, commands) == (255, [["a", "b"]])
    assert "b is left out: does not answer; no host is left" in capsys.readouterr().err
