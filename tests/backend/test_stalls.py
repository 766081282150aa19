# SPDX-License-Identifier: Apache-2.0
"""The report about a rank for which others wait: which rank, where, since when, why; in equal words on every rank."""

import re
import sys
import time

import forked
import pytest
from ranks import is_openmpi, mpirun_path
from scripts import START_SECONDS
from torch import nn

from distributed_trainer import create_distributed_trainer

REPORT_SECONDS = 2

# Three ranks, of which the last does something else than step on line {line}, at `now()`. Those that wait have called
# step, whose train_step is on line {step_line} of the file.
SCRIPT = """
import ctypes, fcntl
trainer = create_distributed_trainer(model)
rank = trainer.rank
open(f"{{rank}}.pid", "w").write(str(os.getpid()))
step(trainer)

def now():
    print("fault", time.time(), flush=True)

{before}
if rank == {culprit}:
    now()
    {fault}
{after}
print("done", flush=True)
"""

STACK = "distributed_trainer: rank {rank}, for which others wait, is here:\n"


def start(run, fault, culprit=2, num_ranks=3, before="", after="step(trainer)", timeout=60, **options):
    script = SCRIPT.format(before=before, culprit=culprit, fault=fault, after=after)
    limits = {"DTRAIN_STALL_REPORT": str(REPORT_SECONDS), "DTRAIN_STALL_TIMEOUT": str(timeout)}
    return run(script, num_ranks, **limits, **options)


def line_of(job, text):
    """Return the line of a statement in the script."""
    lines = (job.folder / "train.py").read_text().splitlines()
    return 1 + max(number for number, line in enumerate(lines) if text in line)


def reports(job, num_expected, timeout_seconds=10):
    """Wait until ranks have printed `num_expected` reports; return these, and the seconds since the fault."""
    job.wait_for("fault")
    fault = float(re.search(r"fault ([\d.]+)", job.out)[1])
    deadline = time.monotonic() + timeout_seconds
    while True:
        lines = re.findall(r"^distributed_trainer: (rank \d \(.*|all ranks wait.*)$", job.err, re.MULTILINE)
        if len(lines) >= num_expected:
            return lines, time.time() - fault
        assert time.monotonic() < deadline, job.out + job.err
        time.sleep(0.02)


def check(job, culprit, what, waiting="ranks 0 and 1 wait in "):
    """Check that all waiting ranks print the same report, in time."""
    num_waiting = len(re.findall(r"\d", waiting))
    lines, seconds = reports(job, num_waiting)
    assert seconds < REPORT_SECONDS + 0.5
    assert len(set(lines)) == 1, lines
    train_step = rf"train_step, \S*train.py:{line_of(job, 'return trainer.train_step')}"
    sentence = (
        rf"rank {culprit} \(\S+, process \d+\) "
        + what.replace("STEP", train_step).replace("SCRIPT", r"\S*train.py")
        + f"; {waiting}{train_step}"
        + r" \(all_gather\(\d+ uint8\)\)"
    )
    assert re.fullmatch(sentence, lines[0]), f"{lines[0]}\n{sentence}"


TIME = r"\d\d:\d\d:\d\d"


def check_stack(job, culprit, *texts):
    """Check that the culprit prints its own stack once, with these texts."""
    deadline = time.monotonic() + 5
    while not all(text in job.err.partition(STACK.format(rank=culprit))[2] for text in texts):
        assert time.monotonic() < deadline, job.err
        time.sleep(0.02)
    assert job.err.count(STACK.format(rank=culprit)) == 1


@pytest.mark.slow
def test_slow_data(run):
    """A rank that reads a batch slowly is named once by every rank, with its stack, and is not killed."""
    job = start(run, "time.sleep(3.2)", after="for _ in range(2):\n    step(trainer)\n    time.sleep(3 * (rank == 2))")
    check(job, 2, f"is in the script's own code since {TIME}, after STEP")
    check_stack(job, 2, f'train.py", line {line_of(job, "time.sleep(3.2)")} in <module>')
    assert job.process.wait(START_SECONDS) == 0, job.err
    lines, _ = reports(job, 2)
    assert len(lines) == 2, "the shorter pauses after it are not worth a word"


@pytest.mark.slow
def test_limits_of_the_command(run):
    """`run --stall-report` and `--stall-timeout` set the limits of one job."""
    limits = ["--stall-report", str(REPORT_SECONDS), "--stall-timeout", "60"]
    command = [sys.executable, "-m", "distributed_trainer", "run", "-np", "2", *limits, *forked.client(), "train.py"]
    job = run(SCRIPT.format(before="", culprit=1, fault="time.sleep(3)", after="step(trainer)"), command=command)
    (line,), seconds = reports(job, 1)
    assert "rank 1 (" in line
    assert REPORT_SECONDS - 0.5 < seconds < REPORT_SECONDS + 0.5
    assert job.process.wait(START_SECONDS) == 0, job.err


