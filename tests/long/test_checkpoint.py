# SPDX-License-Identifier: Apache-2.0
"""Checkpoints when ranks are killed at any moment, when the disk is full, and when their files were changed."""

import os
import random
import re
import shutil
import signal
import subprocess
import time

import pytest
import torch
from torch import nn

from distributed_trainer import CheckpointError, create_distributed_trainer

# Each step adds 1 to all weights, so the weights in a checkpoint follow from the number of its step.
SCRIPT = """
class Count(nn.Module):
    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList(torch.zeros(100_003) for _ in range(3))

    def forward(self, x):
        return sum(weight.sum() for weight in self.weights) * x

model = Count()
trainer = create_distributed_trainer(model, shard="optimizer")
open(f"{trainer.rank}.pid", "w").write(str(os.getpid()))
optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=1e-9, maximize=True)
done = trainer.resume("FOLDER", optimizer=optimizer) or 0
assert all((weight == done).all() for weight in model.weights), (done, [w[:3] for w in model.weights])
print("from", done, flush=True)
for number in range(done + 1, done + 1 + STEPS):
    trainer.train_step(torch.ones(2, 1), torch.zeros(2, 1), lambda out, y: out.mean(), optimizer)
    if trainer.rank == number % trainer.world_size:
        trainer.save("FOLDER", optimizer=optimizer)
    print("step", number, flush=True)
trainer.close()
print("closed", flush=True)
"""


def script(folder, steps):
    return SCRIPT.replace("FOLDER", str(folder)).replace("STEPS", str(steps))


@pytest.mark.timeout(300)
def test_killed_at_any_moment(run, tmp_path):
    """Kill one rank or all at a random moment while every step saves: the newest checkpoint is complete and not old."""
    generator = random.Random(0)
    reached = 0
    for _ in range(12):
        for file in tmp_path.glob("*.pid"):
            file.unlink()
        job = run(script("checkpoints", 100_000))
        job.wait_for("from", 2)
        done = int(re.findall(r"from (\d+)", job.out)[0])
        # The step after `save` makes the checkpoint. The step after that waits for it, so at its end it is complete.
        assert done >= reached - 2, (done, reached)
        time.sleep(0.05 + generator.random())
        victims = job.pids if generator.random() < 0.5 else [generator.choice(job.pids)]
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        assert job.process.wait(20) != 0
        assert not job.survivors()
        reached = max([done, *(int(step) for step in re.findall(r"step (\d+)", job.out))])
    assert reached > 12
    assert len(list((tmp_path / "checkpoints").glob("step-*"))) in (2, 3)  # the oldest checkpoint is removed last


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"needs the right to mount: {mount.stderr}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_full_disk(run, small_disk):
    """A full disk raises the same error on all ranks; the last complete checkpoint remains."""
    (small_disk / "large").write_bytes(bytes(2 << 20))
    job = run(script(small_disk / "checkpoints", 4).replace("trainer.save(", "trainer.save(keep=9, folder="))
    assert job.process.wait(60) != 0
    assert re.search(r"not made: rank [01] on \S+ could not write to \S+\.part: No space left on device", job.err)
    left = [path.name for path in (small_disk / "checkpoints").iterdir()]
    assert left
    assert not [name for name in left if name[0] == "."]
    (small_disk / "large").unlink()
    job = run(script(small_disk / "checkpoints", 1).replace("trainer.save(", "trainer.save(keep=1, folder="))
    assert job.process.wait(60) == 0, job.err
    assert f"from {int(max(left)[5:])}" in job.out


def test_changed_files(tmp_path):
    """Load a checkpoint with a file cut or bytes changed: the result is what was saved, or a CheckpointError."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 7), nn.Linear(7, 2))
    trainer = create_distributed_trainer(model)
    optimizer = torch.optim.Adam(model.parameters())
    trainer.train_step(torch.randn(4, 9), torch.arange(4) % 2, nn.CrossEntropyLoss(), optimizer)
    trainer.save(tmp_path / "whole", optimizer=optimizer)
    trainer.close()
    (whole,) = (tmp_path / "whole").iterdir()
    expected = [value.clone() for value in model.state_dict().values()]
    expected += [value for state in optimizer.state_dict()["state"].values() for value in state.values()]

    other = nn.Sequential(nn.Linear(9, 7), nn.Linear(7, 2))
    trainer = create_distributed_trainer(other)
    generator = random.Random(0)
    num_errors = num_tries = 0
    end = time.monotonic() + 8
    while time.monotonic() < end:
        changed = tmp_path / "changed"
        shutil.copytree(whole, changed)
        file = generator.choice(sorted(changed.iterdir()))
        contents = bytearray(file.read_bytes())
        if generator.random() < 0.3:
            del contents[generator.randrange(len(contents)) :]
        else:
            for _ in range(generator.choice([1, 1, 4])):
                contents[generator.randrange(len(contents))] = generator.randrange(256)
        file.write_bytes(contents)
        optimizer = torch.optim.Adam(other.parameters())
        num_tries += 1
        try:
            assert trainer.load(changed, optimizer=optimizer) == 1
        except CheckpointError:
            num_errors += 1
        else:
            loaded = [*other.state_dict().values()]
            loaded += [value for state in optimizer.state_dict()["state"].values() for value in state.values()]
            assert all(torch.equal(one, two) for one, two in zip(loaded, expected, strict=True))
        shutil.rmtree(changed)
    trainer.close()
    assert num_tries > 100
    assert num_errors > num_tries // 2
