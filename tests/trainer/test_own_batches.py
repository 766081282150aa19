# SPDX-License-Identifier: Apache-2.0
"""Batches that are no tensors, with parts of each rank's own: split_batches=False, trainer.loader, evaluate."""

import pytest
import torch
import torch.nn.functional as F
from one_process import assert_same
from ranks import mixed, on_ranks, same_message
from small_graphs import Batch, Data
from small_models import F64, sgd
from torch import nn
from torch.utils.data import Dataset, IterableDataset, default_collate

from distributed_trainer import create_distributed_trainer

several = on_ranks(2, 3)


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def graph(number):
    nodes = 2 + number % 3
    return Data(numbers(nodes, 3, seed=number), torch.tensor([[0, 1], [1, 0]]), torch.tensor([number % 2]))


class GraphNet(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(7)
        self.layer = nn.Linear(3, 2, dtype=F64)

    def forward(self, graphs):
        sums = torch.zeros(graphs.num_graphs, 3, dtype=F64).index_add(0, graphs.batch, graphs.x)
        return self.layer(sums)


class Graphs(Dataset):
    def __init__(self, number):
        self.number = number

    def __len__(self):
        return self.number

    def __getitem__(self, index):
        return graph(index)


def split_graphs(batch, start, stop):
    graphs, _ = batch
    part = Batch.from_data_list(graphs.to_data_list()[start:stop])
    return (part, part.y), part.num_graphs


def graph_batches(number, size):
    """Return the batches that a loader without shuffle gives to one process."""
    every = [graph(index) for index in range(number)]
    return [Batch.from_data_list(every[first : first + size]) for first in range(0, number, size)]


def mean_of_samples(outputs, targets):
    """Return a loss of which the trainer knows only that it is a mean over samples."""
    return F.cross_entropy(outputs, targets)


def plain_training(model, batches, criterion):
    """Train on batches of (inputs, targets) in one process; return the losses."""
    optimizer, losses = sgd(model), []
    for inputs, targets in batches:
        optimizer.zero_grad()
        loss = criterion(model(*inputs) if isinstance(inputs, tuple) else model(inputs), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# ---- split_batches=False


class Bags(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.bag = nn.EmbeddingBag(10, 2, mode="sum", dtype=F64)

    def forward(self, ids, offsets):
        return self.bag(ids, offsets)


@mixed
@pytest.mark.parametrize("criterion", [nn.CrossEntropyLoss(), mean_of_samples])
def test_bags(world, criterion):
    """Bags of different sizes have more numbers than samples; such a part is not cut, so only its weight counts."""
    bags = [torch.arange(1 + 2 * number) % 10 for number in range(5)]
    sizes = torch.tensor([len(bag) for bag in bags])

    def batch(numbers):
        own = list(numbers)
        offsets = torch.cat([torch.zeros(1, dtype=torch.long), sizes[own].cumsum(0)[:-1]])
        return (torch.cat([bags[number] for number in own]), offsets), torch.tensor([number % 2 for number in own])

    model, reference = Bags(), Bags()
    losses = plain_training(reference, [batch(range(5))], criterion)
    trainer = create_distributed_trainer(model, split_batches=False)
    loss = trainer.train_step(*batch(range(world.rank, 5, world.size)), criterion, sgd(model))
    assert loss.item() == pytest.approx(losses[0], rel=1e-12)
    assert_same(model, reference)
    trainer.close()


@mixed
def test_graphs_of_each_rank(world):
    model, reference = GraphNet(), GraphNet()
    whole = Batch.from_data_list([graph(index) for index in range(7)])
    plain_training(reference, [(whole, whole.y)], mean_of_samples)
    trainer = create_distributed_trainer(model, split_batches=False)
    own = Batch.from_data_list([graph(index) for index in range(world.rank, 7, world.size)])
    trainer.train_step(own, own.y, mean_of_samples, sgd(model))
    assert_same(model, reference)
    trainer.close()


class Detector(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(9)
        self.layer = nn.Linear(3, 4, dtype=F64)

    def forward(self, images, targets):
        boxes = self.layer(torch.stack([image.flatten(1).mean(1) for image in images]))
        return torch.stack(
            [(box - target["boxes"]).square().mean() for box, target in zip(boxes, targets, strict=True)]
        )


@mixed
def test_detection_of_each_rank(world):
    """The sizes of a rank's part may agree by chance: one image of three channels, with three boxes."""

    def batch(indices):
        images = [numbers(3, 4, 5, seed=index) for index in indices]
        return images, [{"boxes": numbers(3, 4, seed=index)} for index in indices]

    def criterion(outputs, _):
        return outputs.mean()

    model, reference = Detector(), Detector()
    plain_training(reference, [(batch(range(4)), None)], criterion)
    trainer = create_distributed_trainer(model, split_batches=False)
    if world.size == 1:
        own = range(4)
    else:
        own = [0] if world.rank == 0 else range(world.rank, 4, world.size - 1)
    images, targets = batch(own)
    trainer.train_step((images, targets), targets, criterion, sgd(model))
    assert_same(model, reference)
    trainer.close()


@several
def test_unknown_weight(world):
    """If nothing says how many samples there are, `weight` must; the error is the same on every rank."""
    model, reference = GraphNet(), GraphNet()
    whole = Batch.from_data_list([graph(index) for index in range(world.size)])
    own = Batch.from_data_list([graph(world.rank)])

    def criterion(outputs, graphs):
        return F.cross_entropy(outputs, graphs.y)

    trainer = create_distributed_trainer(model, split_batches=False)
    with pytest.raises(ValueError, match=r"criterion is a mean over samples, but neither .* pass weight=") as error:
        trainer.train_step(own, own, criterion, sgd(model))
    same_message(world, error)
    assert_same(model, reference)
    plain_training(reference, [(whole, whole)], criterion)
    trainer.train_step(own, own, criterion, sgd(model), weight=1)
    assert_same(model, reference)
    trainer.close()


@several
@pytest.mark.parametrize(
    ("microbatches", "wrong", "text"),
    [
        (1, (object(), None), "neither the batch nor its targets"),
        (2, (numbers(4, 3), torch.arange(3)), "have inputs: 4, targets: 3"),
        (2, ((numbers(4, 3), None), [[numbers(4)]] * 4), r"targets may be a list of samples"),
    ],
)
def test_one_rank_cannot_use_its_batch(world, microbatches, wrong, text):
    """If the batch of one rank is refused, every rank raises its error, and the trainer stays usable."""
    model = nn.Linear(3, 2, dtype=F64)
    trainer = create_distributed_trainer(model, split_batches=False)
    right = numbers(4, 3), torch.arange(4) % 2
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=text) as error:
        batch = wrong if world.rank == 1 else right
        trainer.train_step(*batch, mean_of_samples, sgd(model), microbatches=microbatches)
    same_message(world, error)
    assert_same(model.state_dict(), before, rtol=0)
    trainer.train_step(*right, mean_of_samples, sgd(model), microbatches=microbatches)
    trainer.close()


# ---- trainer.loader


@mixed
@pytest.mark.parametrize("split", [None, split_graphs])
def test_loader_of_graphs(world, split):
    """A rank without samples in the last batch gets a sample that does not count."""
    model, reference = GraphNet(), GraphNet()
    batches = [(graphs, graphs.y) for graphs in graph_batches(10, 3)]
    expected = plain_training(reference, batches, mean_of_samples)
    trainer = create_distributed_trainer(model, split=split)
    optimizer = sgd(model)
    loader = trainer.loader(Graphs(10), 3, collate_fn=Batch.from_data_list)
    losses, stand_ins = [], []
    for graphs in loader:
        stand_ins.append(loader.is_stand_in)
        losses.append(trainer.train_step(graphs, graphs.y, mean_of_samples, optimizer).item())
    assert losses == pytest.approx(expected, rel=1e-12)
    assert stand_ins == [False] * 3 + [world.rank > 0]
    assert not loader.is_stand_in
    assert_same(model, reference)
    trainer.close()


@mixed
def test_manual_loop_over_graphs(world):
    """In a manual loop the user gives such a sample the weight 0; the trainer reminds of it."""
    model, reference = GraphNet(), GraphNet()
    plain_training(reference, [(graphs, graphs.y) for graphs in graph_batches(4, 3)], mean_of_samples)
    trainer = create_distributed_trainer(model)
    optimizer = sgd(model)
    loader = trainer.loader(Graphs(4), 3, collate_fn=Batch.from_data_list)
    for graphs in loader:
        with trainer.forward():
            loss = mean_of_samples(model(graphs), graphs.y)
        optimizer.zero_grad()
        if loader.is_stand_in:
            with pytest.raises(ValueError, match=r"pass weight=0 where loader.is_stand_in is True"):
                trainer.backward(loss, weight=len(graphs.y))
        trainer.backward(loss, weight=0 if loader.is_stand_in else len(graphs.y))
        trainer.step(optimizer)
    assert_same(model, reference)
    trainer.close()


@several
def test_changed_stand_in(world):
    """The trainer must not count a stand-in that the script has changed; every rank gets the error."""
    model = GraphNet()
    trainer = create_distributed_trainer(model)
    for _ in trainer.loader(Graphs(1), 3, collate_fn=Batch.from_data_list):
        other = Batch.from_data_list([Data(one.x + 1, one.edge_index + 0, one.y + 0) for one in [graph(0)]])
        with pytest.raises(ValueError, match="stands in for this rank's part, which is empty") as error:
            trainer.train_step(other, other.y, mean_of_samples, sgd(model))
        same_message(world, error)
    trainer.close()


class Broken(Dataset):
    """Dataset in which samples may be None."""

    def __init__(self, is_broken):
        self.is_broken = is_broken

    def __len__(self):
        return len(self.is_broken)

    def __getitem__(self, index):
        return None if self.is_broken[index] else (numbers(3, seed=index), f"{index}", index % 2)


class BrokenStream(IterableDataset):
    def __init__(self, is_broken):
        self.dataset = Broken(is_broken)

    def __iter__(self):
        return (self.dataset[index] for index in range(len(self.dataset)))


def without_broken(samples):
    return default_collate([sample for sample in samples if sample is not None])


def without_broken_or_none(samples):
    kept = [sample for sample in samples if sample is not None]
    return default_collate(kept) if kept else None


class Named(nn.Module):
    """Linear layer of inputs times their names, which are numbers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(7)
        self.layer = nn.Linear(3, 2, dtype=F64)

    def forward(self, x, names):
        return self.layer(x * torch.tensor([1 + float(name) for name in names], dtype=F64)[:, None])


BROKEN = [True, True, False, False, False, True, False, True, True, True, True, True, False]


@mixed
@pytest.mark.parametrize("kind", [Broken, BrokenStream])
@pytest.mark.parametrize("collate", [without_broken, without_broken_or_none])
def test_dropped_samples(world, kind, collate):
    """A collate function that drops broken samples may leave a rank without samples, or with fewer."""
    is_broken = [*BROKEN[:9], False, *BROKEN[10:]]
    model, reference = Named(), Named()
    samples = [Broken(is_broken)[index] for index in range(len(is_broken))]
    batches = [without_broken(samples[first : first + 4]) for first in range(0, 13, 4)]
    expected = plain_training(reference, [((x, names), y) for x, names, y in batches], mean_of_samples)
    trainer = create_distributed_trainer(model)
    loader, optimizer = trainer.loader(kind(is_broken), 4, collate_fn=collate), sgd(model)
    losses = [trainer.train_step((x, names), y, mean_of_samples, optimizer).item() for x, names, y in loader]
    assert losses == pytest.approx(expected, rel=1e-12)
    assert_same(model, reference)
    trainer.close()


@several
def test_batch_of_broken_samples(world):
    """If no sample of a batch is left, each rank gets what one process gets: None, or the collate function's error."""
    trainer = create_distributed_trainer(nn.Linear(3, 2))
    loader = trainer.loader(Broken(BROKEN), 4, collate_fn=without_broken_or_none)
    assert [batch is None for batch in loader] == [False, False, True, False]
    with pytest.raises(IndexError):
        list(trainer.loader(Broken(BROKEN), 4, collate_fn=without_broken))
    trainer.close()


def fails_on_5(samples):
    if any(name == "5" for _, name, _ in samples):
        raise KeyError("sample 5")
    return default_collate(samples)


@several
def test_errors_of_collate(world):
    """An error that one process gets as well is not taken for dropped samples."""
    trainer = create_distributed_trainer(nn.Linear(3, 2))
    loader = trainer.loader(Broken([False] * 6), 6, collate_fn=fails_on_5)
    if world.rank == world.size - 1:
        with pytest.raises(KeyError, match="sample 5"):
            next(iter(loader))
    else:
        next(iter(loader))
    trainer.close()


@several
def test_lists_of_an_empty_part(world):
    """An empty part's lists are empty; the dummy has a real sample."""
    model, reference = Named(), Named()
    dataset = Broken([False] * 4)
    batches = [default_collate([dataset[index] for index in range(first, min(first + 3, 4))]) for first in (0, 3)]
    plain_training(reference, [((x, names), y) for x, names, y in batches], mean_of_samples)
    trainer = create_distributed_trainer(model)
    optimizer, sizes = sgd(model), []
    for x, names, y in trainer.loader(dataset, 3):
        sizes.append((len(x), len(names)))
        trainer.train_step((x, names), y, mean_of_samples, optimizer)
    assert sizes[1] == ((1, 1) if world.rank == 0 else (0, 0))
    assert_same(model, reference)
    trainer.close()


# ---- evaluate


@mixed
@pytest.mark.parametrize("way", ["loader", "whole", "own"])
def test_evaluate_graphs(world, way):
    """Every graph counts once, in parts of the loader, of whole batches, and of each rank."""
    model = GraphNet()
    whole = Batch.from_data_list([graph(index) for index in range(7)])
    with torch.no_grad():
        outputs = model(whole)
    expected = {
        "loss": mean_of_samples(outputs, whole.y).item(),
        "hits": (outputs.argmax(1) == whole.y).double().mean(),
    }
    trainer = create_distributed_trainer(model, split=split_graphs, split_batches=way != "own")
    loader = [(graphs, graphs.y) for graphs in graph_batches(7, 3)]
    if way == "loader":
        loader = trainer.loader(
            Graphs(7), 3, collate_fn=lambda graphs: (batch := Batch.from_data_list(graphs), batch.y)
        )
    elif way == "own":
        own = [graph(index) for index in range(world.rank, 7, world.size)]
        loader = [(batch, batch.y) for batch in map(Batch.from_data_list, ([one] for one in own))]
    result = trainer.evaluate(loader, mean_of_samples, {"hits": lambda outputs, y: outputs.argmax(1) == y})
    assert result == pytest.approx({name: float(value) for name, value in expected.items()}, rel=1e-12)
    trainer.close()


@several
def test_evaluate_refuses_together(world):
    """If one rank's batch cannot be counted, every rank raises the same error."""
    trainer = create_distributed_trainer(model := nn.Linear(3, 2, dtype=F64), split_batches=False)
    assert model
    batch = (numbers(2, 3), torch.tensor([0, 1]))
    wrong = (numbers(2, 3), {"a": torch.ones(2), "b": torch.ones(3)})
    with pytest.raises(ValueError, match="neither the batch nor its targets have one number") as error:
        trainer.evaluate([wrong if world.rank == 1 else batch], lambda outputs, _: outputs.mean())
    same_message(world, error)
    trainer.close()
