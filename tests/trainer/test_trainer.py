# SPDX-License-Identifier: Apache-2.0
"""Arguments that a trainer takes or refuses: batches, parts, models, communicators. Results: see test_exactness.py."""

import copy
import gc
import logging
import random

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from one_process import assert_same
from ranks import everywhere, on_ranks, one_node, same_message
from small_models import F64, sgd
from torch import nn
from torch.utils.data import DataLoader, Dataset

from distributed_trainer import (
    DistributedTrainer,
    DistributedTrainerError,
    LaunchError,
    MismatchError,
    create_distributed_trainer,
)

pytestmark = pytest.mark.each_mpi

several = on_ranks(2, 3, 4, (2, 1), (3, 2), (4, 2))


def linear(seed=0):
    torch.manual_seed(seed)
    return nn.Linear(3, 2, dtype=F64)


def batch(num_samples=7, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_samples, 3, generator=generator, dtype=F64), torch.arange(num_samples) % 2


# ---- inputs and other arguments


class Keywords(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = linear()

    def forward(self, x, mask=None, scale=1.0):
        x = self.inner(x) * scale
        return x if mask is None else x * mask["keep"][0][:, None]


@pytest.mark.parametrize("kind", ["tensor", "tuple", "list", "dict", "nested"])
@everywhere
def test_inputs(world, kind):
    """A dict becomes keyword arguments, a tuple or list positional ones; all tensors in it are cut in the same way."""
    x, y = batch()
    mask = {"keep": [torch.linspace(0.5, 1.5, 7, dtype=F64)]}
    inputs, expected = {
        "tensor": (x, ((x,), {})),
        "tuple": ((x, mask), ((x, mask), {})),
        "list": ([x, mask, 2.0], ((x, mask, 2.0), {})),
        "dict": ({"mask": mask, "x": x}, ((x, mask), {})),
        "nested": ({"x": x, "mask": mask, "scale": 0.5}, ((x, mask, 0.5), {})),
    }[kind]
    model, reference = Keywords(), Keywords()
    loss = F.cross_entropy(reference(*expected[0]), y)
    loss.backward()
    sgd(reference).step()
    trainer = create_distributed_trainer(model)
    torch.testing.assert_close(trainer.train_step(inputs, y, nn.CrossEntropyLoss(), sgd(model)), loss.detach())
    assert_same(model, reference)
    trainer.close()


@everywhere
def test_nested_targets(world):
    x, y = batch()

    def criterion(outputs, targets):
        return F.cross_entropy(outputs, targets["label"]) + (outputs[:, 0] - targets["value"]).square().mean()

    targets = {"label": y, "value": x[:, 0]}
    model, reference = linear(), linear()
    criterion(reference(x), targets).backward()
    sgd(reference).step()
    trainer = create_distributed_trainer(model)
    trainer.train_step(x, targets, criterion, sgd(model))
    assert_same(model, reference)
    trainer.close()


@everywhere
def test_arguments(world):
    """The caller's mistakes are reported before any communication, and the trainer stays usable."""
    model = linear()
    trainer = create_distributed_trainer(model)
    x, y = batch()
    criterion, optimizer = nn.CrossEntropyLoss(), sgd(model)
    for arguments, kind, text in [
        (({"a": x, "b": [x[:5]]}, y, criterion, optimizer), ValueError, r'inputs\["a"\]: 7, inputs\["b"\]\[0\]: 5'),
        ((x, y[:6], criterion, optimizer), ValueError, "inputs: 7, targets: 6"),
        ((x, torch.tensor(1), criterion, optimizer), ValueError, "targets is a 0-dimensional tensor"),
        ((None, None, criterion, optimizer), ValueError, "no tensor"),
        ((x[:0], y[:0], criterion, optimizer), ValueError, "no samples"),
        ((x.numpy(), y, criterion, optimizer), TypeError, "inputs is a ndarray"),
        ((x, y, "loss", optimizer), TypeError, "criterion must be callable"),
        ((x, y, criterion, model.parameters()), TypeError, r"must be a torch.optim.Optimizer"),
        ((x, y, criterion, sgd(linear())), ValueError, r"2 parameter\(s\) that are not the model's"),
    ]:
        with pytest.raises(kind, match=text):
            trainer.train_step(*arguments)
    trainer.train_step(x, y, criterion, optimizer)
    trainer.close()
    for arguments, kind, text in [
        (("model",), TypeError, "model must be a torch.nn.Module, not str"),
        ((nn.LazyLinear(3),), ValueError, "has no shape yet"),
        ((linear(), 0), ValueError, "at least 1"),
        ((linear(), "2"), TypeError, "num_gpus must be an int"),
    ]:
        with pytest.raises(kind, match=text):
            create_distributed_trainer(*arguments)


@several
@pytest.mark.parametrize("kind", ["shape", "dtype", "integers", "floats", "structure"])
def test_different_batches(world, kind):
    """Every rank raises the same error, which names the remedy; no parameter has changed."""
    model = linear()
    trainer = create_distributed_trainer(model)
    optimizer = sgd(model)
    trainer.train_step(*batch(), nn.CrossEntropyLoss(), optimizer)
    before = copy.deepcopy(model)
    x, y = batch(8 if kind == "shape" and world.rank == 1 else 7)
    if world.rank == 1:
        if kind == "dtype":
            x = x.float()
        elif kind == "integers":
            y[3] = 1 - y[3]
        elif kind == "floats":
            x += 0.01
    inputs = (x,) if kind == "structure" and world.rank == 1 else x
    with pytest.raises(MismatchError) as error:
        trainer.train_step(inputs, y, nn.CrossEntropyLoss(), optimizer)
    message = same_message(world, error)
    assert message.startswith("rank 1 has a different batch than rank 0")
    assert "split_batches=False" in message
    assert "trainer.batches(loader)" in message
    assert_same(model, before)
    trainer.train_step(*batch(), nn.CrossEntropyLoss(), optimizer)
    trainer.close()


@several
def test_nearly_equal_batches(world):
    """Preprocessing may give different last bits on different ranks."""
    model = linear()
    trainer = create_distributed_trainer(model)
    x, y = batch()
    trainer.train_step(x * (1 + 1e-5 * world.rank), y, nn.CrossEntropyLoss(), sgd(model))
    trainer.close()


# ---- random numbers


def draw():
    return random.random(), float(np.random.rand()), float(torch.rand(()))


@everywhere
def test_random_states(world):
    """Random states are rank 0's, and stay equal after a training step; loaders that shuffle agree."""
    for generator in (random.seed, np.random.seed, torch.manual_seed):
        generator(100 + world.rank)
    expected = draw()
    for generator in (random.seed, np.random.seed, torch.manual_seed):
        generator(100 + world.rank)
    model = nn.Sequential(linear(seed=100 + world.rank), nn.Dropout())
    torch.manual_seed(100 + world.rank)
    trainer = create_distributed_trainer(model)
    draws = world.gather(draw())
    assert draws[0] == (expected if world.rank == 0 else draws[0])
    assert len(set(draws)) == 1
    trainer.train_step(*batch(), nn.CrossEntropyLoss(), sgd(model))
    order = [x.item() for x in DataLoader(list(range(20)), shuffle=True)]
    assert len(set(world.gather((*draw(), *order)))) == 1
    trainer.close()


class Noise(nn.Module):
    """Record the masks of dropout."""

    def __init__(self):
        super().__init__()
        self.inner = linear()
        self.masks = []

    def forward(self, x):
        mask = F.dropout(torch.ones(40), 0.5)
        self.masks.append(tuple(mask.tolist()))
        return self.inner(x)


@everywhere
def test_dropout(world):
    """Dropout differs between ranks and between steps, and is the same in a second run."""
    runs = []
    for _ in range(2):
        model = Noise()
        torch.manual_seed(7)
        trainer = create_distributed_trainer(model)
        for _ in range(3):
            trainer.train_step(*batch(12), nn.CrossEntropyLoss(), sgd(model))
        runs.append(model.masks)
        trainer.close()
    assert runs[0] == runs[1]
    masks = [mask for masks in world.gather(runs[0]) for mask in masks]
    assert len(set(masks)) == 3 * world.size


# ---- parts


@everywhere
def test_split(world):
    trainer = create_distributed_trainer(linear())
    for num_samples in (12, 7, 2):
        x, y = batch(num_samples)
        part = trainer.split({"x": [x], "y": y})
        parts = world.gather((part["x"][0].tolist(), part["y"].tolist()))
        assert [row for rows, _ in parts for row in rows] == x.tolist()
        assert [row for _, rows in parts for row in rows] == y.tolist()
        sizes = [len(rows) for _, rows in parts]
        assert max(sizes) - min(sizes) <= 1
    assert part["y"].untyped_storage().data_ptr() == y.untyped_storage().data_ptr()
    trainer.close()


def union_step(reference, parts, optimizer):
    """Run a step of one process on the samples of all ranks; return the loss."""
    x, y = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    optimizer.zero_grad()
    loss = F.cross_entropy(reference(x), y)
    loss.backward()
    optimizer.step()
    return loss.detach()


class WithNorm(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()

    def forward(self, x):
        return self.layers(x)


@everywhere
def test_parts_of_any_size(world):
    """The mean is over all samples; a part may be empty."""
    model, reference = WithNorm(), WithNorm()
    trainer = create_distributed_trainer(model, split_batches=False)
    optimizer, plain = sgd(model), sgd(reference)
    for step in range(6):
        sizes = [(3 * rank + 2 * step) % 5 + (world.size == 1) for rank in range(world.size)]
        sizes[step % world.size] += 3
        parts = [batch(size, seed=10 * step + rank) for rank, size in enumerate(sizes)]
        loss = trainer.train_step(*parts[world.rank], nn.CrossEntropyLoss(), optimizer)
        torch.testing.assert_close(loss, union_step(reference, parts, plain), rtol=1e-12, atol=0)
        assert_same(model, reference)
    trainer.close()


@several
def test_parts_have_their_own_random_stream(world):
    torch.manual_seed(3)
    trainer = create_distributed_trainer(linear(), split_batches=False)
    assert len(set(world.gather(draw()))) == world.size
    trainer.close()


@pytest.mark.parametrize("counts", [(5, 8), (8, 5), (1, 4)], ids=str)
@everywhere
def test_batches(world, counts):
    """With loaders of unequal length every sample counts once, and each step is that of one process on the union."""
    counts = [counts[rank % 2] + rank // 2 for rank in range(world.size)]
    loaders = [[batch(2 + (rank + i) % 3, seed=100 * rank + i) for i in range(n)] for rank, n in enumerate(counts)]
    model, reference = WithNorm(), WithNorm()
    trainer = create_distributed_trainer(model, split_batches=False)
    optimizer, plain = sgd(model), sgd(reference)
    num_steps = 0
    for x, y in trainer.batches(loaders[world.rank]):
        loss = trainer.train_step(x, y, nn.CrossEntropyLoss(), optimizer)
        parts = [loader[num_steps] for loader in loaders if num_steps < len(loader)]
        torch.testing.assert_close(loss, union_step(reference, parts, plain), rtol=1e-12, atol=0)
        num_steps += 1
    assert num_steps == max(counts)
    assert_same(model, reference)
    trainer.close()


@everywhere
def test_batches_refuses(world):
    trainer = create_distributed_trainer(linear())
    with pytest.raises(ValueError, match="split_batches=False"):
        next(trainer.batches([batch()]))
    trainer.close()
    trainer = create_distributed_trainer(linear(), split_batches=False)
    assert list(trainer.batches([])) == []
    if world.size > 1:
        with pytest.raises(ValueError) as error:
            list(trainer.batches([] if world.rank == 1 else [batch()]))
        assert "the loader of rank 1 is empty" in same_message(world, error)
    trainer.close()


# ---- models


class WithBuffers(nn.Module):
    """Buffers of several dtypes that forward changes, and one that it replaces."""

    def __init__(self, rank=0):
        super().__init__()
        self.inner = linear(seed=rank)
        self.register_buffer("count", torch.tensor(rank))
        self.register_buffer("mean", torch.full((3,), float(rank), dtype=F64))
        self.register_buffer("flag", torch.tensor([rank > 0]))
        self.register_buffer("nothing", None)

    def forward(self, x):
        if self.training:
            self.count += 1
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
            self.flag.fill_(bool(x[0, 0] > 0))
        return self.inner(x)


@everywhere
def test_state_is_rank_zeros(world):
    """Parameters and buffers are rank 0's from the start; buffers also after each step."""
    model = WithBuffers(rank=world.rank)
    trainer = create_distributed_trainer(model)
    assert_same(model, WithBuffers(rank=0))
    part = slice(0, -(-7 // world.size))  # rank 0's part
    expected = WithBuffers(rank=0)
    for step in range(3):
        x, y = batch(7, seed=step)
        trainer.train_step(x, y, nn.CrossEntropyLoss(), sgd(model))
        expected(x[part])
        for tensor, other in zip(model.buffers(), expected.buffers(), strict=True):
            assert torch.equal(tensor, other)
    trainer.close()


@several
@pytest.mark.parametrize("kind", ["name", "shape", "dtype", "requires_grad", "number", "buffer"])
def test_model_differs(world, kind):
    """Models that differ are refused with the first difference's name, in the same words on every rank."""
    odd = world.rank == world.size - 1
    model = nn.Sequential(linear(), nn.Linear(2, 4 if odd and kind == "shape" else 3))
    if odd:
        if kind == "name":
            model = nn.Sequential(model[0], nn.Identity(), model[1])
        elif kind == "dtype":
            model[1].double()
        elif kind == "requires_grad":
            model[1].bias.requires_grad_(False)
        elif kind == "number":
            model = model[:1]
        elif kind == "buffer":
            model[1].register_buffer("table", torch.zeros(2))
    with pytest.raises(MismatchError) as error:
        create_distributed_trainer(model)
    message = same_message(world, error)
    expected = {
        "name": "rank 0 has 1.weight",
        "shape": "1.weight [3, 2] float32",
        "dtype": "1.weight [3, 2] float64",
        "requires_grad": "1.bias [3] float32 without gradient",
        "number": "only rank 0 has 1.weight",
        "buffer": "has 1.table [2] float32",
    }
    assert expected[kind] in message
    assert f"rank {world.size - 1} has" in message
    assert "Build the model the same way on every rank." in message


# ---- optimizers, the trainer itself


@everywhere
def test_new_optimizer_each_step(world, caplog):
    """Training works, and rank 0 warns once that the optimizer's state is lost."""
    model = linear()
    trainer = create_distributed_trainer(model)
    with caplog.at_level(logging.WARNING):
        for step in range(4):
            optimizer = torch.optim.Adam(model.parameters())
            trainer.train_step(*batch(seed=step), nn.CrossEntropyLoss(), optimizer)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == (world.rank == 0)
    if messages:
        assert "new Adam" in messages[0]
        assert "Make the optimizer once, before the loop" in messages[0]
    trainer.close()


@everywhere
def test_one_optimizer_does_not_warn(world, caplog):
    """There is no warning for two optimizers in turn with different parameters, and one for a loss without a check."""
    model = nn.Sequential(linear(), nn.Linear(2, 2).double())
    trainer = create_distributed_trainer(model)
    optimizers = [torch.optim.Adam(model[part].parameters()) for part in (0, 1)]
    with caplog.at_level(logging.WARNING):
        for step in range(4):
            trainer.train_step(*batch(seed=step), nn.CrossEntropyLoss(), optimizers[step % 2])
        assert not caplog.records
        for step in range(2):
            own_loss = lambda outputs, y: outputs[:, 0].mean()  # noqa: E731
            trainer.train_step(*batch(seed=step), own_loss, optimizers[step % 2], check_weight=False)
        assert len(caplog.records) == (world.rank == 0 and world.size > 1)
    trainer.close()


@everywhere
def test_attributes(world):
    model = linear()
    with create_distributed_trainer(model, num_gpus=None) as trainer:
        assert isinstance(trainer, DistributedTrainer)
        assert trainer.model is model
        assert (trainer.rank, trainer.world_size) == (world.rank, world.size)
        per_node = world.job.ranks_per_node or world.size
        assert trainer.local_rank == world.rank % per_node
        assert trainer.device == torch.device("cpu")
        assert repr(trainer) == (
            f"DistributedTrainer(Linear, rank {world.rank} of {world.size}, device='cpu', split_batches=True)"
        )
        trainer.train_step(*batch(), nn.CrossEntropyLoss(), sgd(model))
    model.zero_grad()  # the trainer no longer uses the model
    F.cross_entropy(model(batch()[0][:1]), batch()[1][:1]).backward()
    assert not model.weight._post_accumulate_grad_hooks
    with create_distributed_trainer(model) as trainer:
        trainer.train_step(*batch(), nn.CrossEntropyLoss(), sgd(model))


@on_ranks(1, 2, 3, 4)
def test_close(world):
    """A rank that waits for a rank whose trainer was closed gets an error; other trainers continue."""
    trainer, other = (create_distributed_trainer(linear()) for _ in range(2))
    last = world.rank == world.size - 1
    others = world.comm.Split(last)
    if last:
        trainer.close()  # waits until the others close theirs
        trainer.close()
        with pytest.raises(ValueError, match="was closed"):
            trainer.train_step(*batch(), nn.CrossEntropyLoss(), sgd(trainer.model))
    else:
        with pytest.raises(DistributedTrainerError, match=f"rank {world.size - 1} has left the job, or closed its"):
            trainer.train_step(*batch(), nn.CrossEntropyLoss(), sgd(trainer.model))
        others.Barrier()  # otherwise the first of them to close would be reported to the others
    trainer.close()
    for _ in range(2):
        other.train_step(*batch(), nn.CrossEntropyLoss(), sgd(other.model))
    other.close()


@one_node
def test_num_gpus_under_a_launcher(world, capfd):
    """The launcher decides the number of ranks; a different num_gpus gives one line on rank 0."""
    from distributed_trainer.launch import devices

    _, notice = devices.resolve_num_gpus(3, world.size, 0)
    assert (notice is None) == (world.size == 3)
    with create_distributed_trainer(linear(), num_gpus=3) as trainer:
        assert trainer.world_size == world.size


@everywhere
def test_summary(world, capfd):
    """One line on rank 0 describes the job."""
    create_distributed_trainer(linear()).close()
    create_distributed_trainer(linear(), split_batches=False).close()
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("distributed_trainer:")]
    if world.rank > 0:
        assert not lines
        return
    num_nodes = -(-world.size // (world.job.ranks_per_node or world.size))
    assert f"{world.size} rank{'s' * (world.size > 1)} on {num_nodes} machine{'s' * (num_nodes > 1)}" in lines[0]
    assert lines[0].endswith("every rank reads the whole batch")
    assert lines[1].endswith("every rank reads its own part")


# ---- communicators


@on_ranks(3, 4, (4, 2))
def test_split_world(world):
    """Two communicators of mpi4py train two models side by side; later all ranks train together."""
    color = world.rank % 2
    comm = world.comm.Split(color, world.rank)
    torch.manual_seed(color)
    model, reference = linear(seed=color), linear(seed=color)
    trainer = create_distributed_trainer(model, group=comm)
    assert (trainer.rank, trainer.world_size) == (comm.rank, comm.size)
    optimizer, plain = sgd(model), sgd(reference)
    for step in range(5 + color):
        x, y = batch(7, seed=10 * color + step)
        loss = trainer.train_step(x, y, nn.CrossEntropyLoss(), optimizer)
        torch.testing.assert_close(loss, union_step(reference, [(x, y)], plain), rtol=1e-12, atol=0)
    assert_same(model, reference)
    trainer.close()
    with create_distributed_trainer(linear()) as trainer:
        assert trainer.world_size == world.size


@one_node
def test_process_group_of_torch(world, tmp_path):
    """Training over gloo gives the same result as over shmpi."""
    file = world.comm.bcast(str(tmp_path / "store"))
    store = dist.FileStore(file, world.size)
    dist.init_process_group("gloo", store=store, rank=world.rank, world_size=world.size)
    try:
        models = []
        for options in ({}, {"group": dist.group.WORLD}):
            model = WithNorm()
            trainer = create_distributed_trainer(model, **options)
            assert (trainer.rank, trainer.world_size) == (world.rank, world.size)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
            for step in range(5):
                trainer.train_step(*batch(7 if step else 3, seed=step), nn.CrossEntropyLoss(), optimizer)
            models.append(model)
            trainer.close()
        assert_same(*models)
    finally:
        dist.destroy_process_group()
        trainer = None
        gc.collect()  # else a forked child (DataLoader worker) would wait for the group's threads


# ---- DataLoader workers


class Samples(Dataset):
    """Return, in a worker, whether making a trainer was refused, and whether the rank's memory is mapped."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        gc.collect()  # destroys objects inherited from the rank, which must not affect the rank
        try:
            create_distributed_trainer(linear())
        except LaunchError as error:
            refused = "DataLoader worker" in str(error)
        with open("/proc/self/maps") as maps:
            is_inherited = "memfd:dtrain" in maps.read()
        return batch(8)[0][index], torch.tensor([refused, is_inherited])


@on_ranks(2)
def test_data_loader_workers(world):
    """Forked workers read data while the trainer exists, and do not disturb it."""
    model = linear()
    trainer = create_distributed_trainer(model)
    optimizer = sgd(model)
    x, y = batch()
    trainer.train_step(x, y, nn.CrossEntropyLoss(), optimizer)
    for _ in range(2):
        loader = DataLoader(Samples(), batch_size=4, num_workers=2, multiprocessing_context="fork")
        for inputs, facts in loader:
            assert facts.tolist() == [[True, False]] * 4
            trainer.train_step(inputs, y[:4], nn.CrossEntropyLoss(), optimizer)
    trainer.close()
