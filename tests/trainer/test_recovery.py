# SPDX-License-Identifier: Apache-2.0
"""Tests of `distributed-trainer run --elastic`: ranks are killed at all places of a training, and the others finish it.

The results are compared with those of one process without faults (elastic_training.py). A kill is written
STEP:RANK:PLACE; RANK is the number that the rank had at the start.
"""

import re
import subprocess
import sys
from pathlib import Path

import elastic_training as training
import forked
import pytest
import torch
from ranks import is_openmpi
from scripts import HEAD, NEW_PROCESS, START_SECONDS, TRAINER, shell_environment
from torch.utils.data import IterableDataset

from distributed_trainer import RankLostError
from distributed_trainer.data.loader import ShardedDataLoader
from distributed_trainer.data.position import DataPosition
from distributed_trainer.launch import mpirun
from distributed_trainer.launch.mpi_library import MPILibrary

if not is_openmpi():
    pytest.skip("needs Open MPI 5: MPICH ends the job when a rank is killed", allow_module_level=True)

SCRIPT = Path(training.__file__)
LONG = pytest.mark.long  # each launch takes 5 s


def start(folder, command, *words, **environment):
    """Run Python in a folder; return its exit code and errors."""
    result = subprocess.run(
        [sys.executable, *command, *map(str, words)],
        cwd=folder,
        env=shell_environment(TMPDIR=str(folder), **environment),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=2 * START_SECONDS,
    )
    return result.returncode, result.stderr


def launch(folder, num_ranks, *words, restarts=1, **environment):
    """Run `run --elastic` in a folder; return its exit code and errors."""
    command = ["-m", "distributed_trainer", "run", "--elastic", "--restarts", restarts, "-np", num_ranks]
    script = next(index for index, word in enumerate(words) if str(word).endswith(".py"))
    words = [*words[:script], *forked.client(), *words[script:]]
    return start(folder, map(str, command), *words, **environment)


def train(folder, num_ranks, kind, events, ranks_per_node=0):
    """Train on `num_ranks` ranks; return each survivor's results, by its first rank, and the errors."""
    code, err = launch(folder, num_ranks, SCRIPT, folder, kind, *events, DTRAIN_RANKS_PER_NODE=str(ranks_per_node))
    assert code == 0, err
    killed = {int(event.split(":")[1]) for event in events if "held" not in event}
    results = {int(file.stem): torch.load(file) for file in folder.glob("*.pt")}
    assert set(results) == set(range(num_ranks)) - killed, err
    assert "restart" not in err
    return results, err


def check_said(err, num_ranks, said, num_named):
    """Check that one line reports each recovery, and that a death that a neighbour has seen is reported once."""
    lines = []
    for killed, how in said:
        left = num_ranks - killed
        lines.append(f"{killed} of {num_ranks} ranks were killed: training continues with {left}, {how}.")
        num_ranks = left
    found = re.findall(r"^\d+ of \d+ ranks were killed.*$", err, re.MULTILINE)
    assert len(found) == len(lines), err
    for line, pattern in zip(found, lines, strict=True):
        assert re.fullmatch(pattern, line), err
    # A death is reported once; of two at once, the second may have ended before any rank has looked for it.
    named = re.findall(r"rank \d \(\S+, process (\d+)\) is dead: killed", err)
    assert min(num_named, 1) <= len(named) <= num_named, err
    assert len(set(named)) == len(named), err


def check_alike(result, kind):
    """Check that a survivor's losses, weights and buffers are those of one process."""
    losses, model, accuracy = training.plain(kind)
    is_rounded = "precision" in kind.options  # to float16, in parts of other sizes
    rtol = 1e-2 if is_rounded else 1e-4
    torch.testing.assert_close(torch.tensor(result["losses"]), torch.tensor(losses), rtol=rtol, atol=rtol / 10)
    state = model.state_dict()
    state["6.count"] *= kind.of_step.get("microbatches", 1) if kind.of_step != {"microbatches": "auto"} else 1
    torch.testing.assert_close(result["state"], state, rtol=rtol, atol=rtol / 10)
    assert result["accuracy"] == pytest.approx(accuracy)
    assert result["num_skipped_steps"] == (is_rounded or kind.options.get("nonfinite_gradients") == "skip")
    assert result["loss_scale"] == 2.0 ** (16 - is_rounded)


