# SPDX-License-Identifier: Apache-2.0
"""trainer.profile: a timeline of all ranks in one file, which follows the rules of its format and is correct."""

import json
import socket
import time
from collections import defaultdict

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import mixed, on_ranks
from small_models import F64, Net, batch
from torch import nn

from distributed_trainer import PowerSGD, create_distributed_trainer
from distributed_trainer.gradients import layout
from distributed_trainer.metrics.clock_sync import ClockReadings
from distributed_trainer.metrics.profiler import Recorder, Track, timeline
from distributed_trainer.metrics.step_clock import PHASES

DELAY = 0.05
NAMES = [name for name, _ in Net(F64).named_parameters()]


class Slice:
    def __init__(self, event):
        self.name, self.arguments = event["name"], event["args"]
        self.begin, self.end = event["ts"], event["ts"] + event["dur"]

    @property
    def seconds(self):
        return (self.end - self.begin) / 1e6

    def holds(self, other):
        return self.begin <= other.begin and other.end <= self.end


class Rank:
    """Contents of the file for one rank."""

    def __init__(self, name, rows):
        self.name = name
        self.rows = rows

    def slices(self, name, row="steps"):
        return [one for one in self.rows[row] if one.name == name]

    @property
    def lives(self):
        """Return for each bucket in each step its slices by name."""
        found = []
        for row in sorted(self.rows):
            for one in self.rows[row]:
                if row != "steps" and one.name == row:
                    found.append({"whole": one})
                elif row != "steps":
                    found[-1][one.name] = one
        return found


def read(path):
    """Return all ranks of a file, after a check that each event has the form that viewers require."""
    data = json.loads(path.read_text())
    names, rows = {}, defaultdict(lambda: defaultdict(list))
    process_of_thread = {}
    for event in data["traceEvents"]:
        assert event["pid"] > 0  # Perfetto uses 0 for a process and a thread of its own
        if event["ph"] == "M":
            assert set(event) <= {"name", "ph", "pid", "tid", "args"}
            if event["name"].endswith("_name"):
                names[event["pid"], event.get("tid")] = event["args"]["name"]
            continue
        assert set(event) == {"name", "ph", "ts", "dur", "pid", "tid", "args"}
        assert event["ph"] == "X"
        assert all(isinstance(event[key], int) and event[key] >= 0 for key in ("ts", "dur"))
        assert process_of_thread.setdefault(event["tid"], event["pid"]) == event["pid"]
        rows[event["pid"]][names[event["pid"], event["tid"]]].append(Slice(event))
    for process in rows.values():
        for row in process.values():
            check_nesting(row)
    return [Rank(names[process, None], rows[process]) for process in sorted(rows)]


def check_nesting(row):
    """Check that slices are ordered by begin, outer ones before inner ones, and that none crosses another's end."""
    outer = []
    for before, one in zip([None, *row], row, strict=False):
        assert before is None or (before.begin, -before.end) <= (one.begin, -one.end)
        while outer and outer[-1].end <= one.begin:
            outer.pop()
        assert not outer or one.end <= outer[-1].end, (outer[-1].name, one.name)
        outer.append(one)


def check_life(life, phases):
    stages = [life[name] for name in ("fill", "hold", "reduce") if name in life]  # one gradient takes no time
    assert [one.end for one in stages[:-1]] == [one.begin for one in stages[1:]]
    whole, reduce = life["whole"], life["reduce"]
    assert (whole.begin, whole.end) == (stages[0].begin, reduce.end)
    assert ("fill" in life) == (len(whole.arguments["parameters"]) > 1)
    assert "wait" not in life or (reduce.holds(life["wait"]) and reduce.end == life["wait"].end)
    assert any(phase.holds(whole) for phase in phases), "not within a step"


def make(monkeypatch, model=None, bucket_bytes=1, **options):
    """Make a trainer, by default with a bucket for each parameter, and an optimizer."""
    monkeypatch.setattr(layout, "BUCKET_BYTES", bucket_bytes)
    model = model or Net(F64)
    trainer = create_distributed_trainer(model, **options)
    return trainer, torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.mark.parametrize(("bucket_bytes", "num_buckets"), [(1, 4), (1000, 1)])
