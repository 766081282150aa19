# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: a run that continues from a checkpoint equals a run that was never interrupted."""

import contextlib
import gc
import itertools
import json
import pickle
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed as dist
import torch_groups
from internals import write_in_progress
from ranks import on_ranks
from torch import nn
from torch.utils.data import TensorDataset

from distributed_trainer import CheckpointError, MismatchError, create_distributed_trainer
from distributed_trainer.checkpoint import format

some = on_ranks(1, 2, 3)
two = on_ranks(2)
ADAM = torch.optim.Adam


class Net(nn.Module):
    """Model with dropout, BatchNorm, a counter in a buffer, and a weight that is not contiguous."""

    def __init__(self, width=5):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, bias=False).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(3)
        self.drop = nn.Dropout(0.3)
        self.linear = nn.Linear(12, width)
        self.last = nn.Linear(width, 3)
        self.register_buffer("num_calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        if self.training:
            self.num_calls += 1
        return self.last(torch.tanh(self.linear(self.drop(self.norm(self.conv(x))).flatten(1))))


class Run:
    """Training of 3 epochs of 4 batches, which can stop and continue."""

    def __init__(self, make_optimizer=ADAM, width=5, **options):
        torch.manual_seed(3)
        np.random.seed(3)
        random.seed(3)
        self.model = Net(width)
        self.trainer = create_distributed_trainer(self.model, **options)
        self.optimizer = make_optimizer(self.model.parameters(), lr=0.02)
        self.scheduler = torch.optim.lr_scheduler.MultiStepLR(self.optimizer, [1, 2], gamma=0.5)
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(26, 2, 4, 4, generator=generator)
        y = torch.arange(26) % 3
        self.loader = self.trainer.loader(TensorDataset(x, y), 7, shuffle=True)
        self.other_loader = self.trainer.loader(TensorDataset(x[:5], y[:5]), 2)
        self.objects = {"optimizer": self.optimizer, "scheduler": self.scheduler}
        self.losses = []

    def train(self, before=lambda step: None, after=lambda step: None, num_steps=100):
        """Train; call `before` before each step, when its batch is read, and `after` after each step."""
        for _ in self.trainer.epochs(3):
            for inputs, targets in self.loader:
                if len(self.losses) == num_steps:
                    return
                before(len(self.losses))
                inputs = inputs + 0.1 * torch.rand(()) + 0.1 * random.random() + 0.1 * np.random.rand()
                self.losses.append(self.trainer.train_step(inputs, targets, nn.CrossEntropyLoss(), self.optimizer))
                after(len(self.losses))
            for _ in range(2):  # this loader has more epochs than the training
                self.trainer.evaluate(self.other_loader, nn.CrossEntropyLoss())
            self.scheduler.step()

    def end(self):
        """Close the trainer, and return the final state of the run, including random numbers."""
        state = [
            *(tensor.clone() for tensor in self.model.state_dict().values()),
            *(v.clone() for s in self.optimizer.state_dict()["state"].values() for v in s.values()),
            torch.tensor(self.optimizer.param_groups[0]["lr"]),
        ]
        self.trainer.close()
        return [*state, torch.rand(3), torch.tensor(random.random()), torch.tensor(np.random.rand())]


def assert_same(actual, expected):
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other), (one, other)


def uninterrupted(**options):
    run = Run(**options)
    run.train()
    return run.losses, run.end()


def on_the_rest(folder, **options):
    """Return the results of a new run that continues from a checkpoint."""
    run = Run(**options)
    step = run.trainer.load(folder, **run.objects)
    run.train()
    return step, run.losses, run.end()


# Each case has options and the step of the save: before the first, inside an epoch, between two, at the end.
CASES = [
    *[({}, when) for when in (0, 3, 4, 12)],
    *[({"shard": "optimizer"}, when) for when in (3, 12)],
    ({"reproducible": 3}, 5),
    ({"split_batches": False}, 4),
    ({"group": "gloo"}, 4),
]