@pytest.mark.slow
def test_slow_forward(run):
    """A rank that is long in forward, as in a compilation, is reported."""
    before = "model.register_forward_pre_hook(lambda *_: time.sleep(3) if rank == 1 else None)"
    job = start(run, "pass", culprit=1, num_ranks=2, before=before)
    lines, seconds = reports(job, 1)
    assert seconds < REPORT_SECONDS + 0.5
    assert re.match(rf"rank 1 \(\S+, process \d+\) is in train_step, \S*train.py:\d+, since {TIME}; ", lines[0])
    check_stack(job, 1, "in <lambda>", "in train_step\n")
    assert job.process.wait(START_SECONDS) == 0, job.err


OWN_LOOP = """
def own_step():
    with trainer.forward():
        loss = model(torch.ones(2, 3)).sum()
    trainer.backward(loss, weight=2)

own_step()
"""


@pytest.mark.parametrize(
    ("call", "fault"),
    [
        ("forward", "model.register_forward_pre_hook(lambda *_: time.sleep(3))"),
        ("backward", "model.weight.register_hook(lambda *_: time.sleep(3))"),
    ],
)
@pytest.mark.slow
def test_own_loop(run, call, fault):
    job = start(run, fault, culprit=1, num_ranks=2, before=OWN_LOOP, after="own_step()")
    (line,), seconds = reports(job, 1)
    assert seconds < REPORT_SECONDS + 0.5
    forward, backward = (rf"\S*train.py:{line_of(job, text)}" for text in ("with trainer.", "trainer.backward"))
    place = {"forward": forward, "backward": backward}[call]
    sentence = rf"rank 1 \(.*\) is in {call}, {place}, since {TIME}; rank 0 waits in backward, {backward} \(.*\)"
    assert re.fullmatch(sentence, line), f"{line}\n{sentence}"
    check_stack(job, 1, "in <lambda>", "in own_step\n")
    assert job.process.wait(START_SECONDS) == 0, job.err


@pytest.mark.slow
def test_interpreter_held(run):
    """The stall monitor works while C code holds the interpreter's lock and no Python runs in that process."""
    job = start(run, "ctypes.PyDLL(None).usleep(3_500_000)", culprit=1, num_ranks=2)
    check(job, 1, f"is in the script's own code since {TIME}, after STEP", waiting="rank 0 waits in ")
    check_stack(job, 1, f'train.py", line {line_of(job, "usleep")} in <module>')
    assert job.process.wait(START_SECONDS) == 0, job.err


@pytest.mark.slow
def test_slow_import(run, tmp_path):
    """The stack of a rank that imports shows the importing modules, without the frames of importlib."""
    (tmp_path / "outer.py").write_text("import inner\n")
    (tmp_path / "inner.py").write_text("import time\ntime.sleep(1)\n")
    script = SCRIPT.format(before="", culprit=1, fault="import outer", after="step(trainer)")
    job = run(script, 2, DTRAIN_STALL_REPORT="0.3")
    assert job.process.wait(START_SECONDS) == 0, job.err
    frames = job.err.partition(STACK.format(rank=1))[2].partition("recent call first):\n")[2].splitlines()
    places = [("inner.py", 2), ("outer.py", 1), ("train.py", line_of(job, "import outer"))]
    for frame, (file, line) in zip(frames, places, strict=False):
        assert frame.endswith(f'{file}", line {line} in <module>'), job.err


@pytest.mark.slow
def test_lock_of_the_users(run):
    """A rank waits for the user's lock, which another rank holds while it waits for the first."""
    before = "lock = open('lock', 'w')\nif rank == 0:\n    fcntl.flock(lock, fcntl.LOCK_EX)\nstep(trainer)"
    job = start(run, "fcntl.flock(lock, fcntl.LOCK_EX)", culprit=1, num_ranks=2, before=before)
    check(job, 1, f"is in the script's own code since {TIME}, after STEP", waiting="rank 0 waits in ")
    check_stack(job, 1, f"line {line_of(job, '    fcntl.flock(lock, fcntl.LOCK_EX)')} in <module>")


def test_different_groups(run):
    """Two ranks that wait for each other in calls of different groups are reported, though no rank is missing."""
    before = "from distributed_trainer.backend import job\nother = job.start(None, None).create_group([0, 1])"
    job = start(run, "other.barrier().wait()", culprit=1, num_ranks=2, before=before)
    lines, seconds = reports(job, 2)
    assert seconds < REPORT_SECONDS + 0.5
    assert len(set(lines)) == 1
    assert re.fullmatch(
        r"all ranks wait, but in different calls: rank 0 waits in train_step, \S*train.py:\d+ "
        r"\(all_gather\(\d+ uint8\)\); rank 1 waits in barrier\(\)",
        lines[0],
    )