@mixed
def test_file(world, shared_folder, monkeypatch, bucket_bytes, num_buckets):
    """The file has all ranks, phases and buckets of the steps inside the context, and no others."""
    trainer, optimizer = make(monkeypatch, bucket_bytes=bucket_bytes)
    path = shared_folder / "trace.json"
    trainer.train_step(*batch(12, F64), nn.CrossEntropyLoss(), optimizer)
    with trainer.profile(str(path)):
        for step in range(3):
            trainer.train_step(*batch(12, F64, step), nn.CrossEntropyLoss(), optimizer)
    size = path.stat().st_size
    trainer.train_step(*batch(12, F64), nn.CrossEntropyLoss(), optimizer)
    trainer.close()
    assert path.stat().st_size == size
    ranks = read(path)
    assert [rank.name for rank in ranks] == [f"rank {rank} on {socket.gethostname()}" for rank in range(world.size)]
    for rank in ranks:
        steps = [one for one in rank.rows["steps"] if one.name.startswith("step")]
        assert [one.name for one in steps] == ["step 2", "step 3", "step 4"]
        for phase in PHASES:
            assert len(rank.slices(phase)) == 3
            assert all(step.holds(one) for step, one in zip(steps, rank.slices(phase), strict=True)), phase
        ends = [one.end for one in rank.rows["steps"] if one.name in PHASES][:-1]
        begins = [one.begin for one in rank.rows["steps"] if one.name in PHASES][1:]
        assert ends == begins, "each phase begins where the last ended"
        if world.size == 1:
            assert set(rank.rows) == {"steps"}
            continue
        assert all(one.holds(other) for one, other in zip(rank.slices("exchange"), rank.slices("wait"), strict=True))
        assert set(rank.rows) == {"steps", *(f"bucket {number:02}" for number in range(num_buckets))}
        assert len(rank.lives) == 3 * num_buckets
        for life in rank.lives:
            check_life(life, steps)
            assert any(one.begin <= life["whole"].begin < one.end for one in rank.slices("backward"))
        for step, wait in zip(steps, rank.slices("wait"), strict=True):
            ends = [life["reduce"].end for life in rank.lives if step.holds(life["whole"])]
            assert ends == sorted(ends)  # in the order of the buckets
            assert ends[-1] < wait.end  # the wait lasts until the sum of the losses is there
        contents = [rank.slices(row, row)[0].arguments for row in sorted(rank.rows) if row != "steps"]
        assert sorted(name for content in contents for name in content["parameters"]) == sorted(NAMES)
        sizes = {name: parameter.nbytes for name, parameter in Net(F64).named_parameters()}
        assert all(content["bytes"] == sum(sizes[name] for name in content["parameters"]) for content in contents)


class Sleeps(nn.Module):
    """Two layers; backward sleeps after the last layer has its gradient."""

    is_slow = False

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(32, 8, dtype=F64), nn.Linear(8, 4, dtype=F64)

    def forward(self, x):
        hidden = self.first(x.flatten(1))
        if self.is_slow and hidden.requires_grad:
            hidden.register_hook(lambda gradient: time.sleep(DELAY))
        return self.last(hidden)


@on_ranks(2, 3, (3, 2))
def test_waiting(world, shared_folder, monkeypatch):
    """If a rank sleeps in backward, its buckets fill late, and the other ranks wait that long for them."""
    model = Sleeps()
    model.is_slow = world.rank == world.size - 1
    trainer, optimizer = make(monkeypatch, model)
    path = shared_folder / "trace.json"
    for _ in range(2):
        trainer.train_step(*batch(12, F64), nn.CrossEntropyLoss(), optimizer)
    with trainer.profile(path):
        trainer.train_step(*batch(12, F64), nn.CrossEntropyLoss(), optimizer)
    trainer.close()
    *others, slow = read(path)
    (backward,) = slow.slices("backward")
    assert backward.seconds > DELAY
    last = [life for life in slow.lives if life["whole"].arguments["parameters"][0].startswith("first.")]
    assert len(last) == 2
    for life in last:
        assert life["whole"].begin >= backward.begin + 1e6 * DELAY
    for rank in others:
        (wait,) = rank.slices("wait")
        assert rank.slices("exchange")[0].holds(wait)
        assert wait.seconds > 0.6 * DELAY  # on a busy machine the waiting rank may be late, too
        assert len([life for life in rank.lives if "wait" in life and life["wait"].seconds > 0.6 * DELAY]) >= 2
        for life, of_slow in zip(rank.lives, slow.lives, strict=True):  # no rank has a sum before all have begun it
            assert life["reduce"].end >= of_slow["reduce"].begin
    assert slow.slices("wait")[0].seconds < min(rank.slices("wait")[0].seconds for rank in others)


