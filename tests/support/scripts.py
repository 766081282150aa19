# SPDX-License-Identifier: Apache-2.0
"""Small training scripts in flight, for tests of how a job ends; see the fixture `run`."""

import contextlib
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import forked
import pytest
from ranks import JobSpec, job_environment, mpirun_path

import distributed_trainer

LIMIT_SECONDS = 5
START_SECONDS = 60

# The beginning of every script. It calls `fault()` right before the fault. The garbage collector skips the imported
# modules: to search them would take a third of the script's time, at the start and at the end.
HEAD = """
import gc
gc.disable()
import os, signal, sys, time
import torch
from torch import nn
from distributed_trainer import create_distributed_trainer
gc.enable()
gc.freeze()

def fault():
    print("fault", time.time(), flush=True)

def step(trainer, x=None, y=None, criterion=None, optimizer=None):
    x = torch.arange(12.0).view(4, 3) if x is None else x
    y = torch.tensor([0, 1, 0, 1]) if y is None else y
    return trainer.train_step(x, y, criterion or nn.CrossEntropyLoss(), optimizer or the_optimizer)

torch.manual_seed(0)
model = nn.Linear(3, 2)
the_optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
"""

# Makes a script wait until a process that takes a killed one's place is ready to be admitted to the next step.
NEW_PROCESS = """
import time

def wait_for_process(trainer):
    deadline = time.monotonic() + 60
    while trainer.rank == 0 and not trainer._recovery.flags:
        assert time.monotonic() < deadline
        trainer._recovery._replacement.start_if_needed(trainer._session)
        time.sleep(0.01)
"""
TRAINER = """
trainer = create_distributed_trainer(model)
rank = trainer.rank
open(f"{rank}.pid", "w").write(str(os.getpid()))
step(trainer)
"""


def python_for(environment):
    """Return the command that runs a script: forked if all variables of a test are read by this package alone."""
    return forked.python() if all(name.startswith("DTRAIN_") for name in environment) else [sys.executable]


class Run:
    """A script in flight, in a folder of its own."""

    def __init__(self, folder, script, num_ranks=2, command=None, **environment):
        self.folder = folder
        (folder / "train.py").write_text(HEAD + script)
        self._out = (folder / "out").open("wb")
        self._err = (folder / "err").open("wb")
        command = command or [mpirun_path(), "-np", str(num_ranks), *python_for(environment), "train.py"]
        self.process = subprocess.Popen(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=self._out,
            stderr=self._err,
            env=job_environment(JobSpec(num_ranks), **environment),
            start_new_session=True,
        )

    @property
    def out(self):
        return (self.folder / "out").read_text(errors="replace")

    @property
    def err(self):
        return (self.folder / "err").read_text(errors="replace")

    @property
    def pids(self):
        return [int(file.read_text() or 0) for file in self.folder.glob("*.pid")]

    def wait_for(self, text, times=1, timeout_seconds=START_SECONDS):
        deadline = time.monotonic() + timeout_seconds
        while self.out.count(text) < times:
            assert time.monotonic() < deadline, f"no {text!r} in time:\n{self.out}{self.err}"
            assert self.process.poll() is None, f"ended before {text!r}:\n{self.out}{self.err}"
            time.sleep(0.01)

    def exit_code(self):
        """Wait for the end, which must come within 5 s of the fault."""
        self.wait_for_fault_or_end()
        faults = [float(moment) for moment in re.findall(r"fault ([\d.]+)", self.out)]
        start = max(faults) if faults else time.time()
        try:
            code = self.process.wait(max(0.1, start + LIMIT_SECONDS - time.time()))
        except subprocess.TimeoutExpired:
            stacks = "\n".join(map(stack_of, self.pids))
            pytest.fail(f"still there {LIMIT_SECONDS} s after the fault:\n{self.out}{self.err}\n{stacks}")
        return code

    def wait_for_fault_or_end(self):
        deadline = time.monotonic() + START_SECONDS
        while "fault" not in self.out and self.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)

    def survivors(self):
        """Ranks that are still there 5 s later, at the latest."""
        deadline = time.monotonic() + LIMIT_SECONDS
        while (left := [pid for pid in self.pids if is_alive(pid)]) and time.monotonic() < deadline:
            time.sleep(0.05)
        return left


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def stack_of(pid):
    command = [sys.executable, "-m", "py_spy", "dump", "--pid", str(pid)]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout
    return ""


def lines_of(text):
    """Return the lines that are not blank, without the line about more ranks than cores, which 3 ranks may print."""
    return [line for line in text.splitlines() if line.strip() and " ranks share the " not in line]


SINGLETONS = "fault()\ntrainer = create_distributed_trainer(model)\nprint('trains', flush=True)\n"

# Trains, and continues from the newest checkpoint; see `resuming`.
_RESUMING = """
import gc
from torch.utils.data import TensorDataset

def main():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    trainer = create_distributed_trainer(model, shard="optimizer")
    open(f"{trainer.rank}.pid", "w").write(str(os.getpid()))
    optimizer = torch.optim.Adam(model.parameters())
    print("from", trainer.resume("checkpoints", optimizer=optimizer), flush=True)
    data = TensorDataset(torch.arange(60.0).view(20, 3), torch.arange(20) % 2)
    loader = trainer.loader(data, 4)
    for epoch in trainer.epochs(EPOCHS):
        for inputs, targets in loader:
            trainer.train_step(inputs, targets, nn.CrossEntropyLoss(), optimizer)
            time.sleep(PAUSE)
        print("epoch", epoch, flush=True)
    LAST_LINE

main()
gc.collect()
"""


def resuming(epochs, pause, last_line):
    return _RESUMING.replace("EPOCHS", epochs).replace("PAUSE", pause).replace("LAST_LINE", last_line)


def shell_environment(**extra):
    """Return the environment of a user who has set no variable of MPI; `make` sets some for the tests."""
    made = re.compile("OMPI_|PRTE_|PMI|MPI_|DTRAIN_|PYTHONUNBUFFERED")
    others = {name: value for name, value in os.environ.items() if not made.match(name)}
    source = str(Path(distributed_trainer.__file__).parent.parent)
    return others | {"PYTHONPATH": source} | extra
