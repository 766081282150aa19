# SPDX-License-Identifier: Apache-2.0
"""Tests of random streams: a trainer leaves those of the script alone; a step's own ones; those of `common_random`."""

import contextlib
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from one_process import assert_same, pieces
from ranks import mixed, on_ranks
from small_models import F64, Squares, mlp, regression_batch, sgd
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset

from distributed_trainer import common_random, create_distributed_trainer

OPTIONS = [{}, {"split_batches": False}, {"reproducible": 4}, {"shard": "optimizer"}]


def seed_all(seed=3):
    for generator in (random.seed, np.random.seed, torch.manual_seed):
        generator(seed)


def states():
    name, keys, *rest = np.random.get_state()
    return random.getstate(), (name, keys.tolist(), *rest), torch.get_rng_state().tolist()


def draw():
    return random.random(), np.random.randn(), *torch.randn(3).tolist()


# ---- the script's streams


class Drawing(nn.Module):
    """Model that draws numbers for its samples in training and in evaluation, forward and backward."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(mlp(6, 8), nn.Dropout(), mlp(8, 4))

    def forward(self, x):
        x = x + 0.1 * torch.rand_like(x)
        if not self.training:
            x = x + random.random() + torch.from_numpy(np.random.rand(len(x), 1))
        if x.requires_grad:
            x.register_hook(lambda gradient: gradient + 0 * torch.rand_like(gradient))
        return self.layers(checkpoint(torch.tanh, x, use_reentrant=False))


class Script:
    """The calls of a script, each of which draws nothing by itself."""

    def __init__(self, tmp_path, options):
        self.folder, self.options = tmp_path, options
        self.model, self.reading_model = Drawing(), Drawing()
        self.optimizer = sgd(self.model)
        self.x, self.y = (tensor.clone() for tensor in regression_batch(7, inputs=6, outputs=4))
        self.has_own_loop = "reproducible" not in options

    def create(self):
        self.trainer = create_distributed_trainer(self.model, **self.options)

    def train_step(self, **options):
        return self.trainer.train_step(self.x, self.y, nn.MSELoss(), self.optimizer, **options)

    def microbatches(self):
        for number in (2, "auto") if self.has_own_loop else ():
            self.train_step(microbatches=number)

    def own_loop(self):
        for number in range(3 if self.has_own_loop else 0):
            x, y = self.trainer.split((self.x, self.y))
            with self.trainer.forward():
                loss = nn.MSELoss()(self.model(x), y)
            with self.trainer.no_sync() if number < 1 else contextlib.nullcontext():
                self.trainer.backward(loss, weight=len(y))
            if number:
                self.trainer.step(self.optimizer, clip_norm=1.0)

    def evaluate(self):
        metrics = {"noisy": lambda outputs, targets: outputs.mean() + torch.rand(len(targets)).mean()}
        self.trainer.evaluate([(self.x, self.y), (self.x[:1], self.y[:1])], nn.MSELoss(), metrics)

    def batches(self):
        if not self.options.get("split_batches", True):
            for x, y in self.trainer.batches([(self.x, self.y)] * (1 + self.trainer.rank)):
                self.trainer.train_step(x, y, nn.MSELoss(), self.optimizer)

    def figures(self):
        self.trainer.summary()
        with self.trainer.profile(self.folder / "trace.json"):
            self.train_step()
        self.trainer.log_to(Writer())
        for _ in self.trainer.progress([1, 2]):
            self.train_step()
        self.trainer.log({"figure": 1.0})

    def save(self):
        self.trainer.save(self.folder / "saves", optimizer=self.optimizer)
        self.train_step()

    def close(self):
        self.trainer.close()

    def loader(self):
        trainer = create_distributed_trainer(self.reading_model, **self.options)  # the first takes whole batches
        optimizer = sgd(self.reading_model)
        loader = trainer.loader(TensorDataset(self.x, self.y), 3, shuffle=True)
        for _ in trainer.epochs(2):
            for x, y in loader:
                trainer.train_step(x, y, nn.MSELoss(), optimizer)
        trainer.evaluate(loader, nn.MSELoss())
        list(trainer.loader(Squares(5), 2))
        trainer.close()


# In processes of their own: those that run many tests have many threads, and should not be forked.
WORKERS = """
from torch.utils.data import DataLoader, TensorDataset