@on_ranks(1, 2, (3, 2))
def test_microbatches(world, shared_folder, monkeypatch):
    """Each microbatch has its forward and backward; buckets are filled in the last microbatch."""
    trainer, optimizer = make(monkeypatch)
    with trainer.profile(shared_folder / "trace.json"):
        for _ in range(2):  # buckets are made at the end of the first step
            trainer.train_step(*batch(12, F64), nn.CrossEntropyLoss(), optimizer, microbatches=3)
    trainer.close()
    for rank in read(shared_folder / "trace.json"):
        assert [len(rank.slices(phase)) for phase in PHASES] == [2, 2, 6, 6, 2, 2]
        assert len(rank.lives) == (0 if world.size == 1 else 8)
        for life in rank.lives:
            check_life(life, rank.slices("step 1") + rank.slices("step 2"))
            last = max(one.begin for one in rank.slices("backward") if one.begin <= life["whole"].begin)
            assert last in [one.begin for one in rank.slices("backward")[2::3]]


@on_ranks(1, 2, (3, 2))
def test_own_loop(world, shared_folder, monkeypatch):
    trainer, optimizer = make(monkeypatch)
    x, y = trainer.split(batch(12, F64))
    with trainer.profile(shared_folder / "trace.json"):
        for _ in range(2):
            with trainer.forward():
                loss = nn.CrossEntropyLoss()(trainer.model(x), y)
            with trainer.no_sync():
                trainer.backward(loss, weight=len(y))
            with trainer.forward():
                loss = nn.CrossEntropyLoss()(trainer.model(x), y)
            trainer.backward(loss, weight=len(y))
            trainer.step(optimizer)
    trainer.close()
    for rank in read(shared_folder / "trace.json"):
        assert [len(rank.slices(phase)) for phase in PHASES] == [0, 4, 4, 4, 2, 2]
        assert len(rank.lives) == (0 if world.size == 1 else 8)
        for life in rank.lives:
            last = max(one.begin for one in rank.slices("backward") if one.begin <= life["whole"].begin)
            assert last in [one.begin for one in rank.slices("backward")[1::2]]


@pytest.mark.parametrize(
    "options",
    [{"shard": "optimizer"}, {"compression": PowerSGD(rank=1)}, {"nonfinite_gradients": "skip"}, {"reproducible": 4}],
    ids=lambda options: next(iter(options)),
)
@on_ranks(1, 3, (3, 2))
def test_options(world, shared_folder, monkeypatch, options):
    trainer, optimizer = make(monkeypatch, Sleeps(), **options)
    with trainer.profile(shared_folder / "trace.json"):
        for _ in range(2):
            trainer.train_step(*batch(12, F64), nn.CrossEntropyLoss(), optimizer)
    trainer.close()
    for rank in read(shared_folder / "trace.json"):
        assert all(rank.slices(phase) for phase in PHASES)
        assert len(rank.lives) == (0 if world.size == 1 or "reproducible" in options else 8)
        for life in rank.lives:
            check_life(life, rank.slices("step 1") + rank.slices("step 2"))


@on_ranks(2)
def test_gloo(world, shared_folder, monkeypatch):
    """Since gloo does not report when a bucket was reduced, the end of the wait is shown instead."""
    store = dist.FileStore(str(shared_folder / "store"), world.size)
    dist.init_process_group("gloo", store=store, rank=world.rank, world_size=world.size)
    try:
        trainer, optimizer = make(monkeypatch, group=dist.group.WORLD)
        with trainer.profile(shared_folder / "trace.json"):
            for _ in range(2):
                trainer.train_step(*batch(12, F64), nn.CrossEntropyLoss(), optimizer)
        trainer.close()
    finally:
        dist.destroy_process_group()
    for rank in read(shared_folder / "trace.json"):
        assert len(rank.lives) == 8
        for life in rank.lives:
            check_life(life, rank.slices("step 1") + rank.slices("step 2"))
            assert life["whole"].end in [one.end for one in rank.slices("wait")]


