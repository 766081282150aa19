# SPDX-License-Identifier: Apache-2.0
"""The line at the exit of ranks that nothing connected, and the cases in which there is none."""

import multiprocessing
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from ranks import JobSpec, job_environment, mpirun_path

from distributed_trainer import create_distributed_trainer
from distributed_trainer.launch import launcher, separate_models

SCRIPT = """
import os, sys, torch, distributed_trainer
model = torch.nn.Linear(2, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
model(torch.ones(1, 2)).sum().backward()
optimizer.step()
if os.fork() == 0:
    sys.exit()  # its exit handlers run, too
os.wait()
"""
RANK = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0"}


@pytest.mark.slow
def test_line_at_exit(tmp_path):
    path = tmp_path / "train.py"
    path.write_text(SCRIPT)
    done = subprocess.run(
        [mpirun_path(), "-np", "2", sys.executable, path],
        capture_output=True,
        text=True,
        timeout=60,
        env=job_environment(JobSpec(2)),
    )
    assert done.returncode == 0
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("distributed_trainer: mp")
    assert " started 2 processes, but the script called neither create_distributed_trainer nor " in line
    assert ": 2 separate models were trained. Call create_distributed_trainer(model) on every rank" in line


@pytest.fixture
def report(monkeypatch, capfd):
    """Function that returns what rank 0 of 4 prints at its exit, which is one line unless the test changes something.

    The rank has made an optimizer.
    """
    for name in list(os.environ):
        if name.startswith(("OMPI_", "PMI", "MPI_", "SLURM_", "DTRAIN_")):
            monkeypatch.delenv(name)
    for name, value in RANK.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(separate_models, "_is_connected", False)
    monkeypatch.setattr(separate_models.mpi_library, "loaded_mpi", lambda: None)
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    monkeypatch.delattr(sys, "last_type", raising=False)
    parents = [(3, "bash"), (2, "prterun"), (1, "python3")]
    monkeypatch.setattr(launcher, "_parents", lambda: iter(parents))
    torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)

    def end(pid=None):
        separate_models._report(pid or os.getpid())
        return capfd.readouterr().err

    end.parents = parents
    return end


def test_line_of_rank_0(report):
    assert report().count("4 separate models were trained") == 1


@pytest.mark.parametrize(("name", "value"), [("SIZE", "1"), ("RANK", "1")])
def test_no_line_of_one_rank_or_of_others(report, monkeypatch, name, value):
    monkeypatch.setenv(f"OMPI_COMM_WORLD_{name}", value)
    assert report() == ""


def test_no_line_without_a_launcher(report, monkeypatch):
    monkeypatch.delenv("OMPI_COMM_WORLD_SIZE")
    assert report() == ""


def test_no_line_after_an_exception(report, monkeypatch):
    monkeypatch.setattr(sys, "last_type", ValueError, raising=False)
    assert report() == ""


def test_no_line_without_an_optimizer(report, monkeypatch):
    monkeypatch.setattr(torch.optim, "Optimizer", type("Optimizer", (), {"step": lambda self: None}))
    assert report() == ""


def test_no_line_of_children(report, monkeypatch):
    assert report(os.getppid()) == ""  # a forked child, which inherits the exit handler
    report.parents.insert(0, (4, "python3.11"))  # a program that a rank has started
    assert report() == ""
    report.parents[:1] = []
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: object())  # a spawned child
    assert report() == ""


def test_no_line_of_a_script_with_mpi4py(report, monkeypatch):
    monkeypatch.setattr(separate_models.mpi_library, "loaded_mpi", lambda: "libmpi")
    assert report() == ""


def test_no_line_after_a_process_group(report):
    """There is none after a group of another backend either, even if it was destroyed."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    dist.destroy_process_group()
    assert report() == ""


def test_no_line_after_a_trainer_that_was_refused(report):
    """A script that catches the error has seen it."""
    with pytest.raises(ValueError, match="at least 1"):
        create_distributed_trainer(torch.nn.Linear(1, 1), num_gpus=0)
    assert report() == ""
