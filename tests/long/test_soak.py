# SPDX-License-Identifier: Apache-2.0
"""Training for a long time on four ranks, one of which is killed every few seconds at a random moment.

Training continues without the killed rank. It starts again from the newest checkpoint where Open MPI gets stuck as a
new process is admitted, or where the last rank was killed before a new process was admitted.

SOAK_SECONDS=1800 makes the test run for half an hour. `pytest -s` prints its figures. When the time is over, the test
writes the number of an epoch to a file, and the ranks end by themselves after that epoch. A reference run then trains
as many epochs without kills.
"""

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from ranks import mpirun_path
from scripts import shell_environment

SECONDS = float(os.environ.get("SOAK_SECONDS", "60"))
BETWEEN_KILLS = (5, 15) if SECONDS > 600 else (3, 8)
NUM_RANKS = 4
STEP_SECONDS = 0.05  # a step takes at least this long

SCRIPT = """
import os, sys, time
import torch
from torch import nn
from distributed_trainer import create_distributed_trainer

seconds = float(sys.argv[1])
torch.manual_seed(1)
model = nn.Sequential(nn.Linear(20, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Dropout(0.1), nn.Linear(256, 5))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
trainer = create_distributed_trainer(model, reproducible=8)
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 100, 0.99)
inputs = torch.randn(1280, 20)
loader = trainer.loader(torch.utils.data.TensorDataset(inputs, inputs[:, :5].argmax(1)), 64, shuffle=True)
open(f"{os.getpid()}.pid", "w").close()
trainer.resume("checkpoints", optimizer=optimizer, scheduler=scheduler)
for epoch in trainer.epochs(1_000_000):
    for x, y in loader:
        loss = trainer.train_step(x, y, nn.CrossEntropyLoss(), optimizer)
        scheduler.step()
        time.sleep(seconds)
    trainer.save("checkpoints", optimizer=optimizer, scheduler=scheduler)
    if trainer.rank == 0:
        print("epoch", epoch, loss.item(), trainer.world_size, flush=True)
    if os.path.exists("last") and epoch == int(open("last").read()):
        break
if trainer.rank == 0:
    torch.save([model.state_dict(), optimizer.state_dict(), scheduler.state_dict(), loss], "end.pt")
"""


@pytest.mark.timeout(6 * SECONDS + 300)
def test_soak(tmp_path):
    if b"Open MPI) 5" not in subprocess.run([mpirun_path(), "--version"], capture_output=True, check=True).stdout:
        pytest.skip("needs Open MPI 5, where a rank survives the death of another")
    seed = random.randrange(1 << 32)
    rng = random.Random(seed)
    print(f"seed {seed}")
    reference, soak = tmp_path / "reference", tmp_path / "soak"
    for folder in (reference, soak):
        folder.mkdir()
        (folder / "train.py").write_text(SCRIPT)
    environment = shell_environment(TMPDIR=str(tmp_path))
    command = [sys.executable, "-m", "distributed_trainer", "run", "--elastic", "--restarts", "30"]
    command += ["-np", str(NUM_RANKS), "train.py"]
    with (soak / "out").open("wb") as out, (soak / "err").open("wb") as err:
        process = subprocess.Popen(
            [*command, str(STEP_SECONDS)],
            cwd=soak,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
        )
    try:
        num_kills, usage = _kill_now_and_then(process, soak, rng)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(30)
    text = (soak / "out").read_text() + (soak / "err").read_text(errors="replace")
    assert process.returncode == 0, text[-5000:]
    num_survived = len(re.findall("were killed: training continues", text))
    num_replaced = len(re.findall("taken the place", text))
    num_restarts = len(re.findall("; restart [0-9]+ of", text))
    print(f"{num_kills} kills; training continued {num_survived} times, with {num_replaced} new processes; the job")
    print(f"was started again {num_restarts} times")
    (soak / "last").rename(reference / "last")
    subprocess.run([sys.executable, "train.py", "0"], cwd=reference, env=environment, check=True)
    expected, found = (torch.load(folder / "end.pt", weights_only=False) for folder in (reference, soak))
    _assert_same(expected, found)
    assert not list(Path("/dev/shm").glob(f"distributed-trainer-{process.pid}-*"))
    assert not list(tmp_path.glob(".distributed-trainer*"))
    for pid, rows in usage.items():
        most = tuple(map(max, zip(*rows, strict=True)))
        print(f"process {pid}: {len(rows)} samples; descriptors, MB: {rows[0]} first, {rows[-1]} last, {most} most")
        settled = rows[len(rows) // 2 :]
        assert settled[-1][0] <= settled[0][0] + 16, (pid, rows)
        assert settled[-1][1] <= 1.1 * settled[0][1] + 20, (pid, rows)


def _kill_now_and_then(process, folder, rng):
    """Kill a random rank every few seconds until the job ends.

    Returns:
        The number of kills; for each process with at least 10 samples, these samples: (open descriptors, MB).
    """
    usage = defaultdict(list)
    num_kills, next_kill = 0, time.monotonic() + 10
    end = time.monotonic() + SECONDS
    while process.poll() is None:
        assert time.monotonic() < end + 120, "the job does not end"
        if time.monotonic() > end and not (folder / "last").exists():
            numbers = re.findall("^epoch ([0-9]+)", (folder / "out").read_text(), re.MULTILINE)
            (folder / "last.new").write_text(str(max(map(int, numbers), default=0) + 3))
            (folder / "last.new").rename(folder / "last")
        time.sleep(0.2)
        pids = [pid for pid in (int(file.stem) for file in folder.glob("*.pid")) if _is_rank(pid, folder)]
        for pid in pids:
            with contextlib.suppress(FileNotFoundError):  # the rank has just ended by itself
                usage[pid].append((len(os.listdir(f"/proc/{pid}/fd")), _megabytes(pid)))
        if time.monotonic() > next_kill and len(pids) > 1:
            time.sleep(rng.random() * 2 * STEP_SECONDS)
            os.kill(rng.choice(pids), signal.SIGKILL)
            num_kills += 1
            next_kill = time.monotonic() + rng.uniform(*BETWEEN_KILLS)
    return num_kills, {pid: rows for pid, rows in usage.items() if len(rows) >= 10}


def _is_rank(pid, folder):
    """Return whether this is a living rank: by now the number may be another process's, which must not be killed."""
    try:
        return os.readlink(f"/proc/{pid}/cwd") == os.fspath(folder)
    except OSError:
        return False


def _megabytes(pid):
    """Return the resident memory of a process in MB, without shared memory; 0 if it has ended."""
    try:
        pages = Path(f"/proc/{pid}/statm").read_text().split()
    except OSError:
        return 0
    return (int(pages[1]) - int(pages[2])) * os.sysconf("SC_PAGESIZE") >> 20


def _assert_same(expected, found):
    if isinstance(expected, torch.Tensor):
        assert torch.equal(expected, found)
    elif isinstance(expected, dict):
        assert expected.keys() == found.keys()
        for key in expected:
            _assert_same(expected[key], found[key])
    elif isinstance(expected, list):
        for one, other in zip(expected, found, strict=True):
            _assert_same(one, other)
    else:
        assert expected == found
