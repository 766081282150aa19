# SPDX-License-Identifier: Apache-2.0
"""Lines that a start prints: about num_gpus, about cores, about another job; and what a start has loaded."""

import os
import re
import subprocess
import sys

import pytest
from scripts import START_SECONDS, TRAINER, Run, python_for

TRAIN = TRAINER + "print('rank', rank, 'of', trainer.world_size, flush=True)\n"


def finish(job, num_ranks):
    """Wait until all ranks have trained and the job has ended well; return what rank 0 printed on stderr."""
    assert job.process.wait(START_SECONDS) == 0, job.err
    assert job.out.count(f"of {num_ranks}\n") == num_ranks
    return job.err


def test_num_gpus_under_a_launcher(run):
    script = TRAIN.replace("(model)", "(model, num_gpus=1)") + "create_distributed_trainer(model, num_gpus=1)\n"
    (line,) = [line for line in finish(run(script), 2).splitlines() if "num_gpus" in line]
    host = re.escape(os.uname().nodename)
    assert re.fullmatch(
        rf"num_gpus=1 has no effect: the launcher started 2 rank\(s\) on {host}, which train. "
        r"For 1 type `mpirun -np 1 \S*python\S* train.py`.",
        line,
    )


@pytest.mark.parametrize(
    "before",
    ["from mpi4py import MPI", "create_distributed_trainer(nn.Linear(1, 1))"],
)
def test_num_gpus_after_mpi_has_started(run, before):
    """A script whose MPI runs already cannot become mpirun."""
    script = before + TRAIN.replace("(model)", "(model, num_gpus=2)")
    err = finish(run(script, command=[*python_for({}), "train.py"]), 1)
    (line,) = [line for line in err.splitlines() if "num_gpus" in line]
    assert line.startswith("num_gpus=2 has no effect: MPI runs already, with 1 rank(s) on ")
    assert "For 2 type `mpirun -np 2 " in line


def test_num_gpus_beside_a_group(run):
    script = "import torch.distributed as dist\ndist.init_process_group('gloo')\n" + TRAIN.replace(
        "(model)", "(model, num_gpus=3, group=dist.group.WORLD)"
    )
    assert finish(run(script), 2) == "num_gpus=3 has no effect: the group's 2 rank(s) train.\n"


def test_more_ranks_than_cores(run):
    """The line names the command, and it works under each way to start ranks."""
    num_cores = len(os.sched_getaffinity(0))
    err = finish(run(TRAIN, num_cores + 1), num_cores + 1)
    (line,) = err.splitlines()
    assert line.startswith(f"{num_cores + 1} ranks share the {num_cores} core(s) of {os.uname().nodename}: they ")
    assert re.search(rf"type `mpirun -np {num_cores} \S*python\S* train.py`\.$", line)


@pytest.mark.slow
def test_another_job_on_the_same_cores(run, tmp_path):
    """The second job's start-up line names the first; it does not when the first only waits."""
    computing = "while not os.path.exists('idle'):\n    pass\n"
    first = run(TRAINER + f"print('ready', flush=True)\n{computing}print('idle', flush=True)\ntime.sleep(60)\n")
    first.wait_for("ready", 2)
    pids = "|".join(map(str, first.pids))
    folder = tmp_path / "second"
    folder.mkdir()
    second = Run(folder, TRAIN)
    finish(second, 2)
    assert re.search(
        rf", on cores where another job computes, too \(process ({pids})( and \d more)?: .*\),", second.out
    )
    (tmp_path / "idle").touch()
    first.wait_for("idle", 2)
    second = Run(folder, TRAIN)
    finish(second, 2)
    assert not re.search(rf"another job.*({pids})", second.out)


@pytest.mark.slow
def test_what_the_first_step_imports_is_loaded():
    """The first optimizer and step import next to nothing: a rank that imports for seconds lets the others wait."""
    script = """
import sys, torch
from distributed_trainer import create_distributed_trainer
model = torch.nn.Linear(2, 2)
trainer = create_distributed_trainer(model)
before = set(sys.modules)
optimizer = torch.optim.AdamW(model.parameters())
trainer.train_step(torch.ones(2, 2), torch.tensor([0, 1]), torch.nn.CrossEntropyLoss(), optimizer)
print("\\nnew:", *set(sys.modules) - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.partition("\nnew:")[2].split()) < 5, done.stdout  # there were 799
