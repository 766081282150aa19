# SPDX-License-Identifier: Apache-2.0
"""What is said of a rank for which others wait: who, where, since when and why, in the same words on every rank."""

import re
import sys
import time

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
trainer = create_distributed_trainer(model, stall_report_seconds={report}, stall_timeout_seconds={timeout})
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
    script = SCRIPT.format(
        report=REPORT_SECONDS, timeout=timeout, before=before, culprit=culprit, fault=fault, after=after
    )
    return run(script, num_ranks, **options)


def line_of(job, text):
    """Where in the script a statement is."""
    lines = (job.folder / "train.py").read_text().splitlines()
    return 1 + max(number for number, line in enumerate(lines) if text in line)


def reports(job, num_expected, timeout_seconds=10):
    """What ranks have said, once there is so much of it, and how long after the fault."""
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
    """All that wait say the same, in time."""
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
    """Says itself where it is."""
    deadline = time.monotonic() + 5
    while not all(text in job.err.partition(STACK.format(rank=culprit))[2] for text in texts):
        assert time.monotonic() < deadline, job.err
        time.sleep(0.02)
    assert job.err.count(STACK.format(rank=culprit)) == 1


def test_slow_data(run):
    """A rank that takes long to read a batch: named with its stack, by every rank once, and not killed."""
    job = start(run, "time.sleep(3.2)", after="for _ in range(2):\n    step(trainer)\n    time.sleep(3 * (rank == 2))")
    check(job, 2, f"is in the script's own code since {TIME}, after STEP")
    check_stack(job, 2, f'train.py", line {line_of(job, "time.sleep(3.2)")} in <module>')
    assert job.process.wait(START_SECONDS) == 0, job.err
    lines, _ = reports(job, 2)
    assert len(lines) == 2, "the shorter pauses after it are not worth a word"


def test_slow_forward(run):
    """A long compilation, as it were."""
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


def test_interpreter_held(run):
    """C code that holds the interpreter's lock: no Python runs in that process, and the watch does."""
    job = start(run, "ctypes.PyDLL(None).usleep(3_500_000)", culprit=1, num_ranks=2)
    check(job, 1, f"is in the script's own code since {TIME}, after STEP", waiting="rank 0 waits in ")
    check_stack(job, 1, f'train.py", line {line_of(job, "usleep")} in <module>')
    assert job.process.wait(START_SECONDS) == 0, job.err


def test_lock_of_the_users(run):
    """One waits for a lock that another holds, which waits for it."""
    before = "lock = open('lock', 'w')\nif rank == 0:\n    fcntl.flock(lock, fcntl.LOCK_EX)\nstep(trainer)"
    job = start(run, "fcntl.flock(lock, fcntl.LOCK_EX)", culprit=1, num_ranks=2, before=before)
    check(job, 1, f"is in the script's own code since {TIME}, after STEP", waiting="rank 0 waits in ")
    check_stack(job, 1, f"line {line_of(job, '    fcntl.flock(lock, fcntl.LOCK_EX)')} in <module>")


def test_different_groups(run):
    """Nobody is missing, but two wait for each other in calls of different groups."""
    before = "from distributed_trainer import job\nother = job.start(None, None).create_group([0, 1])"
    job = start(run, "other.barrier().wait()", culprit=1, num_ranks=2, before=before)
    lines, seconds = reports(job, 2)
    assert seconds < REPORT_SECONDS + 0.5
    assert len(set(lines)) == 1
    assert re.fullmatch(
        r"all ranks wait, but not for the same: rank 0 waits in train_step, \S*train.py:\d+ "
        r"\(all_gather\(\d+ uint8\)\); rank 1 waits in barrier\(\)",
        lines[0],
    )


def test_set_up(run):
    """Some make a second trainer, which others do not."""
    job = start(run, "time.sleep(3)", after="second = create_distributed_trainer(nn.Linear(2, 2))")
    lines, _ = reports(job, 2)
    assert len(set(lines)) == 1
    assert re.search(
        rf"; ranks 0 and 1 wait in create_distributed_trainer, \S*train.py:{line_of(job, 'second =')} \(the set-up",
        lines[0],
    )
    assert job.process.wait(START_SECONDS) == 0, job.err


def test_other_calls(run):
    """Two leave the loop a batch early and go on with something else: an error at once that says where each is."""
    job = start(run, "trainer.summary()", after="trainer.load('checkpoints') if rank == 1 else step(trainer)")
    assert job.exit_code() != 0
    calls = ("return trainer.train_step", "trainer.load", "trainer.summary")
    step, load, summary = (rf"\S*train.py:{line_of(job, text)}" for text in calls)
    places = f"rank 0: train_step, {step}; rank 1: load, {load}; rank 2: summary, {summary}"
    assert re.search(rf"MismatchError: ranks disagree on collective .*\. The ranks' last calls: {places}\.", job.err)


def test_stopped_on_several_nodes(run):
    """A neighbour of the stopped rank tells the ranks of the other node."""
    job = start(run, "os.kill(os.getpid(), signal.SIGSTOP)", culprit=3, num_ranks=4, DTRAIN_RANKS_PER_NODE="2")
    waiting = "ranks 0, 1 and 2 wait in "
    check(job, 3, f"is stopped by a signal; it is in the script's own code since {TIME}, after STEP", waiting)


@pytest.mark.skipif(not is_openmpi(), reason="MPICH's mpiexec kills the others")
def test_killed_where_the_launcher_goes_on(run):
    """Those that wait for the dead rank end by themselves."""
    command = [mpirun_path(), "--enable-recovery", "-np", "3", sys.executable, "train.py"]
    job = start(run, "os.kill(os.getpid(), signal.SIGKILL)", command=command)
    lines, _ = reports(job, 4)
    assert len(set(lines)) == 2, "one that it is dead, one that they wait for it"
    assert job.process.wait(START_SECONDS) != 0
    assert re.search(r"DistributedTrainerError: .*rank 2 \(\S+, process \d+\) is dead: ", job.err)
    assert "stall_timeout_seconds" not in job.err
    assert not job.survivors()


def test_lone_on_its_node(run):
    """Nobody is there to tell; after the timeout each rank ends itself."""
    job = start(
        run, "os.kill(os.getpid(), signal.SIGSTOP)", culprit=1, num_ranks=2, timeout=1, DTRAIN_RANKS_PER_NODE="1"
    )
    lines, _ = reports(job, 1)
    assert re.match(r"rank 1 \(\S+, process \d+\) does not answer: ", lines[0])
    assert job.process.wait(START_SECONDS) != 0
    assert "The timeout for silent ranks is over (stall_timeout_seconds)" in job.err
    assert not job.survivors()


@pytest.mark.parametrize("seconds", [0, -1, "5", float("nan")])
def test_wrong_limits(run, seconds):
    for name in ("stall_report_seconds", "stall_timeout_seconds"):
        with pytest.raises(ValueError, match=f"{name} must be a number of seconds above 0, not {seconds!r}"):
            create_distributed_trainer(nn.Linear(1, 1), **{name: seconds})
