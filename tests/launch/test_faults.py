# SPDX-License-Identifier: Apache-2.0
"""Faults: each ends the job in under 5 s, with an exit code other than 0, and the cause is printed first.

Each test starts a small script, which prints the time of the fault, so that the 5 s count from the fault.
"""

import contextlib
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest
from ranks import end, is_openmpi
from scripts import LIMIT_SECONDS, SINGLETONS, START_SECONDS, TRAINER, Run, is_alive, lines_of

pytestmark = pytest.mark.each_mpi


def test_exception_in_one_rank(run):
    job = run(TRAINER + "if rank == 1:\n    fault()\n    {}['no such key']\nwhile True:\n    step(trainer)\n", 3)
    assert job.exit_code() != 0
    first, *rest = lines_of(job.err)
    assert re.fullmatch(r"rank 1 of 3 on \S+ failed:", first)
    assert rest[0] == "Traceback (most recent call last):"
    assert "KeyError: 'no such key'" in job.err
    assert job.err.count("Traceback") == 1
    assert "is dead" not in job.err, "the launcher has ended the others, which is no news"
    assert not job.survivors()


def test_one_rank_leaves_early(run):
    """When a rank leaves early, the others get an error in the first step in which it takes no part."""
    job = run(TRAINER + "if rank == 1:\n    fault()\n    sys.exit()\nstep(trainer)\nstep(trainer)\n", 3)
    assert job.exit_code() != 0
    assert "rank 1 has left the job, or closed its trainer, while rank 0 waits for it" in job.err
    assert "Make the same number of calls on every rank" in job.err
    assert not job.survivors()


def test_exit_code(run):
    """sys.exit with a code on one rank makes the job's exit code other than 0."""
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
    pid = (job.folder / "1.pid").read_text()
    if not is_openmpi():
        return  # mpiexec kills the other ranks at once, mostly before they can report
    said = re.findall(r"^distributed_trainer: (rank 1 .*)$", job.err, re.MULTILINE)
    assert len(said) == 2, job.err
    for line in said:
        assert re.fullmatch(
            rf"rank 1 \(\S+, process {pid}\) is dead: killed, or ended without a message; it is in "
            rf"(train_step, \S*train.py:\d+, since|the script's own code since) \d\d:\d\d:\d\d.*",
            line,
        )


@pytest.mark.slow
def test_rank_stopped(run):
    """The other ranks report a stopped rank within 5 s, the default."""
    job = run(TRAINER + "print('ready', flush=True)\nwhile True:\n    step(trainer)\n", 3)
    job.wait_for("ready", 3)
    os.kill(int((job.folder / "1.pid").read_text()), signal.SIGSTOP)
    start = time.monotonic()
    while len(said := re.findall(r"^distributed_trainer: (rank 1 .*)$", job.err, re.MULTILINE)) < 2:
        assert time.monotonic() - start < LIMIT_SECONDS, job.err
        time.sleep(0.05)
    assert said[0] == said[1]
    assert re.search(r"is stopped by a signal; it is in .*; ranks 0 and 2 wait in train_step, \S*train.py:\d+", said[0])


@pytest.mark.parametrize("what", ["step", "sleep"])
def test_mpirun_killed(run, what):
    """No rank survives the end of mpirun, whether the rank trains or is in the user's code."""
    body = {"step": "step(trainer)", "sleep": "time.sleep(100)"}[what]
    job = run(TRAINER + f"print('ready', flush=True)\nwhile True:\n    {body}\n")
    job.wait_for("ready", 2)
    assert len(job.pids) == 2
    job.process.kill()
    assert not job.survivors()


@pytest.mark.parametrize("what", ["step", "sleep"])
def test_interrupt(run, what):
    """Ctrl-C reaches mpirun, which passes the signal to the ranks or ends them."""
    body = {"step": "step(trainer)", "sleep": "time.sleep(100)"}[what]
    job = run(TRAINER + f"print('ready', flush=True)\nwhile True:\n    {body}\n")
    job.wait_for("ready", 2)
    job.process.send_signal(signal.SIGINT)
    assert job.process.wait(LIMIT_SECONDS) != 0
    assert not job.survivors()
    assert "is dead" not in job.err


def singleton_environment(rank):
    """Return the variables of a launcher whose job MPI does not find."""
    if is_openmpi():
        return {"PMI_RANK": str(rank), "PMI_SIZE": "2", "SLURM_PROCID": str(rank)}
    return {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}


@pytest.mark.slow
def test_each_is_rank_zero_of_one(run, tmp_path):
    """If MPI does not connect N processes, one of them prints an error that says so."""
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


@pytest.mark.slow
def test_mpirun_of_another_mpi(run, tmp_path):
    """If library and launcher are of two installations, there is an error that says so."""
    of_mpich = {"MPI_LOCALNRANKS": "2", "PMI_RANK": "0", "PMI_SIZE": "2"}
    of_openmpi = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}
    job = run(SINGLETONS, 2, [sys.executable, "train.py"], **(of_mpich if is_openmpi() else of_openmpi))
    assert job.exit_code() != 0
    assert "MPINotFoundError" in job.err
    assert "Each process would be a separate job" in job.err


@pytest.mark.slow
def test_restart_under_mpirun(run):
    """Plain python with num_gpus=2 becomes mpirun, with the same options and arguments, in the folder of its start."""
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


LITTER = {
    "ours": TRAINER + "print('ready', flush=True)\nwhile True:\n    step(trainer)\n",
    "bare": "from mpi4py import MPI\nrank = MPI.COMM_WORLD.rank\nopen(f'{rank}.pid', 'w').write(str(os.getpid()))\n"
    "MPI.COMM_WORLD.Barrier()\nprint('ready', flush=True)\nwhile True:\n    MPI.COMM_WORLD.allreduce(1)\n",
}


@pytest.mark.slow
def test_no_litter(run, tmp_path):
    """After kill -9 of every rank no more files are left than after a plain MPI program."""
    left = {}
    for name, script in LITTER.items():
        temporary = tmp_path / f"temporary-{name}"
        temporary.mkdir()
        before = left_files(temporary)
        (tmp_path / name).mkdir()
        job = Run(tmp_path / name, script, 2, TMPDIR=str(temporary))
        try:
            job.wait_for("ready", 2)
            pids = job.pids
            assert len(pids) == 2
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            assert not job.survivors()
            assert job.process.wait(START_SECONDS) != 0
        finally:
            end(job.process, [pid for pid in job.pids if is_alive(pid)])
        time.sleep(0.5)
        after = {path for path in left_files(temporary) - before if not is_in_use(path)}
        left[name] = {path.name[:6] for path in after}  # kinds of files; the number of the job is later in the name
        for path in after:
            if path.parent == Path("/dev/shm") and is_mine(path):
                path.unlink(missing_ok=True)
    assert not {name for name in left["ours"] if "dtrain" in name or "distributed" in name}
    assert left["ours"] <= left["bare"]


def left_files(temporary):
    """Return the files in shared memory, where other programs have folders, and all below a temporary folder."""
    return {path for path in Path("/dev/shm").iterdir() if path.is_file()} | set(temporary.rglob("*"))


def is_in_use(path):
    """Return whether another job on this machine uses a file."""
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            if str(path) in maps.read_text():
                return True
    return False


def is_mine(path):
    return path.is_file() and path.stat().st_uid == os.getuid() and re.match(r"(sm_segment|mpich_shm|ucx)", path.name)
