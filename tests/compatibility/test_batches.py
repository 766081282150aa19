# SPDX-License-Identifier: Apache-2.0
"""Batches of more than tensors: lists, records, graphs, detection."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from compatibility import refused, works
from small_graphs import Batch, Data
from small_models import F64, sgd
from torch import Tensor, nn


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def linear():
    torch.manual_seed(4)
    return nn.Linear(3, 2, dtype=F64)


def classes(num_samples):
    return torch.arange(num_samples) % 2


class Scaled(nn.Module):
    """Linear layer of inputs that are multiplied by a list of numbers, one for each sample."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.layer = nn.Linear(3, 2, dtype=F64)

    def forward(self, x, scales, power=1):
        return self.layer(x * torch.tensor(scales, dtype=F64)[:, None] ** power)


def squared(outputs, targets):
    return sum((row - float(target)).square().mean() for row, target in zip(outputs, targets, strict=True)) / len(
        outputs
    )


# ---- lists


@works("inputs with a list of numbers, one for each sample")
def test_list_of_numbers(run):
    model = run.start(Scaled())
    for step in range(2):
        run.step((numbers(4, 3, seed=step), [1.0, 10.0, 0.1, 2.0]), classes(4), nn.CrossEntropyLoss(), sgd(model))


@works("inputs with a list of numbers, `microbatches=2`", ways=("train_step",))
def test_list_in_microbatches(run):
    model = run.start(Scaled())
    run.step((numbers(5, 3), [1.0, 10.0, 0.1, 2.0, 3.0]), classes(5), nn.CrossEntropyLoss(), sgd(model), microbatches=2)


@works("targets that are a list of strings, as `default_collate` makes it")
def test_list_of_strings(run):
    model = run.start(linear())

    def criterion(outputs, targets):
        return squared(outputs, [len(text) for text in targets])

    run.step(numbers(5, 3), ("a", "bb", "ccc", "", "e"), criterion, sgd(model))


@works("a number and None beside the tensors of the inputs, shared by all samples")
def test_shared_values(run):
    model = run.start(Scaled())
    inputs = {"x": numbers(4, 3), "scales": [1.0, 2.0, 3.0, 4.0], "power": 2}
    run.step(inputs, classes(4), nn.CrossEntropyLoss(), sgd(model))


@refused(
    "a list of another length than the batch",
    r"Tensors of a batch must have the same first dimension, the number of samples, and lists as many entries \(keep a "
    r"list that all samples share in the model\), but have .*\[0\]: 4, .*\[1\]: 3 entries, .*: 4",
    instead="keep a list that all samples share in an attribute of the model",
)
def test_list_of_other_length(run):
    model = run.start(Scaled())
    run.step((numbers(4, 3), [1.0, 2.0, 3.0]), classes(4), nn.CrossEntropyLoss(), sgd(model))


