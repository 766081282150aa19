# SPDX-License-Identifier: Apache-2.0
"""Progress of a training, and its figures, on rank 0."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from types import SimpleNamespace

import pytest
import torch
from ranks import JobSpec, job_environment, on_ranks, one_node
from small_models import F64, Net, batch
from torch import nn

from distributed_trainer import create_distributed_trainer
from distributed_trainer.metrics import progress


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        while True:
            yield 1.0


class Log:
    def __init__(self):
        self.calls = []

    def log(self, figures, step):
        self.calls.append((step, figures))


class Scalars:
    def __init__(self):
        self.calls = []

    def add_scalar(self, name, value, step):
        self.calls.append((name, value, step))


@one_node
def test_figures(world):
    model = Net(F64)
    trainer = create_distributed_trainer(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    log, scalars = Log(), Scalars()
    trainer.log_to(log)
    trainer.log_to(scalars, every=2)
    losses, norms = [], []
    for step in range(4):
        loss = trainer.train_step(*batch(8, F64, step), nn.CrossEntropyLoss(), optimizer, clip_norm=1.0)
        losses.append(loss.item())
        norms.append(trainer.gradient_norm.item())
        schedule.step()
    trainer.log({"accuracy": 0.5})
    if world.rank == 0:
        assert [step for step, _ in log.calls] == [1, 2, 3, 4, 4]
        *steps, own = [figures for _, figures in log.calls]
        assert own == {"accuracy": 0.5}
        assert [figures["loss"] for figures in steps] == losses
        assert [figures["gradient_norm"] for figures in steps] == norms
        assert [figures["learning_rate"] for figures in steps] == [0.1, 0.05, 0.025, 0.0125]
        for figures in steps:
            assert figures["samples_per_second"] > 0
            assert 0 <= figures["share_waited"] < 1
            assert figures["slowest_rank"] in range(world.size)
        assert {step for *_, step in scalars.calls} == {2, 4}
        assert ("loss", losses[1], 2) in scalars.calls
    else:
        assert not log.calls
        assert not scalars.calls
    trainer.close()


@pytest.mark.long  # TensorBoard is installed only where the long tests run
@on_ranks(1)
def test_tensorboard(world, tmp_path):
    """torch's SummaryWriter gets the figures."""
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    trainer = create_distributed_trainer(model := Net(F64))
    with SummaryWriter(tmp_path) as writer:
        trainer.log_to(writer)
        trainer.train_step(*batch(8, F64), nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.1))
    assert any(tmp_path.iterdir())
    trainer.close()


@on_ranks(1)
def test_wrong_writers(world):
    trainer = create_distributed_trainer(Net(F64))
    with pytest.raises(TypeError, match="this is a int"):
        trainer.log_to(3)
    with pytest.raises(ValueError, match="every must be an int"):
        trainer.log_to(Log(), every=0)
    trainer.close()


@on_ranks(1, 2)
def test_lines(world, monkeypatch, capsys):
    """Lines are printed if stderr is no terminal."""
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)
    trainer = create_distributed_trainer(model := Net(F64))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = [batch(8, F64, step) for step in range(3)]
    given = []
    for x, y in trainer.progress(batches, "epoch 1"):
        given.append((x, y))
        loss = trainer.train_step(x, y, nn.CrossEntropyLoss(), optimizer)
    assert all(x is a and y is b for (x, y), (a, b) in zip(given, batches, strict=True))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == (4 if world.rank == 0 else 0)
    if world.rank == 0:
        assert re.fullmatch(r"epoch 1: 1 of 3 batches, loss [\d.]+, \d+ samples/s, \d+ s left", lines[0])
        assert f"3 of 3 batches, loss {loss.item():.4g}, " in lines[-1]
    loader = torch.utils.data.DataLoader(Endless())  # its __len__ raises
    for _ in zip(range(2), trainer.progress(loader), strict=False):
        pass
    capsys.readouterr()
    list(trainer.progress(iter(batches)))
    if world.rank == 0:
        assert re.match(r"1 batches, loss", capsys.readouterr().err)
    trainer.close()


def test_lines_are_seconds_apart(monkeypatch, capsys):
    """A line comes every ten seconds, and one at the end."""
    now = [0.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    for _ in progress.ProgressReporter().progress(range(25), "", is_shown=True):
        now[0] += 1
    assert [line.split(",")[0] for line in capsys.readouterr().err.splitlines()] == [
        "10 of 25 batches",
        "20 of 25 batches",
        "25 of 25 batches",
    ]


SCRIPT = """
import torch
from torch import nn
from distributed_trainer import create_distributed_trainer
model = nn.Linear(3, 2)
trainer = create_distributed_trainer(model)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in trainer.progress(range(5), "epoch 7"):
    trainer.train_step(torch.ones(4, 3), torch.tensor([0, 1, 0, 1]), nn.CrossEntropyLoss(), optimizer)
"""


@pytest.mark.slow
def test_bar(tmp_path):
    """tqdm shows a bar in a terminal."""
    pytest.importorskip("tqdm")
    (tmp_path / "train.py").write_text(SCRIPT)
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    command, environment = [sys.executable, "train.py"], job_environment(JobSpec(1))
    process = subprocess.Popen(command, cwd=tmp_path, stderr=theirs, stdout=subprocess.DEVNULL, env=environment)
    os.close(theirs)
    shown = b""
    try:
        while chunk := os.read(ours, 4096):
            shown += chunk
    except OSError:  # Linux raises it when the other end was closed
        pass
    assert process.wait(30) == 0, shown
    os.close(ours)
    assert b"epoch 7" in shown
    assert b"5/5" in shown
    assert re.search(rb"loss 0\.\d+, \d+ samples/s", shown)