@pytest.mark.parametrize(
    ("kind", "num_ranks", "ranks_per_node", "events", "said", "num_named"),
    [
        pytest.param(
            *("whole", 4, 0, ["0:2:backward", "4:0:commit", "11:3:optimizer"]),
            *([(1, "repeating step 1"), (1, "(after step 5|repeating step 6)"), (1, "after step 12")], 3),
            id="whole",
        ),
        pytest.param(
            *("whole", 4, 2, ["2:0:sum", "2:1:sum", "12:2:summary"]),
            *([(2, "repeating step 3"), (1, "after step 12")], 1),
            id="whole-two-machines",
        ),
        pytest.param(
            *("batchnorm", 4, 0, ["3:0:forward", "3:2:forward", "4:1:commit"]),
            *([(2, "repeating step 4"), (1, "(after step 5|repeating step 6)")], 3),
            id="batchnorm",
        ),
        pytest.param(
            *("batchnorm", 3, 1, ["2:0:backward", "5:1:evaluate"]),
            *([(1, "repeating step 3"), (1, "after step 5")], 0),
            id="batchnorm-three-machines",
            marks=LONG,
        ),
        pytest.param(
            *("counted", 3, 0, ["2:1:criterion", "5:2:criterion"]),
            *([(1, "repeating step 3"), (1, "repeating step 6")], 2),
            id="counted",
            marks=LONG,
        ),
        pytest.param(
            *("loader", 4, 0, ["0:0:sum", "5:2:evaluate", "11:3:updated"]),
            *([(1, "repeating step 1"), (1, "after step 5"), (1, "after step 12")], 3),
            id="loader",
        ),
        pytest.param(
            *("worker", 3, 0, ["4:0:between", "6:2:backward"]),
            *([(1, "repeating step 5"), (1, "repeating step 7")], 2),
            id="worker",
            marks=LONG,
        ),
        pytest.param(
            *("microbatches", 3, 0, ["1:1:optimizer", "12:0:close"]),
            *([(1, "(after step 2|repeating step 3)"), (1, "after step 12")], 2),
            id="microbatches",
            marks=LONG,
        ),
        pytest.param(
            *("auto", 3, 0, ["1:1:forward", "3:2:sum"]),
            *([(1, "repeating step 2"), (1, "repeating step 4")], 2),
            id="auto",
            marks=LONG,
        ),
        # One survivor has passed the commit point, the other has not: in a step that raises, in one with buffers.
        pytest.param(
            *("whole", 3, 0, ["4:2:commit", "4:0:held"]),
            *([(1, "after step 5")], 1),
            id="one-has-passed-raising",
        ),
        pytest.param(
            *("batchnorm", 3, 0, ["2:2:commit", "2:1:held"]),
            *([(1, "(after step 3|repeating step 4)")], 1),
            id="one-has-passed-batchnorm",
        ),
        # Survivors have passed the commit point, and notice the death where step 2 compares the weights.
        pytest.param(
            *("whole", 3, 0, ["1:2:compare"]),
            *([(1, "after step 2")], 1),
            id="in-comparison",
        ),
        # A rank is killed between the steps of two optimizers, a survivor before both.
        pytest.param(
            *("two-optimizers", 4, 0, ["2:3:optimizer", "5:1:commit", "5:0:held"]),
            *([(1, "(after step 3|repeating step 4)"), (1, "after step 6")], 2),
            id="two-optimizers",
        ),
        # The step that they finish overflows, so each halves the loss scale; a later step is repeated with that scale.
        pytest.param(
            *("float16", 3, 0, ["4:2:commit", "4:0:held", "8:1:backward"]),
            *([(1, "after step 5"), (1, "repeating step 9")], 2),
            id="one-has-passed-float16",
        ),
        # One survivor has the result of evaluate and the other has not.
        pytest.param(
            *("loader", 3, 0, ["5:2:evaluated", "5:0:held-in-evaluate"]),
            *([(1, "after step 5")], 1),
            id="one-has-evaluated",
        ),
        # One survivor has passed the meeting at the end and the other has not.
        pytest.param(
            *("whole", 3, 0, ["12:2:passed-in-close", "12:0:held-in-close"]),
            *([(1, "after step 12")], 1),
            id="one-has-ended",
        ),
    ],
)
def test_killed(tmp_path, kind, num_ranks, ranks_per_node, events, said, num_named):
    results, err = train(tmp_path, num_ranks, kind, events, ranks_per_node)
    for result in results.values():
        check_alike(result, training.KINDS[kind])
        assert result["num_ranks"] == num_ranks - sum(killed for killed, _ in said)
        assert result["num_watched"] <= num_ranks + 1  # the others, and those that have started this rank
    check_said(err, num_ranks, said, num_named)


@pytest.mark.slow
def test_bits(tmp_path):
    """With reproducible= and dropout, the bits are those of one process."""
    events = ["0:3:forward", "4:0:commit", "8:1:backward"]
    results, err = train(tmp_path, 4, "reproducible", events)
    (tmp_path / "alone").mkdir()
    code, errors_alone = start(tmp_path, [], SCRIPT, tmp_path / "alone", "reproducible")
    assert code == 0, errors_alone
    alone, result = torch.load(tmp_path / "alone" / "0.pt"), results[2]
    assert result["losses"] == alone["losses"], err
    for name, value in alone["state"].items():
        assert torch.equal(result["state"][name], value), name


