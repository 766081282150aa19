# SPDX-License-Identifier: Apache-2.0
"""Samples of a batch: which of its values they are, how many there are, and parts of the batch."""

import collections
import re
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from distributed_trainer.data.samples import NoSamples, SampleRule

Pair = collections.namedtuple("Pair", ["image", "label"])


def ones(*shape):
    return torch.ones(*shape)


def count(rule=None, **roots):
    return (rule or SampleRule()).count(roots)


def part(start, stop, rule=None, **roots):
    rule = rule or SampleRule()
    return rule.part(roots, rule.count(roots), start, stop)


@dataclass
class Labels:
    names: list[str]
    value: torch.Tensor


# ---- the number of samples


@pytest.mark.parametrize(
    ("inputs", "number"),
    [
        (ones(3), 3),
        (ones(0, 2), 0),
        ({"x": ones(10, 3), "options": [ones(10), None, 0.5]}, 10),
        ((ones(2, 3), ones(2, 4)), 2),
        (Pair(ones(5), ["a"] * 5), 5),
        (Labels(["a", "b"], ones(2)), 2),
        ({"images": [ones(3, 4, 4), ones(3, 5, 5)], "y": ones(2)}, 2),
        ({"images": [ones(3, 4, 4)] * 4, "boxes": [ones(2, 4), ones(1, 4), ones(5, 4), ones(2, 4)]}, 4),
        ({"dicts": [{"a": ones(3)}] * 3}, 3),
        ({"pair": (ones(5), ones(5)), "y": ones(5)}, 5),
        ({"arrays": [np.ones(3)] * 4}, 4),
        ({"tokens": [[1, 2], [3], [4, 5, 6]]}, 3),
        ({"columns": [("a", "b", "c"), (1, 2, 3)], "y": ones(3)}, 3),
        ({"none": [None, None, None]}, 3),
        ({"scalars": [torch.tensor(1.0)] * 4}, 4),
        ({"nothing": [], "x": ones(3)}, 3),
        ({"nothing": NoSamples([1])}, 0),
    ],
)
def test_count(inputs, number):
    """The number of samples is found in tensors, lists of samples, and structures of them."""
    assert count(inputs=inputs) == number


def test_different_sizes_are_listed():
    """The error lists every tensor and list with its path, so that the wrong one can be seen."""
    inputs = {"ids": ones(10, 2), "pair": Pair(ones(10), ones(8)), 3: ones(10), "names": ["a"] * 7}
    with pytest.raises(ValueError, match="same first dimension") as error:
        count(inputs=inputs, targets=[ones(9)])
    listed = (
        'inputs["pair"].image: 10, inputs["pair"].label: 8, inputs[3]: 10, inputs["names"]: 7 entries, targets[0]: 9.'
    )
    assert str(error.value).endswith(f'but have inputs["ids"]: 10, {listed}')
    with pytest.raises(
        ValueError, match=r"same first dimension, the number of samples, but have inputs: 3, targets: 4"
    ):
        count(inputs=ones(3), targets=ones(4))


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ({"a": None}, ValueError, "inputs and targets contain no tensor"),
        ([torch.tensor(1.0)], ValueError, r"inputs\[0\] is a 0-dimensional tensor.*Python number.*unsqueeze"),
        ({"a": np.ones(3)}, TypeError, r'inputs\["a"\] is a ndarray.*torch.as_tensor.*split='),
        (nn.Linear(1, 1), TypeError, "inputs is a Linear, which cannot be cut"),
        (ones(3).to_sparse(), TypeError, "inputs is a sparse tensor"),
        (torch.nested.nested_tensor([ones(3), ones(2)]), TypeError, "inputs is a nested tensor"),
        (nn.utils.rnn.pack_sequence([ones(3)]), TypeError, "inputs is a PackedSequence"),
        ({"a": collections.deque([1, 2])}, TypeError, r'inputs\["a"\] is a deque, which cannot be cut.*pass a list'),
        ({"a": iter([1])}, TypeError, "is a list_iterator"),
        (["a", "b"], ValueError, r"inputs is a list without tensors, .* pass a tuple with one list: \(inputs,\)"),
    ],
)
def test_what_cannot_be_counted(inputs, error, message):
    """Batches without a size are refused; the error names the path and the remedy."""
    with pytest.raises(error, match=message):
        count(inputs=inputs, targets="text")