@contextlib.contextmanager
def as_arguments(options, world, folder):
    """Yield the options of a case, with a process group that lasts as long as the context."""
    if "group" not in options:
        yield options
        return
    torch_groups.start(options["group"], world, folder)
    try:
        yield {"group": dist.group.WORLD}
    finally:
        dist.destroy_process_group()
        gc.collect()  # else a forked child (DataLoader worker) would wait for the group's threads


def with_save(folder, when, asks, **options):
    """Return the final state of a run in which some ranks ask for a save after some step."""
    run = Run(**options)

    def ask(step):
        if step == when and asks:
            run.trainer.save(folder, **run.objects)

    ask(0)
    run.train(after=ask)
    return run.end()


@pytest.mark.parametrize(("options", "when"), CASES, ids=str)
@some
def test_same_bits(world, shared_folder, options, when):
    """One rank asks for a save and the others join it; a run that continues from it has the same bits at its end."""
    folder = shared_folder / "checkpoints"
    with as_arguments(options, world, shared_folder) as arguments:
        losses, expected = uninterrupted(**arguments)
        assert len(losses) == 12
        assert_same(with_save(folder, when, world.rank == world.size - 1, **arguments), expected)
        assert [path.name for path in folder.iterdir()] == [f"step-{when:08}"]
        step, later_losses, state = on_the_rest(folder, **arguments)
    assert step == when
    assert_same(later_losses, losses[when:])
    assert_same(state, expected)


def saved_after(folder, num_steps, **options):
    """Run some steps, save, and return the closed run."""
    run = Run(**options)
    run.train(num_steps=num_steps)
    run.trainer.save(folder, **run.objects)
    run.trainer.close()
    return run


@on_ranks(3)
def test_other_number_of_ranks(world, shared_folder):
    """Save on 3 ranks and continue on 2 ranks and on the third alone; with reproducible= the bits are the same."""
    for kind, options in {"reproducible": {"reproducible": 3}, "sharded": {"shard": "optimizer"}}.items():
        losses, expected = uninterrupted(**options)
        saved_after(shared_folder / kind, 6, **options)
        comm = world.comm.Split(world.rank == 2)
        _, later_losses, state = on_the_rest(shared_folder / kind, group=comm, **options)
        if kind == "reproducible":
            assert_same(later_losses, losses[6:])
            assert_same(state, expected)
        else:  # dropout and the order of sums differ, so only the loaded state is the same
            run = Run(group=comm, **options)
            run.trainer.load(shared_folder / kind, **run.objects)
            own, of_three = Run(**options), run.optimizer.state_dict()
            own.trainer.load(shared_folder / kind, **own.objects)
            assert_same(list(run.model.state_dict().values()), list(own.model.state_dict().values()))
            for one, other in zip(
                of_three["state"].values(), own.optimizer.state_dict()["state"].values(), strict=True
            ):
                assert_same(list(one.values()), list(other.values()))
            run.trainer.close()
            own.trainer.close()


@two
def test_own_loop(world, shared_folder):
    """`backward` joins a save that another rank asked for; the optimizer steps by itself; a scaler is saved too."""

    def train(folder=None, save_after=None):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.2), nn.Linear(4, 2))
        trainer = create_distributed_trainer(model)
        optimizer = ADAM(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=2)
        generator = torch.Generator().manual_seed(0)
        data = TensorDataset(torch.randn(22, 3, generator=generator), torch.arange(22) % 2)
        loader = trainer.loader(data, 4, shuffle=True)
        objects = {"optimizer": optimizer, "scaler": scaler}
        num_steps = trainer.load(folder, **objects) if folder else 0
        for _ in trainer.epochs(2):
            for inputs, targets in loader:
                with trainer.forward():
                    loss = nn.functional.cross_entropy(model(inputs), targets, reduction="sum")
                optimizer.zero_grad()
                trainer.backward(scaler.scale(loss), weight=None)
                scaler.step(optimizer)
                scaler.update()
                num_steps += 1
                if num_steps == save_after and world.rank == world.size - 1:
                    trainer.save(shared_folder, **objects)
        trainer.close()
        return [*model.state_dict().values(), torch.tensor(scaler.get_scale()), torch.rand(2)]

    expected = train(save_after=7)
    assert [path.name for path in shared_folder.iterdir()] == ["step-00000007"]
    assert_same(train(shared_folder), expected)