class Noisy(torch.utils.data.Dataset):
    def __len__(self):
        return 7

    def __getitem__(self, index):
        return index + torch.rand(3), torch.zeros(2)

def read_plain():
    return torch.cat([x for _ in range(2) for x, y in DataLoader(Noisy(), 3, shuffle=True, num_workers=2)])

data = TensorDataset(torch.ones(7, 3), torch.zeros(7, 2))
torch.manual_seed(5)
plain = read_plain()
expected = torch.get_rng_state()
torch.manual_seed(5)
trainer = create_distributed_trainer(model)
loader = trainer.loader(data, 3, shuffle=True, num_workers=1)
for _ in trainer.epochs(2):
    for x, y in loader:
        step(trainer, x, y, nn.MSELoss())
trainer.evaluate(loader, nn.MSELoss())
assert torch.equal(read_plain(), plain)
assert torch.equal(torch.get_rng_state(), expected)
trainer.close()
"""


def test_workers_leave_the_streams_alone(run):
    """A trainer's loader with workers draws nothing from the script's stream; a plain one draws as ever."""
    job = run(WORKERS, 2)
    assert job.exit_code() == 0, job.err


class Writer:
    def log(self, figures, step):
        """Take figures."""


CALLS = [
    "create",
    "train_step",
    "microbatches",
    "own_loop",
    "evaluate",
    "batches",
    "figures",
    "save",
    "close",
    "loader",
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@mixed
def test_streams_of_the_script(world, shared_folder, options):
    """No call changes a stream; rank 0 draws like one process, and so do the others if they read the same batches."""
    seed_all()
    script = Script(shared_folder, options)
    seed_all(100 + world.rank)
    before = states()
    for name in CALLS:
        getattr(script, name)()
        if name == "create" and options.get("split_batches", True):
            assert len(set(world.gather(repr(states())))) == 1
        if name == "create" and world.rank > 0:
            assert states() != before, "taken from rank 0"
            before = states()
        assert states() == before, name
    if not options.get("split_batches", True):
        assert len(set(world.gather(draw()))) == world.size


@mixed
def test_load(world, shared_folder):
    """A run that continues has the streams of the run before it, on any number of ranks."""
    seed_all()
    model = Drawing()
    optimizer = sgd(model)
    trainer = create_distributed_trainer(model)
    x, y = regression_batch(7, inputs=6, outputs=4)
    losses = []
    for step in range(4):
        if step == 2:
            trainer.save(shared_folder, optimizer=optimizer)
            saved = states()
        losses.append(trainer.train_step(x, y, nn.MSELoss(), optimizer).item())
    trainer.close()
    for call in ("load", "resume"):
        seed_all(50)
        model = Drawing()
        optimizer = sgd(model)
        trainer = create_distributed_trainer(model)
        assert getattr(trainer, call)(shared_folder, optimizer=optimizer) == 2
        assert states() == saved
        assert [trainer.train_step(x, y, nn.MSELoss(), optimizer).item() for _ in range(2)] == losses[2:]
        trainer.close()


@on_ranks(2)
def test_order_of_loaders(world):
    """Orders differ between loaders, and follow from the seed at the trainer's creation, whatever is drawn later."""
    orders = []
    for draws in (0, 3):
        torch.manual_seed(world.rank)
        trainer = create_distributed_trainer(nn.Linear(1, 1))
        torch.rand(draws)
        loaders = [trainer.loader(Squares(20), 20, shuffle=True) for _ in range(2)]
        orders.append(
            [[index for part in world.gather(next(iter(one))[0].tolist()) for index in part] for one in loaders]
        )
        trainer.close()
    assert orders[0] == orders[1]
    assert orders[0][0] != orders[0][1]