def test_two_numbers():
    """If two numbers of samples fit all values, the error says what to pass."""
    batch = ((ones(5), ones(5)), (ones(5), ones(5)))
    with pytest.raises(
        ValueError, match=r"may have 2 or 5 samples. batch\[0\] may be a list .* pass a dict or a NamedT"
    ):
        count(batch=batch)
    assert count(inputs=batch[0], targets=batch[1]) == 5  # the model's arguments are no list of samples


def test_whole_batches():
    """A tuple or list that is a whole batch is a structure, unless it holds dicts or plain values alone."""
    assert count(batch=[ones(2, 3), ones(2)]) == 2
    assert count(batch=[{"x": ones(3)}, {"x": ones(3)}]) == 2
    assert count(batch=["a", "b", "c"]) == 3
    with pytest.raises(ValueError, match=r"batch\[0\]: 5, batch\[1\]: 4"):
        count(batch=(ones(5), ones(4)))
    with pytest.raises(TypeError, match=r"batch\[0\] is a ndarray"):
        count(batch=(np.ones(2), ones(2)))


def test_uncut():
    """The targets say the number of samples if the batch as a whole does not; or nothing says it."""
    rule = SampleRule()
    assert rule.count_uncut((ones(9), ones(4)), ones(4)) == 4
    assert rule.count_uncut(ones(3), ones(3)) == 3
    assert rule.count_uncut(object(), None) is None
    assert rule.count_uncut(object(), [ones(3), ones(4)]) == 2
    assert rule.count_uncut(ones(2), (ones(3), ones(4))) == 2
    assert rule.count_uncut((ones(9), ones(3)), (ones(9), ones(3))) is None  # not two samples


# ---- parts


def test_parts_are_views_in_the_same_structure():
    """Parts of tensors are views; shared values do not change; lists of samples keep their type."""
    x = torch.arange(20).view(10, 2)
    inputs, targets = part(7, 10, inputs={"x": x, "options": [x, None, 0.5]}, targets=(tuple("abcdefghij"), "text"))
    assert inputs["x"].data_ptr() == x[7].data_ptr()
    assert inputs["options"][1:] == [None, 0.5]
    assert targets == (("h", "i", "j"), "text")
    labels = part(1, 3, inputs=Labels(["a", "b", "c"], torch.arange(3)))[0]
    assert (type(labels), labels.names, labels.value.tolist()) == (Labels, ["b", "c"], [1, 2])
    images = [ones(3, 4 + number, 4) for number in range(4)]
    own, labels = part(1, 3, inputs={"images": images}, targets=torch.arange(4))
    assert [id(image) for image in own["images"]] == [id(image) for image in images[1:3]]
    assert labels.tolist() == [1, 2]


def test_batch_dim():
    """Dimension `batch_dim` counts the samples, or else the last one."""
    rule = SampleRule(batch_dim=1)
    x, y, z = torch.arange(24).view(4, 3, 2), torch.arange(12).view(4, 3), torch.arange(3)
    assert count(rule, inputs=x, targets=y) == count(rule, inputs=(x, z), targets=y) == 3
    own, (labels, numbers) = part(1, 3, rule, inputs=x, targets=(y, z))
    assert torch.equal(own, x[:, 1:3])
    assert torch.equal(labels, y[:, 1:3])
    assert numbers.tolist() == [1, 2]
    with pytest.raises(ValueError, match="the same size in dimension 1, the number of samples, but have inputs: 3"):
        count(rule, inputs=x, targets=torch.ones(3, 7))
    assert rule.dummy(x[:, :0], y[:, :0])[0].shape == (4, 1, 2)