@some
def test_left_in_mid_epoch(world, shared_folder):
    """A run that left its loop after a step, and saved at its end, continues with the next batch."""

    def train(num_batches):
        torch.manual_seed(0)
        trainer = create_distributed_trainer(model := nn.Linear(1, 1))
        seen = read(trainer, model, num_batches)
        gc.collect()  # the loader is gone
        trainer.close()
        return seen

    def read(trainer, model, num_batches):
        loader = trainer.loader(TensorDataset(torch.arange(12.0)[:, None], torch.zeros(12, 1)), 3)
        optimizer = ADAM(model.parameters(), lr=0.1)
        trainer.resume(shared_folder, optimizer=optimizer)
        seen = []
        for _, (x, y) in zip(range(num_batches), loader, strict=False):
            trainer.train_step(x, y, nn.MSELoss(), optimizer)
            seen.append(world.gather(x.flatten().tolist()))
        trainer.save(shared_folder, optimizer=optimizer)
        return [list(itertools.chain(*parts)) for parts in seen]

    assert train(2) == [[0, 1, 2], [3, 4, 5]]
    assert train(1) == [[6, 7, 8]]


@two
def test_which_are_kept(world, shared_folder):
    """The newest k checkpoints are kept, whatever their steps; files that trainer.save did not write stay."""
    (shared_folder / "step-00000000-mine").mkdir(exist_ok=True)
    (shared_folder / ".step-00000002.0a.part").mkdir(exist_ok=True)  # left by a run that was killed
    run = Run()
    run.train(after=lambda step: run.trainer.save(shared_folder, keep=2, **run.objects), num_steps=3)
    run.trainer.close()
    run = Run()
    assert run.trainer.load(shared_folder / "step-00000002", **run.objects) == 2
    run.trainer.save(shared_folder, keep=2, **run.objects)  # a second checkpoint of the same step
    run.trainer.close()
    names = {"step-00000000-mine", "step-00000003", "step-00000002-2"}
    assert {path.name for path in shared_folder.iterdir()} == names
    run = Run()
    assert run.trainer.resume(shared_folder, **run.objects) == 2
    run.trainer.close()


def error_of(world, call, kind):
    """Return the text of the error, which is the same on every rank."""
    with pytest.raises(kind) as caught:
        call()
    (text,) = set(world.gather(str(caught.value).partition(" The ranks' last calls")[0]))
    return text


@two
def test_refused_when_loaded(world, shared_folder):
    saved_after(shared_folder, 2)
    run = Run()
    before = [tensor.clone() for tensor in run.model.state_dict().values()]
    load, objects = run.trainer.load, run.objects
    text = error_of(world, lambda: load(shared_folder, optimizer=run.optimizer), ValueError)
    assert re.search(r"holds the model and optimizer, scheduler, but the model and optimizer are to be loaded", text)
    sgd = torch.optim.SGD(run.model.parameters(), lr=0.1)
    text = error_of(world, lambda: load(shared_folder, **{**objects, "optimizer": sgd}), ValueError)
    assert re.search("optimizer is a Adam in .*, but a SGD is to be loaded", text)
    assert_same(list(run.model.state_dict().values()), before)
    run.trainer.close()
    run = Run(width=6)
    text = error_of(world, lambda: run.trainer.load(shared_folder, **run.objects), ValueError)
    assert "of another model: it has linear.weight F32 [5, 12], this model has linear.weight F32 [6, 12]." in text
    with pytest.raises(TypeError, match="optimizer must have state_dict and load_state_dict"):
        run.trainer.save(shared_folder, optimizer=3)
    with pytest.raises(ValueError, match="keep must be an int of at least 1"):
        run.trainer.save(shared_folder, keep=0)
    run.trainer.close()