class Pooled(nn.Module):
    """Linear layer over the mean of each sample's rows or pixels; samples come in a list."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(6)
        self.layer = nn.Linear(3, 2, dtype=F64)

    def forward(self, samples):
        return self.layer(torch.stack([sample.flatten(1).mean(1) for sample in samples]))


@works("a list of images of different sizes")
def test_images_of_different_sizes(run):
    model = run.start(Pooled())
    for images in ([numbers(3, 4 + n, 5, seed=n) for n in range(5)], [numbers(3, 4 + n, 5, seed=n) for n in range(3)]):
        targets = classes(len(images))  # in the second step the batch has as many images as channels
        run.step((images,), targets, nn.CrossEntropyLoss(), sgd(model), weight=len)


@refused(
    "a list of as many images as they have channels, in the first step",
    r"\[0\] may be a list of samples, or hold tensors of all samples, since its length and the sizes of its tensors "
    r"allow both. If it holds tensors of all samples, pass a dict or a NamedTuple in its place. If it is a list of "
    r"samples, stack it to one tensor, or pass split=",
    instead="stack them, or pass `split=`",
)
def test_as_many_images_as_channels(run):
    model = run.start(Pooled())
    run.step(
        ([numbers(3, 4, 5, seed=n) for n in range(3)],), torch.tensor([0, 1, 1]), nn.CrossEntropyLoss(), sgd(model)
    )


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(8)
        self.heads = nn.ModuleList([nn.Linear(3, 2, dtype=F64), nn.Linear(4, 2, dtype=F64)])

    def forward(self, first, second):
        return self.heads[0](first), self.heads[1](second)


def two_losses(outputs, targets):
    return sum((one - other).square().mean() for one, other in zip(outputs, targets, strict=True))


@works("two inputs and two targets; a batch of two samples after a larger one", ways=("train_step",))
def test_two_inputs(run):
    model = run.start(TwoHeads())
    for size in (5, 2):
        inputs = numbers(size, 3), numbers(size, 4, seed=1)
        run.step(inputs, (numbers(size, 2), numbers(size, 2, seed=1)), two_losses, sgd(model))


# ---- records


@dataclass(frozen=True)
class Labels:
    value: Tensor
    names: list[str]
    scale: float = 1.0


class Record(NamedTuple):
    value: Tensor
    names: list[str]
    scale: float


def named_loss(outputs, targets):
    lengths = torch.tensor([len(name) for name in targets.names], dtype=F64)
    return ((outputs[:, 0] - targets.value) * lengths * targets.scale).square().mean()


@works("targets in a dataclass")
def test_dataclass(run):
    model = run.start(linear())
    targets = Labels(numbers(5), ["a", "bb", "ccc", "dddd", "e"], 0.5)
    run.step(numbers(5, 3), targets, named_loss, sgd(model), weight=lambda part: len(part.value))


@works("targets in a NamedTuple")
def test_named_tuple(run):
    model = run.start(linear())
    targets = Record(numbers(5), ["a", "bb", "ccc", "dddd", "e"], 0.5)
    run.step(numbers(5, 3), targets, named_loss, sgd(model), weight=lambda part: len(part.value))


# ---- what cannot be cut

CANNOT = "cannot be cut into parts"


class Last(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.LSTM(3, 2, dtype=F64)

    def forward(self, sequences):
        return self.layer(sequences)[1][0][0]


@refused(
    "inputs in a `PackedSequence`",
    f"inputs is a PackedSequence, which {CANNOT}: pass tensors, or tuples, lists, dicts or dataclasses of tensors",
    instead="pass padded tensors and lengths, and pack them in the model; or pass `split=`",
    error=TypeError,
    ways=("train_step",),
)
def test_packed_sequence(run):
    model = run.start(Last())
    packed = nn.utils.rnn.pack_sequence([numbers(4, 3), numbers(2, 3)])
    run.step(packed, torch.tensor([0, 1]), nn.CrossEntropyLoss(), sgd(model))


@refused(
    "a sparse input",
    f"inputs is a sparse tensor, which {CANNOT}: pass a padded or dense tensor",
    instead="pass a dense tensor, or pass `split=`",
    error=TypeError,
    ways=("train_step",),
)
def test_sparse_input(run):
    model = run.start(linear())
    run.step(numbers(4, 3).to_sparse(), classes(4), nn.CrossEntropyLoss(), sgd(model))


@refused(
    "a nested input",
    f"inputs is a nested tensor, which {CANNOT}: pass a padded or dense tensor",
    instead="pass a padded tensor or a list, or pass `split=`",
    error=TypeError,
    ways=("train_step",),
)
def test_nested_input(run):
    model = run.start(linear())
    nested = torch.nested.nested_tensor([numbers(4, 3), numbers(2, 3)], layout=torch.jagged)
    run.step(nested, torch.arange(2), nn.CrossEntropyLoss(), sgd(model))


@refused(
    "an object of the user's that holds tensors",
    f"inputs is a Batch, which {CANNOT}: pass tensors, .*or pass split= to create_distributed_trainer",
    instead="pass `split=`",
    error=TypeError,
    ways=("train_step",),
)
def test_object(run):
    model = run.start(GraphNet())
    graphs = graph_batch(4)
    run.step(graphs, graphs.y, nn.CrossEntropyLoss(), sgd(model))


@refused(
    "NumPy arrays in a batch",
    r'inputs\["x"\] is a ndarray, which cannot be cut into parts: .*torch.as_tensor',
    instead="`torch.as_tensor`",
    error=TypeError,
    ways=("train_step",),
)
def test_array(run):
    model = run.start(Scaled())
    inputs = {"x": numbers(4, 3).numpy(), "scales": [1.0, 2.0, 3.0, 4.0]}
    run.step(inputs, classes(4), nn.CrossEntropyLoss(), sgd(model))


# ---- the user's own split


def graph_batch(num_graphs, first=0):
    """Return graphs of 2 to 4 nodes."""
    graphs = range(first, first + num_graphs)
    return Batch.from_data_list(
        [Data(numbers(2 + n % 3, 3, seed=n), torch.tensor([[0, 1], [1, 0]]), torch.tensor([n % 2])) for n in graphs]
    )


class GraphNet(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(7)
        self.layer = nn.Linear(3, 2, dtype=F64)

    def forward(self, graphs):
        nodes = graphs.x.index_add(0, graphs.edge_index[1], graphs.x[graphs.edge_index[0]])
        sums = torch.zeros(graphs.num_graphs, 3, dtype=F64).index_add(0, graphs.batch, nodes)
        return self.layer(sums)


def split_graphs(batch, start, stop):
    graphs, _ = batch
    part = Batch.from_data_list(graphs.to_data_list()[start:stop])
    return (part, part.y), part.num_graphs


@works("batches of graphs as torch_geometric's, with `split=`")
def test_graphs(run):
    model = run.start(GraphNet(), split=split_graphs)
    for size in (5, 4, 3):
        graphs = graph_batch(size)
        run.step(graphs, graphs.y, nn.CrossEntropyLoss(), sgd(model), weight=len)


@works("batches of graphs with `split=` and `microbatches=2`", ways=("train_step",))
def test_graphs_in_microbatches(run):
    model = run.start(GraphNet(), split=split_graphs)
    graphs = graph_batch(5)
    run.step(graphs, graphs.y, nn.CrossEntropyLoss(), sgd(model), microbatches=2)


@refused(
    "a `split=` whose parts do not add up to the batch",
    r"split\(batch, 0, \d\) returned \d sample.s. of a batch of 5, not \d: the parts of a batch must add up to the",
    instead="return the samples start to stop, and their number",
    ways=("train_step",),
    ranks=(2, 3),
)
def test_parts_that_do_not_add_up(run):
    def split(batch, start, stop):
        inputs, targets = (tensor[start : None if stop is None else stop + 1] for tensor in batch)
        return (inputs, targets), len(inputs)

    model = run.start(linear(), split=split)
    run.step(numbers(5, 3), classes(5), nn.CrossEntropyLoss(), sgd(model))


class Detector(nn.Module):
    """Model of torchvision's kind: images and targets in, losses out."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(9)
        self.layer = nn.Linear(3, 4, dtype=F64)

    def forward(self, images, targets):
        losses = []
        for image, target in zip(images, targets, strict=True):
            box = self.layer(image.flatten(1).mean(1))
            losses.append((box - target["boxes"]).square().mean())
        return torch.stack(losses)