def test_both_readings():
    """Where a list may be samples or tensors of all samples, its kinds, earlier batches or a list of dicts decide."""
    images = [ones(3, 4, 4) for _ in range(3)]
    text = re.escape('inputs["images"] may be a list of samples, or hold tensors of all samples, since its length and')
    with pytest.raises(ValueError, match=text):
        part(0, 2, inputs={"images": images}, targets=ones(3))
    own = part(0, 1, inputs={"pair": (ones(2, 3), torch.arange(2)), "x": ones(2)})[0]
    assert [len(tensor) for tensor in own["pair"]] == [1, 1]
    with pytest.raises(ValueError, match=r'inputs\["state"\] may be a list of samples'):
        part(0, 1, inputs={"state": (ones(2), None), "x": ones(2)})

    rule = SampleRule()
    assert len(part(0, 2, rule, inputs={"images": images + images}, targets=ones(6))[0]["images"]) == 2
    assert len(part(0, 2, rule, inputs={"images": images}, targets=ones(3))[0]["images"]) == 2  # as before

    rule = SampleRule()
    part(0, 2, rule, inputs=ones(5), targets=(ones(5), ones(5)))
    own = part(0, 1, rule, inputs=ones(2), targets=(ones(2), ones(2)))[1]
    assert [len(tensor) for tensor in own] == [1, 1]

    dicts = [{"boxes": ones(3, 4)} for _ in range(3)]
    own, targets = part(0, 2, inputs=(images, dicts), targets=dicts)
    assert (len(own[0]), len(own[1]), len(targets)) == (2, 2, 2)


def test_empty_parts():
    """A part without samples remembers one sample of each list, for a dummy."""
    rule = SampleRule()
    x, names = ones(2, 3), ["a", "b"]
    batch = rule.empty({"x": x, "names": names})
    assert (batch["x"].shape, batch["names"]) == ((0, 3), [])
    inputs, targets, number = rule.dummy(batch, x[:0])
    assert (inputs["x"].tolist(), inputs["names"], targets.shape, number) == ([[0, 0, 0]], ["a"], (1, 3), 1)
    inputs, targets, number = rule.dummy(x, names, 5)
    assert (len(inputs), targets, number) == (2, names, 2)
    assert rule.dummy((x, ones(5)), ones(3))[2] == 0  # the batch as it is


# ---- the user's function


def test_split():
    """The user's function takes the place of all rules; what it returns is checked."""
    rule = SampleRule(split=lambda batch, start, stop: (batch[start:stop], len(batch[start:stop])))
    assert count(rule, batch="abcde") == 5
    assert part(1, 3, rule, batch="abcde") == ("bc",)
    with pytest.raises(TypeError, match="no parts without samples"):
        rule.empty("abc")

    def pair(batch, start, stop):
        inputs, targets = batch
        return (inputs[start:stop], targets), len(inputs[start:stop])

    assert part(1, 2, SampleRule(split=pair), inputs="abc", targets=None) == ("b", None)
    for result, text in [
        ("abc", r"must return \(part, number of samples\), not str"),
        (("abc", "3"), r"must return \(part, number of samples\), not \(str, str\)"),
    ]:
        with pytest.raises(TypeError, match=text):
            count(SampleRule(split=lambda *_: result), batch="abc")  # noqa: B023
    with pytest.raises(TypeError, match=r"must return \(\(inputs, targets\), number of samples\)"):
        count(SampleRule(split=lambda *_: ("abc", 3)), inputs="abc", targets=None)
    wrong = SampleRule(split=lambda batch, start, stop: (batch, 3))
    with pytest.raises(ValueError, match=r"split\(batch, 0, 2\) returned 3 sample\(s\) of a batch of 3, not 2"):
        part(0, 2, wrong, batch="abc")