@two
def test_damaged(world, shared_folder):
    """Each file is cut, changed or removed: the error names it on every rank; `resume` loads the checkpoint before."""
    saved_after(shared_folder, 2)
    (path,) = shared_folder.glob("step-*")
    files = sorted(path.iterdir())
    of_ranks = [f"rank-{rank:05}{suffix}" for rank in range(world.size) for suffix in ("-1.safetensors", ".json")]
    assert [file.name for file in files] == ["checkpoint.json", *of_ranks]
    saved_after(shared_folder, 3)
    (newer,) = shared_folder.glob("step-00000003")
    run = Run()
    for file in sorted(newer.iterdir()):
        contents = file.read_bytes()
        middle = len(contents) // 2
        damages = [None, contents[:-7], b"", contents[:middle] + bytes([contents[middle] ^ 1]) + contents[middle + 1 :]]
        for damage in damages:
            world.comm.Barrier()
            if world.rank == 0:
                file.unlink(missing_ok=True)
                if damage is not None:
                    file.write_bytes(damage)
            world.comm.Barrier()
            text = error_of(world, lambda: run.trainer.load(newer, **run.objects), CheckpointError)
            assert file.name in text or (damage is None and f"no checkpoint in {newer}" in text)
        assert run.trainer.resume(shared_folder, **run.objects) == 2
        world.comm.Barrier()
        if world.rank == 0:
            file.write_bytes(contents)
        world.comm.Barrier()
    assert run.trainer.resume(shared_folder, **run.objects) == 3
    error_of(world, lambda: run.trainer.load(shared_folder / "nothing", **run.objects), CheckpointError)
    assert run.trainer.resume(shared_folder / "nothing", **run.objects) is None
    run.trainer.close()


@two
def test_nothing_is_unpickled(world, shared_folder, monkeypatch):
    saved_after(shared_folder, 2, shard="optimizer")
    run = Run(shard="optimizer")

    def refuse(*_arguments, **_options):
        raise AssertionError("unpickled")

    for owner, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(owner, name, refuse)
    assert run.trainer.resume(shared_folder, **run.objects) == 2
    monkeypatch.undo()
    run.trainer.close()


@two
def test_cannot_be_written(world, shared_folder, monkeypatch):
    """A folder that cannot be made fails at once, a full disk on one rank in the next step. Training continues."""
    run = Run()
    x, y = torch.randn(4, 2, 4, 4), torch.arange(4) % 3

    def step():
        run.trainer.train_step(x, y, nn.CrossEntropyLoss(), run.optimizer)

    step()
    before = [tensor.clone() for tensor in run.model.state_dict().values()]
    (shared_folder / "file").touch()
    run.trainer.save(shared_folder / "file" / "folder", **run.objects)
    text = error_of(world, step, CheckpointError)
    assert re.search(r"rank 0 on \S+ could not make .*file/folder/.*: Not a directory", text)
    assert_same(list(run.model.state_dict().values()), before)
    step()
    if world.rank == 1:
        run.trainer.save(shared_folder, own=_State({"a": object()}))
    assert "own.a is a object, which a checkpoint cannot hold" in error_of(world, step, CheckpointError)
    run.trainer.save(shared_folder / str(world.rank), **run.objects)
    assert "Save to one folder" in error_of(world, step, MismatchError)

    def no_space(*_arguments):
        raise OSError(28, "No space left on device")

    if world.rank == 1:
        monkeypatch.setattr(format, "write_file", no_space)
        run.trainer.save(shared_folder, **run.objects)
    step()
    writing_now = write_in_progress(run.trainer)
    if world.rank == 1:
        writing_now._part_is_written.wait()
    world.comm.Barrier()
    text = error_of(world, step, CheckpointError)
    assert re.search(r"not made: rank 1 on \S+ could not write to .*: No space left on device\. Older ones", text)
    assert not list(shared_folder.glob("*step*"))
    monkeypatch.undo()
    run.trainer.save(shared_folder, **run.objects)
    step()
    run.trainer.close()
    assert len(list(shared_folder.glob("step-*"))) == 1