def detection_batch(num_images, num_boxes=lambda n: 1 + n):
    images = [numbers(3, 4 + n, 5, seed=n) for n in range(num_images)]
    return images, [{"boxes": numbers(num_boxes(n), 4, seed=n), "id": n} for n in range(num_images)]


def mean_of_losses(outputs, _):
    return outputs.mean()


@works("detection: a list of images and a list of dicts")
def test_detection(run):
    model = run.start(Detector())
    for size in (5, 3):
        images, targets = detection_batch(size)
        run.step((images, targets), targets, mean_of_losses, sgd(model), weight=len)


@works("detection: as many images as channels, and as many boxes")
def test_detection_where_sizes_agree(run):
    model = run.start(Detector())
    images, targets = detection_batch(3, lambda n: 3)
    run.step((images, targets), targets, mean_of_losses, sgd(model), weight=len)


# ---- the dimension of the samples


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.lstm, self.layer = nn.LSTM(3, 4, dtype=F64), nn.Linear(4, 2, dtype=F64)

    def forward(self, x, state=None):
        return self.layer(self.lstm(x, state)[0]).flatten(0, 1)


def over_time(outputs, targets):
    return F.cross_entropy(outputs, targets.flatten())


@works("inputs [time, batch, features] and targets [time, batch], with `batch_dim=1`")
def test_batch_dim(run):
    model = run.start(Recurrent(), batch_dim=1)
    for size in (5, 3):
        targets = torch.arange(6 * size).view(6, size) % 2
        run.step(numbers(6, size, 3), targets, over_time, sgd(model), weight=lambda part: part.size(1))


@works(
    "a recurrent state (h, c) beside [time, batch, features], with `batch_dim=1` and `microbatches=2`",
    ways=("train_step",),
)
def test_batch_dim_of_state(run):
    model = run.start(Recurrent(), batch_dim=1)
    state = numbers(1, 5, 4, seed=1), numbers(1, 5, 4, seed=2)
    run.step((numbers(6, 5, 3), state), torch.arange(30).view(6, 5) % 2, over_time, sgd(model), microbatches=2)
