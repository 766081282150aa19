# SPDX-License-Identifier: Apache-2.0
"""Whole scripts that save at their end, are asked to end, or are killed and started again, and continue from there."""

import os
import re
import sys

import pytest
from scripts import resuming


def finish(job):
    assert job.process.wait(60) == 0, job.out + job.err
    return job.out


@pytest.mark.slow
def test_last_line(run, tmp_path):
    """One rank asks for a save after its last step, when the other rank has already reached the end of its script."""
    finish(run(resuming("2", "0", "if trainer.rank == 1:\n        trainer.save('checkpoints', optimizer=optimizer)")))
    assert os.listdir(tmp_path / "checkpoints") == ["step-00000010"]
    out = finish(run(resuming("2", "0", "pass")))
    assert out.count("from 10") == 2
    assert "epoch" not in out


def test_last_line_fails(run, tmp_path):
    """A save that fails at the end makes the job fail with the reason."""
    (tmp_path / "checkpoints").touch()
    job = run("time.sleep(0)" + resuming("1", "0", "trainer.save('checkpoints/a', optimizer=optimizer)"))
    assert job.process.wait(60) != 0
    assert job.err.count("CheckpointError: rank 0 on") == 1
    assert "Not a directory" in job.err


def test_left_by_exception(run):
    """No save is made if a rank has left by an exception, since its last step may be incomplete."""
    job = run(
        """
trainer = create_distributed_trainer(model)
if trainer.rank == 1:
    try:
        with trainer:
            raise KeyError
    except KeyError:
        pass
else:
    trainer.save("checkpoints")
    trainer.close()
"""
    )
    assert job.process.wait(60) != 0
    assert "the save asked for at the end was not made: rank(s) 1 left the trainer by an exception" in job.err


# Train to the end, though a rank kills itself once, and then from scratch without a fault, to the same bits.
KILLED = """
from torch.utils.data import TensorDataset

def train(is_disturbed):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.2), nn.Linear(8, 2))
    trainer = create_distributed_trainer(model)
    open(f"{trainer.rank}.pid", "w").write(str(os.getpid()))
    optimizer = torch.optim.Adam(model.parameters())
    loader = trainer.loader(TensorDataset(torch.arange(60.0).view(20, 3), torch.arange(20) % 2), 4, shuffle=True)
    step = 0
    if is_disturbed:
        step = trainer.resume("checkpoints", optimizer=optimizer) or 0
        print("from", step, flush=True)
    for _ in trainer.epochs(3):
        for inputs, targets in loader:
            trainer.train_step(inputs, targets, nn.CrossEntropyLoss(), optimizer)
            step += 1
            if not is_disturbed:
                continue
            if step % 3 == 0:
                trainer.save("checkpoints", optimizer=optimizer)
            if step == 10 and trainer.rank == 1 and not os.path.exists("killed"):
                open("killed", "w").write(max(os.listdir("checkpoints")))
                os.kill(os.getpid(), signal.SIGKILL)
    trainer.close()
    state = [value for of_one in optimizer.state_dict()["state"].values() for value in of_one.values()]
    return [*model.state_dict().values(), *state, torch.rand(3)]

for one, other in zip(train(True), train(False), strict=True):
    assert torch.equal(one, other), (one, other)
print("same", flush=True)
"""


@pytest.mark.each_mpi
@pytest.mark.slow
def test_killed_and_started_again(run, tmp_path):
    """The kill happens while the third checkpoint is written; the second is complete, since the third waited for it."""
    words = ["-m", "distributed_trainer", "run", "--restarts", "2", "-np", "2", "train.py"]
    job = run(KILLED, command=[sys.executable, *words])
    assert job.process.wait(100) == 0, job.out + job.err
    newest = (tmp_path / "killed").read_text()
    assert newest in ("step-00000006", "step-00000009")
    said = re.findall(r"the job has ended with exit code \d+ after \d+ s; (restart .*)$", job.err, re.MULTILINE)
    assert said == ["restart 1 of 2"]
    starts = [int(step) for step in re.findall(r"from (\d+)", job.out)]
    assert starts[:2] == [0, 0]
    assert starts[2:] in ([6, 6], [9, 9])
    assert starts[2] >= int(newest[5:])
    assert job.out.count("same") == 2
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step-00000012", "step-00000015"]


@pytest.mark.each_mpi
def test_signal(run, tmp_path):
    """After SIGUSR1 to one rank, all ranks save at the same step and end without an error; the next run continues."""
    job = run(resuming("1000", "0.01", "pass"))
    job.wait_for("epoch 1", 2)
    os.kill(int((tmp_path / "1.pid").read_text()), 10)
    out = finish(job)
    assert job.err == ""
    (line,) = re.findall(r"distributed_trainer: SIGUSR1: saved step (\d+) in \S+checkpoints, ending", out)
    assert os.listdir(tmp_path / "checkpoints") == [f"step-{int(line):08}"]
    job = run(resuming("1000", "0.01", "pass"))
    job.wait_for(f"from {line}", 2)
    job.wait_for("epoch", 2)
    first = int(re.findall(r"epoch (\d+)", job.out)[0])
    assert first == int(line) // 5