# Two of three ranks are killed at once; in the last epoch rank 0 waits for a new process before each step.
REPLACED = (
    NEW_PROCESS
    + """
from torch.utils.data import TensorDataset
model = nn.Sequential(nn.Dropout(0.2), model, nn.BatchNorm1d(2))
optimizer = [torch.optim.AdamW(model[1].parameters(), lr=0.01), torch.optim.Adam(model[2].parameters(), lr=0.01)]
scheduler = [torch.optim.lr_scheduler.StepLR(one, 5, 0.9) for one in optimizer]
dataset = TensorDataset(torch.randn(24, 3), torch.arange(24) % 2)
trainer = create_distributed_trainer(model, reproducible=3)
sys.stderr.write(f"is_main: {trainer.is_main}\\n")  # False where it waits to take a killed one's place
loader = trainer.loader(dataset, 6, shuffle=True)
trainer.resume("checkpoints", optimizer=optimizer, scheduler=scheduler)
losses = []
for epoch in trainer.epochs(3):
    for number, (x, y) in enumerate(loader):
        if trainer.world_size == 3 and trainer.rank < 2 and (epoch, number) == (0, 2):
            os.kill(os.getpid(), signal.SIGKILL)
        if 1 < trainer._session.first_world_size > trainer.world_size and epoch == 2:
            wait_for_process(trainer)
        losses.append(step(trainer, x, y, None, optimizer))
        for one in scheduler:
            one.step()
states = [one.state_dict() for one in [*optimizer, *scheduler]]
results = trainer.world_size, losses[-1], model.state_dict(), states
torch.save(results, f"{trainer.rank}.pt")
"""
)


@pytest.mark.parametrize("ranks_per_node", [0, pytest.param(1, marks=LONG)])
@pytest.mark.slow
def test_replaced(tmp_path, ranks_per_node):
    """New processes replace killed ones, and all ranks end with the bits of one process, without an error."""
    alone = tmp_path / "alone"
    alone.mkdir()
    for folder in (tmp_path, alone):
        (folder / "train.py").write_text(HEAD + REPLACED)
    code, err = launch(tmp_path, 3, "train.py", DTRAIN_RANKS_PER_NODE=str(ranks_per_node))
    assert code == 0, err
    assert err.count("2 of 3 ranks were killed: training continues with 1, repeating step 3.") == 1, err
    for num_ranks in (2, 3):
        line = rf"taken the place of a killed one: training continues with {num_ranks} ranks at step (9|10|11)\."
        assert len(re.findall(line, err)) == 1, err
    assert (err.count("is_main: True"), err.count("is_main: False")) == (1, 4), err
    assert "exiting\nimproperly" not in err
    code, errors_alone = start(alone, ["train.py"])
    assert code == 0, errors_alone
    _, *expected = torch.load(alone / "0.pt")
    for rank in range(3):
        num_ranks, *found = torch.load(tmp_path / f"{rank}.pt")
        assert num_ranks == 3
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.long
def test_log_dir(tmp_path):
    """The output of new processes goes to their own files."""
    (tmp_path / "train.py").write_text(HEAD + REPLACED + "print('end', trainer.rank, trainer.world_size)\n")
    code, err = launch(tmp_path, 3, "--log-dir", "logs", "train.py")
    assert code == 0, err
    ends = {file.name: re.findall("^end .*", file.read_text(), re.M) for file in (tmp_path / "logs").iterdir()}
    assert ends.pop("rank-0.log") == ends.pop("rank-1.log") == []
    assert ends.pop("rank-2.log") == ["end 0 3"]
    assert sorted(ends.values()) == [["end 1 3"], ["end 2 3"]]
    assert all(re.fullmatch(r"new-[0-9]+\.log", name) for name in ends)


# Rank 0 is killed just after it has started a process to replace another rank; the process then waits for rank 0.
ORPHANED = """
from torch.utils.data import TensorDataset
trainer = create_distributed_trainer(model)
loader = trainer.loader(TensorDataset(torch.randn(24, 3), torch.arange(24) % 2), 6)
trainer.resume("checkpoints", optimizer=the_optimizer)
for epoch in trainer.epochs(2):
    for x, y in loader:
        if (trainer.world_size, trainer.rank) == (3, 1):
            os.kill(os.getpid(), signal.SIGKILL)
        step(trainer, x, y)
        if (trainer.world_size, trainer.rank) == (2, 0):
            os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.long
def test_orphaned(tmp_path):
    """The waiting process ends after 5 s, or by a crash in Open MPI, and so does the job."""
    (tmp_path / "train.py").write_text(HEAD + ORPHANED)
    code, err = launch(tmp_path, 3, "train.py")
    assert code == 0, err
    assert "1 of 2 ranks were killed: training continues with 1" in err


# Each attempt prints when it ends; a rank is killed in the first attempt only.
ATTEMPTS = """
import gc
is_first = not os.path.exists("ended")
def end():
    print("end", flush=True)
    open("ended", "w").close()