@on_ranks(1, 2, (3, 2))
def test_errors(world, shared_folder, monkeypatch):
    """Every rank raises the same error, and the trainer stays usable."""
    trainer, optimizer = make(monkeypatch)
    path = shared_folder / "trace.json"

    def step():
        return trainer.train_step(*batch(12, F64), nn.CrossEntropyLoss(), optimizer)

    def message(kind, where, work):
        with pytest.raises(kind) as caught:
            with trainer.profile(where):
                work()
        assert len(set(world.gather(str(caught.value)))) == 1
        return str(caught.value)

    missing = shared_folder / "missing" / "trace.json"
    text = message(FileNotFoundError, missing, lambda: pytest.fail("the block has begun"))
    assert "rank 0 on" in text
    assert str(missing) in text
    message(IsADirectoryError, shared_folder, step)
    message(TypeError, 3, step)
    assert "no step" in message(ValueError, path, lambda: None)
    assert not path.exists()
    world.comm.Barrier()  # rank 0 makes the file next
    with trainer.profile(path):
        assert "inside of" in message(ValueError, path, lambda: pytest.fail("the inner block has begun"))
        step()
    assert all(len(rank.slices("step 1")) == 1 for rank in read(path))

    def removes_the_folder():
        step()
        if world.rank == 0:
            missing.parent.rmdir()

    if world.rank == 0:
        missing.parent.mkdir()
    message(FileNotFoundError, missing, removes_the_folder)

    def fails():
        step()
        raise KeyError("the user's")

    another = shared_folder / "another.json"
    message(KeyError, another, fails)
    assert not another.exists()
    before = path.read_text()
    message(KeyError, path, fails)
    assert path.read_text() == before
    world.gather(None)
    with trainer.profile(path):
        step()
    assert path.read_text() != before
    trainer.close()
    with pytest.raises(ValueError, match="this trainer was closed"):
        trainer.profile(path)


@on_ranks(2)
def test_step_that_fails(world, shared_folder, monkeypatch):
    """Phases that a failed step has begun are no part of the next step."""
    trainer, optimizer = make(monkeypatch, nonfinite_gradients="raise")
    x, y = batch(12, F64)
    with trainer.profile(shared_folder / "trace.json"):
        for inputs in (x, torch.full_like(x, torch.nan), x):
            try:
                trainer.train_step(inputs, y, nn.CrossEntropyLoss(), optimizer)
            except FloatingPointError:
                pass
    trainer.close()
    for rank in read(shared_folder / "trace.json"):
        assert [one.name for one in rank.rows["steps"] if one.name.startswith("step")] == ["step 1", "step 2"]
        assert len(rank.lives) == 12


def test_backward_that_fails():
    """Buckets that a failed backward has started are no part of the next step."""
    recorder = Recorder(begin=0)
    recorder.bucket_started(0, ["a"], 8)
    for number, name in enumerate("ab"):
        recorder.gradient_ready(name)
        recorder.bucket_started(number, [name], 8)
    recorder.wait_began()
    recorder.wait_ended([None, None])
    assert [life.number for life in recorder.lives] == [0, 1]
    assert all(life.first_ready <= life.started <= life.waited <= life.done for life in recorder.lives)


@on_ranks(1, 2)
def test_time_before_is_left_out(world, shared_folder, monkeypatch):
    """The first phase "data" begins with the context, not at the end of the step before it."""
    trainer, optimizer = make(monkeypatch)
    trainer.train_step(*batch(12, F64), nn.CrossEntropyLoss(), optimizer)
    time.sleep(10 * DELAY)
    with trainer.profile(shared_folder / "trace.json"):
        time.sleep(DELAY)
        trainer.train_step(*batch(12, F64), nn.CrossEntropyLoss(), optimizer)
        time.sleep(DELAY)
    trainer.close()
    for rank in read(shared_folder / "trace.json"):
        assert DELAY <= rank.slices("data")[0].seconds + 1e-6 < 9 * DELAY
        assert max(one.end for one in rank.rows["steps"]) == rank.slices("step 2")[0].end


@on_ranks(1)
def test_two_hosts(world, tmp_path):
    """If clocks differ, ranks' names show the uncertainty, and simultaneous events are shown at the same time."""

    def track(host, ahead, came, left):
        meetings = [[(at + ahead + came, at + ahead + left)] for at in (0, 10**9)]
        begin = ahead + 5 * 10**8
        return Track(host, ClockReadings(host, (meetings[0], meetings[1])), [("step 1", begin, begin + 10_000_000)], [])

    tracks = [
        *(track("near", 0, -40_000, 30_000), track("near", 0, -10_000, 50_000)),
        *(track("far", 10**15, -30_000, 30_000), track("far", 10**15, -10_000, 70_000)),
    ]
    path = tmp_path / "trace.json"
    path.write_text(json.dumps(timeline(tracks)))
    ranks = read(path)
    assert [rank.name for rank in ranks] == [
        *("rank 0 on near", "rank 1 on near"),
        *("rank 2 on far (clock within 40 us)", "rank 3 on far (clock within 40 us)"),
    ]
    begins = [rank.slices("step 1")[0].begin for rank in ranks]
    assert np.ptp(begins) <= 1
    assert all(rank.slices("step 1")[0].seconds == pytest.approx(0.01) for rank in ranks)
