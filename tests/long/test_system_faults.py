# SPDX-License-Identifier: Apache-2.0
"""Messages when a network link is cut and when memory runs out; each rank then ends by itself."""

import os
import re
import sys
import time
from pathlib import Path

import pytest
from hosts import Hosts, require
from ranks import mpirun_path
from scripts import HEAD, START_SECONDS, is_alive

LOOP = """
rank = int(os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK", "0")))
errors = os.open(f"{rank}.err", os.O_WRONLY | os.O_CREAT)
os.dup2(errors, 2)  # its messages to mpirun would have to pass the cut link
open(f"{rank}.pid", "w").write(str(os.getpid()))
trainer = create_distributed_trainer(model)
for i in range(1_000_000):
    step(trainer)
    open(f"{rank}.step", "w").write(str(i))
"""

# Variables for the trainer of LOOP, in seconds.
LIMITS = {"DTRAIN_STALL_REPORT": "2", "DTRAIN_STALL_TIMEOUT": "3"}


def test_cut_link(tmp_path, monkeypatch):
    """Each side of a cut link names the ranks of the other side in one sentence, and ends by itself."""
    require()
    monkeypatch.chdir(tmp_path)
    Path("train.py").write_text(HEAD + LOOP)
    with Hosts(2) as hosts:
        job = hosts.mpirun((2, 2), [sys.executable, "train.py"], capture=True, OMP_NUM_THREADS="1", **LIMITS)
        deadline = time.monotonic() + START_SECONDS
        while len(list(tmp_path.glob("*.step"))) < 4:
            assert time.monotonic() < deadline and job.poll() is None, job.communicate(timeout=5)[0].decode()
            time.sleep(0.1)
        pids = [int(Path(f"{rank}.pid").read_text()) for rank in range(4)]
        hosts.cut(1)
        start = time.monotonic()
        for own, others in (((0, 1), (2, 3)), ((2, 3), (0, 1))):
            sentence = (
                "; ".join(
                    rf"rank {rank} \({hosts.names[others[0] // 2]}, process {pids[rank]}\) does not answer: [^;]*"
                    for rank in others
                )
                + rf"; ranks {own[0]} and {own[1]} wait in train_step, \S*train.py:\d+ \(.*\)"
            )
            said = [wait_for(Path(f"{rank}.err"), rf"distributed_trainer: ({sentence})\n", start + 3) for rank in own]
            assert said[0] == said[1]
        deadline = time.monotonic() + 15
        while any(map(is_alive, pids)):
            assert time.monotonic() < deadline, [Path(f"{rank}.err").read_text() for rank in range(4)]
            time.sleep(0.1)
        assert "The timeout for silent ranks is over" in Path("3.err").read_text()


def wait_for(file, pattern, deadline):
    while not (found := re.search(pattern, file.read_text())):
        assert time.monotonic() < deadline, f"{pattern} is not in\n{file.read_text()}"
        time.sleep(0.05)
    return found[1]


def memory_cgroup():
    """Make a memory cgroup below that of this process; return it and its limit's file, None if that is impossible."""
    lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    for _, controllers, path in lines:
        root, limit = ("memory", "memory.limit_in_bytes") if controllers == "memory" else ("", "memory.max")
        folder = Path("/sys/fs/cgroup", root, path.lstrip("/"), f"test-{os.getpid()}")
        if controllers in ("memory", ""):
            try:
                folder.mkdir()
            except OSError:
                continue
            if (folder / limit).exists():
                return folder, folder / limit
            folder.rmdir()
    return None


def test_out_of_memory(run):
    """The message names the system's out-of-memory killer."""
    made = memory_cgroup()
    if made is None:
        pytest.skip("no memory cgroup can be made here")
    folder, limit = made
    try:
        limit.write_text(str(3 << 30))
        script = f"""
open("{folder}/cgroup.procs", "w").write(str(os.getpid()))
trainer = create_distributed_trainer(model)
open(f"{{trainer.rank}}.pid", "w").write(str(os.getpid()))
step(trainer)
if trainer.rank == 1:
    open("/proc/self/oom_score_adj", "w").write("1000")
    torch.ones(1 << 30)
step(trainer)
"""
        job = run(script, 3, [mpirun_path(), "-np", "3", sys.executable, "train.py"])
        assert job.process.wait(START_SECONDS) != 0
        said = re.findall(r"^distributed_trainer: (rank 1 \(.* is dead: .*)$", job.err, re.MULTILINE)
        assert len(said) == 2, job.err
        killer = "the out-of-memory killer has ended 1 of its machine's processes in this cgroup"
        assert all(killer in line for line in said)
        assert not job.survivors()
    finally:
        deadline = time.monotonic() + 5
        while (folder / "cgroup.procs").read_text() and time.monotonic() < deadline:
            time.sleep(0.1)
        folder.rmdir()