class Masks(nn.Module):
    """Model that records what dropout leaves in each call."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.masks = []

    def forward(self, x):
        self.masks.append(tuple(F.dropout(torch.ones(40)).tolist()))
        return self.layer(x)


@on_ranks(1, 3)
def test_own_streams(world):
    """Masks differ between ranks, steps, microbatches, forwards and evaluations; two trainers draw different ones."""
    torch.manual_seed(0)
    models = [Masks(), Masks()]
    torch.rand(1)
    for model in models:
        trainer = create_distributed_trainer(model)
        optimizer = sgd(model)
        x = torch.ones(12, 1)
        for _ in range(2):
            trainer.train_step(x, x, nn.MSELoss(), optimizer, microbatches=2)
        for _ in range(2):
            with trainer.forward():
                loss = model(x).mean()
        trainer.backward(loss, weight=1)
        torch.manual_seed(5)
        trainer.close()
    masks = [mask for masks in world.gather([mask for model in models for mask in model.masks]) for mask in masks]
    assert len(set(masks)) == len(masks) == 2 * 6 * world.size


# ---- common_random


class RandomDepth(nn.Module):
    """Layers of which each is left out by chance, with dropout between them.

    Args:
        recomputes: Argument `use_reentrant` of the checkpoint around each layer; None for no checkpoint.
    """

    def __init__(self, recomputes=None):
        super().__init__()
        self.recomputes = recomputes
        self.layers = nn.ModuleList(mlp(5, 5, seed=seed) for seed in range(6))
        self.norms = nn.ModuleList(nn.BatchNorm1d(5, dtype=F64) for _ in range(6))
        self.decisions = []
        self.given = None  # decisions of a run to repeat
        self.dropout = nn.Dropout(0.0)

    def decide(self):
        if self.given is not None:
            return self.given.pop(0)
        with common_random():
            draws = torch.rand(()).item(), random.random(), np.random.rand()
        return draws

    def layer(self, number, x):
        draws = self.decide()
        self.decisions.append(draws)
        if sum(draws) > 1.4:
            return x
        return self.dropout(torch.tanh(self.layers[number](x)) * draws[0])

    def forward(self, x):
        for number, norm in enumerate(self.norms):
            kept = x if self.recomputes is None else x.requires_grad_()
            run = self.layer if self.recomputes is None else _checkpointed(self.layer, self.recomputes)
            x = norm(run(number, kept))
        return x


def _checkpointed(function, use_reentrant):
    return lambda *arguments: checkpoint(function, *arguments, use_reentrant=use_reentrant)


def train(world, way, model, num_steps, num_microbatches=1):
    """Train; return the decisions of each step, of forward and of recomputation."""
    seed_all(world.rank)
    trainer = create_distributed_trainer(model)
    optimizer = sgd(model)
    decisions = []
    for step in range(num_steps):
        tensors = regression_batch(7, step, inputs=5, outputs=5)
        if way == "train_step":
            trainer.train_step(*tensors, nn.MSELoss(), optimizer, microbatches=num_microbatches)
        else:
            optimizer.zero_grad()
            parts = pieces(tensors, num_microbatches)
            for number, part in enumerate(parts, 1):
                x, y = trainer.split(part)
                with trainer.forward():
                    loss = nn.MSELoss()(model(x), y)
                torch.rand(1)  # by the script
                with trainer.no_sync() if number < len(parts) else contextlib.nullcontext():
                    trainer.backward(loss, weight=len(y))
            trainer.step(optimizer)
        decisions.append(model.decisions[:])
        model.decisions.clear()
    trainer.close()
    return decisions


@pytest.mark.parametrize("num_microbatches", [1, 2])
@pytest.mark.parametrize("recomputes", [None, False, True])
@pytest.mark.parametrize("way", ["train_step", "own-loop"])
@mixed
def test_common_random(world, way, recomputes, num_microbatches):
    """Ranks, microbatches and recomputations decide alike, and the weights are those of one process that does, too."""
    if way == "own-loop" and world.size > 3:
        pytest.skip("a rank without samples")
    model = RandomDepth(recomputes)
    decisions = train(world, way, model, 3, num_microbatches)
    assert len(set(world.gather(repr(decisions)))) == 1
    masks = [step[:6] for step in decisions]
    assert len({draws for step in masks for draws in step}) == 3 * 6
    assert [set(step) for step in decisions] == [set(mask) for mask in masks]
    has_recomputed = any(len(step) > 6 * num_microbatches for step in decisions)
    assert has_recomputed == (recomputes is not None)
    plain = RandomDepth()
    optimizer = sgd(plain)
    for step, mask in enumerate(masks):
        tensors = regression_batch(7, step, inputs=5, outputs=5)
        optimizer.zero_grad()
        parts = pieces(tensors, num_microbatches)
        for x, y in parts:
            plain.given = mask[:]
            weight = len(y) / 7 if way == "train_step" else 1
            (nn.MSELoss()(plain(x), y) * weight).backward()
        optimizer.step()
    assert_same(model, plain, 1e-9, atol=1e-12)


def test_without_a_trainer():
    """Outside of a step the block changes nothing, also after a step that has used it."""
    for _ in range(2):
        seed_all()
        expected = draw()
        seed_all()
        with common_random():
            assert draw() == expected
        train(type("World", (), {"rank": 0}), "train_step", RandomDepth(), 1)


@on_ranks(1, 2)
def test_own_stream_goes_on(world):
    """Dropout after a block differs between ranks and from dropout before it; the script's streams are left alone."""
    masks = []

    class Net(Masks):
        def forward(self, x):
            for _ in range(2):
                with common_random():
                    masks.append(draw())
                    with common_random():
                        masks.append(draw())
                    masks.append(draw())
                super().forward(x)
            with pytest.raises(KeyError), common_random():
                raise KeyError
            return super().forward(x)

    model = Net()
    seed_all()
    trainer = create_distributed_trainer(model)
    before = states()
    trainer.train_step(torch.ones(4, 1), torch.ones(4, 1), nn.MSELoss(), sgd(model))
    assert states() == before
    trainer.close()
    assert len(set(masks)) == 6
    assert len(set(world.gather(repr(masks)))) == 1
    assert len({mask for masks in world.gather(model.masks) for mask in masks}) == 3 * world.size


@pytest.mark.parametrize("options", [{"reproducible": 4}, {"split_batches": False}, {"shard": "optimizer"}], ids=str)
@on_ranks(1, 2, 3)
def test_with_options(world, options):
    model = RandomDepth()
    seed_all()
    trainer = create_distributed_trainer(model, **options)
    optimizer = sgd(model)
    for step in range(2):
        trainer.train_step(*regression_batch(8, step, inputs=5, outputs=5), nn.MSELoss(), optimizer)
    trainer.close()
    steps = [
        set(model.decisions[start : start + len(model.decisions) // 2]) for start in (0, len(model.decisions) // 2)
    ]
    assert [len(step) for step in steps] == [6, 6]
    assert len(set(world.gather(repr([sorted(step) for step in steps])))) == 1


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled(backend):
    """A compiled model decides as it does otherwise."""
    decisions = []
    for compiles in (False, True):
        model = RandomDepth()
        run = torch.compile(model, backend=backend) if compiles else model
        seed_all()
        with create_distributed_trainer(model) as trainer, trainer.forward():
            run(torch.ones(4, 5, dtype=F64))
        decisions.append(model.decisions)
    assert decisions[0] == decisions[1]