@two
def test_not_shared(world, shared_folder, monkeypatch):
    """The error names a machine that does not see the folder."""
    run = Run()
    if world.rank == 1:
        monkeypatch.setattr(Path, "is_dir", lambda path: False)
    run.trainer.save(shared_folder, **run.objects)
    text = error_of(world, run.trainer.close, CheckpointError)
    assert re.search(r"rank 1 on \S+ does not see .*, which rank 0 has made", text)
    assert not list(shared_folder.glob(".step*"))


@two
def test_plain_loader(world, shared_folder, capfd):
    """All but the position in the data is restored, and one line reports this."""
    for is_later in (False, True):
        torch.manual_seed(1)
        model = nn.Linear(3, 2)
        trainer = create_distributed_trainer(model)
        optimizer = ADAM(model.parameters())
        if is_later:
            assert trainer.load(shared_folder, optimizer=optimizer) == 3
        for inputs, targets in [(torch.randn(4, 3), torch.arange(4) % 2) for _ in range(3)]:
            trainer.train_step(inputs, targets, nn.CrossEntropyLoss(), optimizer)
        trainer.save(shared_folder, optimizer=optimizer)
        trainer.close()
    assert capfd.readouterr().out.count("the position in the data is not restored") == (world.rank == 0)
    assert len(list(shared_folder.glob("step-00000006"))) == 1


def test_states_as_json():
    """Types of torch in an object's state are saved and restored with their types."""
    state = {
        "none": None,
        "numbers": [1, True, 0.1, -0.0, float("inf"), 2**70],
        "tuple": (0.9, (1, "x")),
        3: {"$odd": b"\x00\xff"},
        "counter": Counter({5: 2, 1: 1}),
        "tensor": torch.arange(4, dtype=torch.bfloat16).view(2, 2).t(),
        "array": np.arange(3.0),
    }
    tensors = {}
    text = json.dumps(format.encode(state, "s", tensors))
    back = format.decode(json.loads(text), lambda name: tensors[name].clone())
    assert torch.equal(back.pop("tensor"), state.pop("tensor"))
    assert np.array_equal(back.pop("array"), state.pop("array"))
    assert back == state
    assert [type(value) for value in back["numbers"]] == [int, bool, float, float, float, int]
    assert type(back["counter"]) is Counter
    assert type(back["tuple"][1]) is tuple


class _State:
    def __init__(self, state):
        self.state = state

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


@two
def test_plain_torch(world, shared_folder):
    """The code in docs/reliability.md reads a sharded optimizer's state from a checkpoint, without this package."""
    run = saved_after(shared_folder, 3, shard="optimizer")
    (folder,) = shared_folder.glob("step-*")
    document = (Path(__file__).parents[2] / "docs" / "reliability.md").read_text()
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", document, re.DOTALL) if "json" in block)
    model = Net()
    optimizer = ADAM(model.parameters())
    plain = {"model": model, "optimizer": optimizer}
    exec(code.replace("checkpoints/step-00001234", str(folder)), plain)
    assert_same(list(model.state_dict().values()), list(run.model.state_dict().values()))
    loaded = Run()
    loaded.trainer.load(folder, **loaded.objects)
    expected = loaded.optimizer.state_dict()
    loaded.trainer.close()
    assert optimizer.state_dict()["param_groups"] == expected["param_groups"]
    for number, state in expected["state"].items():
        assert_same(list(optimizer.state_dict()["state"][number].values()), list(state.values()))
    whole = safetensors.torch.load_file(folder / "rank-00000-1.safetensors")
    for name in whole.keys() & {f"model.{key}" for key in model.state_dict()}:
        assert torch.equal(whole[name], run.model.state_dict()[name.removeprefix("model.")])
    assert "distributed_trainer" not in code