def test_message_in_a_group(run):
    """A rank that waits for a message reports the sender, whose number in the group is not its number in the job."""
    before = """
from distributed_trainer.backend import job
pair = job.start(None, None).create_group([1, 2]) if rank else None
"""
    after = "if rank == 1:\n    pair.recv([torch.empty(1)], 1, 0).wait()\ntime.sleep(60)"
    job = start(run, "time.sleep(60)", before=before, after=after)
    [line], _ = reports(job, 1)
    assert re.match(r"rank 2 \(.*; rank 1 waits in receive\(from rank 2, 1 float32\)", line), line


@pytest.mark.slow
def test_set_up(run):
    """A stall is reported if only some ranks make a second trainer."""
    job = start(run, "time.sleep(3)", after="second = create_distributed_trainer(nn.Linear(2, 2))")
    lines, _ = reports(job, 2)
    assert len(set(lines)) == 1
    assert re.search(
        rf"; ranks 0 and 1 wait in create_distributed_trainer, \S*train.py:{line_of(job, 'second =')} \(the set-up",
        lines[0],
    )
    assert job.process.wait(START_SECONDS) == 0, job.err


def test_other_calls(run):
    """If two ranks leave the loop a batch early and call something else, an error at once says where each rank is."""
    job = start(run, "trainer.summary()", after="trainer.load('checkpoints') if rank == 1 else step(trainer)")
    assert job.exit_code() != 0
    calls = ("return trainer.train_step", "trainer.load", "trainer.summary")
    step, load, summary = (rf"\S*train.py:{line_of(job, text)}" for text in calls)
    places = f"rank 0: train_step, {step}; rank 1: load, {load}; rank 2: summary, {summary}"
    assert re.search(
        rf"MismatchError: every rank must make the same calls .* these differ: {places}\. \(ranks", job.err
    )


@pytest.mark.slow
def test_stopped_on_several_nodes(run):
    """A rank on the stopped rank's node reports it to the ranks of the other node."""
    job = start(run, "os.kill(os.getpid(), signal.SIGSTOP)", culprit=3, num_ranks=4, DTRAIN_RANKS_PER_NODE="2")
    waiting = "ranks 0, 1 and 2 wait in "
    check(job, 3, f"is stopped by a signal; it is in the script's own code since {TIME}, after STEP", waiting)


@pytest.mark.skipif(not is_openmpi(), reason="MPICH's mpiexec kills the others")
@pytest.mark.slow
def test_killed_where_the_launcher_goes_on(run):
    """Ranks that wait for a dead rank end by themselves if the launcher does not end them."""
    command = [mpirun_path(), "--enable-recovery", "-np", "3", *forked.python(), "train.py"]
    job = start(run, "os.kill(os.getpid(), signal.SIGKILL)", command=command)
    lines, _ = reports(job, 4)
    assert len(set(lines)) == 2, "one that it is dead, one that they wait for it"
    assert job.process.wait(START_SECONDS) != 0
    assert re.search(r"DistributedTrainerError: .*rank 2 \(\S+, process \d+\) is dead: ", job.err)
    assert "DTRAIN_STALL_TIMEOUT" not in job.err
    assert not job.survivors()


@pytest.mark.slow
def test_lone_on_its_node(run):
    """If the stopped rank is alone on its node, no rank can report it; after the timeout each rank ends itself."""
    job = start(
        run, "os.kill(os.getpid(), signal.SIGSTOP)", culprit=1, num_ranks=2, timeout=1, DTRAIN_RANKS_PER_NODE="1"
    )
    lines, _ = reports(job, 1)
    assert re.match(r"rank 1 \(\S+, process \d+\) does not answer: ", lines[0])
    assert job.process.wait(START_SECONDS) != 0
    assert "The timeout for silent ranks is over (DTRAIN_STALL_TIMEOUT)" in job.err
    assert not job.survivors()


@pytest.mark.parametrize("seconds", ["0", "-1", "5s", "nan", "inf", ""])
@pytest.mark.parametrize("name", ["DTRAIN_STALL_REPORT", "DTRAIN_STALL_TIMEOUT"])
def test_wrong_limits(monkeypatch, name, seconds):
    """A wrong limit raises before anything is started, and the message names the variable."""
    monkeypatch.setenv(name, seconds)
    with pytest.raises(ValueError, match=f"{name} must be a number of seconds above 0, not {seconds!r}"):
        create_distributed_trainer(nn.Linear(1, 1))
