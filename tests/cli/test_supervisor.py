# SPDX-License-Identifier: Apache-2.0
"""How `distributed-trainer run` runs mpirun, and which jobs `--restarts` starts again, on which hosts."""

import contextlib
import os
import pty
import select
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
    if fault == "1 / 0":
        assert err.endswith("\nZeroDivisionError: division by zero\n")


def test_told_to_end(start, tmp_path):
    job = start("time.sleep(60)")
    deadline = time.monotonic() + START_SECONDS
    while len(list(tmp_path.glob("*.pid"))) < 2:
        assert time.monotonic() < deadline and job.poll() is None
        time.sleep(0.05)
    pids = [int(file.read_text()) for file in tmp_path.glob("*.pid")]
    job.send_signal(signal.SIGTERM)
    _, err = job.communicate(timeout=20)
    assert job.returncode == 128 + signal.SIGTERM
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


# ---- a script in the place of mpirun

# Counts the signals that it gets, and prints them when it is told to end.
MPIRUN = """
import os, signal, sys, time
got = []
for name in ("SIGHUP", "SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2"):
    signal.signal(getattr(signal, name), lambda number, _: got.append(signal.Signals(number).name))
print(os.getpid(), file=sys.stderr, end="\\r", flush=True)  # a line that has no end yet
while "SIGTERM" not in got:
    time.sleep(0.05)
time.sleep(0.2)
print(*got, file=sys.stderr, flush=True)
sys.exit(7)
"""


@pytest.fixture
def call(tmp_path):
    """Function that starts `run_mpirun` with a Python script in the place of mpirun, in a process without torch."""
    processes = []

    def call(script, program=sys.executable, option="-c", **options):
        command = [program, option, script]
        text = (
            "import os, sys\nfrom distributed_trainer.cli.supervisor import run_mpirun\n"
            f"code, was_told_to_end = run_mpirun({command}, os.environ, False)\n"
            f"sys.exit(code + 100 * was_told_to_end)"
        )
        (tmp_path / "distributed-trainer").write_text(text)  # a script of this name does not import torch
        words = [sys.executable, tmp_path / "distributed-trainer"]
        options |= {"env": shell_environment(), "stderr": subprocess.PIPE, "start_new_session": True}
        processes.append(subprocess.Popen(words, **options))
        return processes[-1]

    yield call
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_signals_reach_mpirun(call):
    """Each signal arrives once; bytes arrive before their line has an end; the exit code is that of a shell."""
    job = call(MPIRUN)
    assert os.read(job.stderr.fileno(), 99).endswith(b"\r")
    names = ["SIGHUP", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGINT", "SIGTERM"]
    for name in names:
        job.send_signal(getattr(signal, name))
        time.sleep(0.1)
    _, err = job.communicate(timeout=20)
    assert (err.decode().split(), job.returncode) == (names, 143 + 100)


def test_keys_of_a_terminal(call):
    """Ctrl-C arrives once: a second one would make MPICH kill the ranks, which may be writing a checkpoint."""
    terminal, side = pty.openpty()

    def control_terminal():
        os.close(os.open(os.ttyname(0), os.O_RDWR))

    job = call(MPIRUN, stdin=side, preexec_fn=control_terminal)
    assert os.read(job.stderr.fileno(), 99).endswith(b"\r")
    job.send_signal(signal.SIGSTOP)  # so that a second one would come later
    os.write(terminal, b"\x03")
    time.sleep(0.3)
    job.send_signal(signal.SIGCONT)
    time.sleep(0.1)
    job.send_signal(signal.SIGTERM)
    _, err = job.communicate(timeout=20)
    os.close(terminal)
    os.close(side)
    assert err.decode().split() == ["SIGINT", "SIGTERM"]


def test_nohup(call):
    """A closed terminal does not end a job that was started by nohup."""
    job = call("import time; time.sleep(0.5)", preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    time.sleep(0.3)
    job.send_signal(signal.SIGHUP)
    assert job.wait(20) == 0


def test_mpirun_ends_if_its_parent_is_killed(call):
    job = call(MPIRUN)
    pid = int(os.read(job.stderr.fileno(), 99))
    job.kill()
    deadline = time.monotonic() + 10
    while is_alive(pid):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_held_bytes_appear(call):
    """Bytes that are held after an exception appear soon, also if no more come."""
    job = call("printf 'Traceback (most recent call last):\\n%074d\\n' | tr 0 - >&2; sleep 60", "sh")
    text = b""
    while text.count(b"\n") < 2:
        assert select.select([job.stderr], [], [], 10)[0], text
        text += os.read(job.stderr.fileno(), 999)
    assert text.endswith(b"\n" + b"-" * 74 + b"\n")


def test_nothing_is_lost(call):
    """All bytes arrive in their order, also if the reader is slow, and a process that mpirun leaves holds the pipe."""
    job = call("seq 100000 >&2; sleep 60 >&2 & echo $! >&2", "sh")
    time.sleep(0.5)
    _, err = job.communicate(timeout=20)
    *numbers, pid = err.split()
    os.kill(int(pid), signal.SIGKILL)
    assert numbers == [b"%d" % number for number in range(1, 100001)]
    assert job.returncode == 0