def kill_one(trainer):
    trainer.summary()
    open("ended", "w").close()
    trainer.summary()
    if is_first and trainer.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
"""

OBSTACLES = """
from distributed_trainer import PowerSGD
for options in ({"shard": "optimizer"}, {"compression": PowerSGD(rank=1)}, {"split_batches": False}):
    trainer = create_distributed_trainer(model, **options)
    trainer.close()
    rank = trainer.rank
    del trainer
    gc.collect()
store = torch.distributed.FileStore(f"store-{is_first}", 2)
torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
trainer = create_distributed_trainer(model, group=torch.distributed.group.WORLD)
del trainer
gc.collect()
trainer, other = create_distributed_trainer(model), create_distributed_trainer(nn.Linear(3, 2))
kill_one(trainer)
step(trainer)
"""
REASONS = (
    'with shard="optimizer" a killed rank\'s part of the state is lost',
    "with PowerSGD the gradients that a killed rank has kept back are lost",
    "with split_batches=False a killed rank's samples are lost",
    "the trainer uses a process group that the script has made",
    "the script has several trainers",
)


@pytest.mark.slow
def test_obstacles(tmp_path):
    """Obstacles are reported at the start. A kill then ends the job, which is started again."""
    (tmp_path / "train.py").write_text(HEAD + ATTEMPTS + OBSTACLES)
    code, err = launch(tmp_path, 2, "train.py")
    assert code == 0, err
    assert err.count("; restart 1 of 1") == 1, err
    for reason in REASONS:
        line = f"--elastic: a killed rank ends the job, which may then be started again, since {reason}."
        assert err.count(line) == 2, err  # by rank 0 of each attempt
    assert "ranks were killed" not in err


CHANGED_BATCH = """
from torch.utils.data import TensorDataset
trainer = create_distributed_trainer(model)
loader = trainer.loader(TensorDataset(torch.randn(8, 3), torch.arange(8) % 2), 4)
for x, y in loader:
    kill_one(trainer)
    step(trainer, 2 * x, y)
"""


@pytest.mark.slow
def test_changed_batch(tmp_path):
    """A batch that the script has changed cannot be read again, so the job is started again."""
    (tmp_path / "train.py").write_text(HEAD + ATTEMPTS + CHANGED_BATCH)
    code, err = launch(tmp_path, 3, "train.py")
    assert code == 0, err
    assert re.search(
        r"RankLostError: ranks were killed, and their part of the batch cannot be read again: the tensors passed to "
        r"train_step are not the same objects that trainer.loader returned. Change samples in the dataset, in "
        r"collate_fn or in the model; or let the job be started again \(--restarts\)",
        err,
    ), err
    assert err.count("; restart 1 of 1") == 1, err


def test_iterable_dataset():
    """A batch of an iterable dataset cannot be read again."""

    class Samples(IterableDataset):
        def __iter__(self):
            return ((torch.ones(3), number) for number in range(8))

    positions = DataPosition()
    positions.add(loader := ShardedDataLoader(Samples(), 4, lambda: lambda num_samples: (0, num_samples), seed=0))
    batch = next(iter(loader))
    with pytest.raises(RankLostError, match="an iterable dataset gives each sample once"):
        positions.read_again(*batch)


def test_exception(tmp_path):
    """If a rank raises, the others do not continue without it, and the job is not started again."""
    (tmp_path / "train.py").write_text(HEAD + TRAINER + "if rank == 1:\n    1 / 0\nstep(trainer)\nstep(trainer)\n")
    code, err = launch(tmp_path, 3, "train.py")
    assert code == 1, err
    assert err.count("ZeroDivisionError") == 1, err
    assert "ranks were killed" not in err
    assert "; restart" not in err


def test_without_fault_tolerance(run):
    """With an mpirun that was started without fault tolerance, a line gives the reason."""
    job = run("trainer = create_distributed_trainer(model)\nstep(trainer)\n", DTRAIN_ELASTIC="1")
    assert job.process.wait(START_SECONDS) == 0
    reason = "it needs Open MPI 5, started with `--with-ft ulfm`"
    assert f"--elastic: a killed rank ends the job, which may then be started again, since {reason}." in job.err


def test_mpich_has_it_not():
    assert mpirun.elastic_settings(MPILibrary("libmpi.so.12", "mpich")) == ([], {"DTRAIN_ELASTIC": "1"})
