# SPDX-License-Identifier: Apache-2.0
"""Trees of batches, and the fingerprint that shows whether batches differ."""

import collections
import dataclasses
import itertools
import re
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from torch import nn

from distributed_trainer.data.batch import call_model, holds_tensors, map_tensors, to_device
from distributed_trainer.data.fingerprint import FINGERPRINT_BYTES, compare_fingerprints, fingerprint
from distributed_trainer.data.split import part_bounds

Pair = collections.namedtuple("Pair", ["image", "label"])


class Encoding(collections.UserDict):
    """Mapping like a tokenizer's batch: it has another attribute, and its constructor takes another argument."""

    def __init__(self, data, encodings):
        super().__init__(data)
        self.encodings = encodings


class Fixed(collections.abc.Mapping):
    """Mapping that can be neither updated nor made from a dict."""

    def __init__(self, a, b):
        self.items_ = {"a": a, "b": b}

    def __getitem__(self, key):
        return self.items_[key]

    def __iter__(self):
        return iter(self.items_)

    def __len__(self):
        return 2


def batch(num_samples=10):
    generator = torch.Generator().manual_seed(num_samples)
    images = torch.randn(num_samples, 3, 4, generator=generator)
    labels = torch.randint(10, (num_samples,), generator=generator)
    return {"inputs": {"x": images, "options": [labels, None, 0.5]}, "targets": (labels,)}


# ---- parts


@pytest.mark.parametrize(
    ("num_samples", "world_size"), list(itertools.product([0, 1, 2, 3, 4, 5, 10, 10_007], [1, 2, 3, 4, 7]))
)
def test_part_bounds(num_samples, world_size):
    """Parts are contiguous, in rank order, at most one sample apart, the longer parts first."""
    bounds = [part_bounds(num_samples, rank, world_size) for rank in range(world_size)]
    assert bounds[0][0] == 0
    assert bounds[-1][1] == num_samples
    assert all(one[1] == other[0] for one, other in itertools.pairwise(bounds))
    sizes = [stop - start for start, stop in bounds]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] - sizes[-1] <= 1


def middle(tree):
    """Return the same structure with elements 1 and 2 of each tensor."""
    return map_tensors(lambda tensor: tensor[1:3], tree)


def test_containers_keep_their_type():
    """Named tuples, ordered dicts, and mappings with other attributes keep their types."""
    tensor = torch.arange(4)
    pair = middle(Pair(tensor, "label"))
    assert type(pair) is Pair
    assert pair.image.tolist() == [1, 2]
    for mapping in (
        collections.OrderedDict(a=tensor),
        collections.defaultdict(list, a=tensor),
        types.MappingProxyType({"a": tensor}),
    ):
        part = middle(mapping)
        assert type(part) is type(mapping)
        assert part["a"].tolist() == [1, 2]
        assert mapping["a"] is tensor
    encoding = Encoding({"a": tensor}, encodings="kept")
    part = middle(encoding)
    assert (type(part), part.encodings, part["a"].tolist()) == (Encoding, "kept", [1, 2])
    assert encoding["a"] is tensor


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    image: torch.Tensor
    label: str
    area: float = dataclasses.field(init=False, default=1.0)


class Output(collections.OrderedDict):
    """Mapping as transformers' ModelOutput, whose values are attributes, too, and which refuses `update`."""

    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        object.__setattr__(self, key, value)

    def update(self, *_):
        raise Exception("You cannot use update")  # as ModelOutput does


def test_dataclasses():
    """A dataclass is made again field by field, without its constructor; so is a ModelOutput."""
    sample = Sample(torch.arange(4), "label")
    part = middle(sample)
    assert (type(part), part.image.tolist(), part.label, part.area) == (Sample, [1, 2], "label", 1.0)
    assert sample.image.tolist() == [0, 1, 2, 3]
    output = Output()
    output["logits"] = torch.arange(4)
    part = middle(output)
    assert type(part) is Output
    assert part.logits is part["logits"]
    assert part.logits.tolist() == [1, 2]


class Slotted:
    __slots__ = ("__weakref__", "value")

    def __init__(self, value):
        self.value = value


def test_holds_tensors():
    """Tensors and arrays are found in elements and attributes of objects, to some depth."""
    tensor = torch.ones(1)
    packed = nn.utils.rnn.pack_sequence([torch.ones(2)])
    plain = types.SimpleNamespace(name="a", size=3)
    for tree in (tensor, [[{"a": (tensor,)}]], types.SimpleNamespace(a=[tensor]), Slotted(tensor), np.ones(2), packed):
        assert holds_tensors(tree), tree
    for tree in (1, "a", None, [1, {"a": None}], plain, Slotted("a"), nn.Linear, torch, len, torch.float32):
        assert not holds_tensors(tree), tree


def test_other_mappings_become_dicts():
    """A mapping whose type cannot be made again becomes a dict."""
    part = middle(Fixed(torch.arange(4), "b"))
    assert type(part) is dict
    assert part["a"].tolist() == [1, 2]
    assert part["b"] == "b"


def test_to_device():
    """Tensors move to the device; the structure and other leaves stay the same."""
    moved = to_device(batch(), "meta")
    assert moved["inputs"]["x"].device.type == "meta"
    assert moved["inputs"]["options"][1:] == [None, 0.5]
    same = batch()
    assert to_device(same, torch.device("cpu"))["targets"][0] is same["targets"][0]


def test_call_model():
    """A mapping becomes keyword arguments, a tuple or list positional arguments, a tensor one argument."""

    def model(a, b=1):
        return (a, b)

    assert call_model(model, {"b": 3, "a": 2}) == (2, 3)
    assert call_model(model, (2, 3)) == call_model(model, [2, 3]) == call_model(model, Pair(2, 3)) == (2, 3)
    assert call_model(model, 2) == (2, 1)


# ---- fingerprint


def compare(*batches, **options):
    fingerprints = [fingerprint(roots, **options) for roots in batches]
    assert {len(one) for one in fingerprints} == {FINGERPRINT_BYTES}
    messages = {compare_fingerprints(fingerprints, roots, **options) for roots in batches}
    if all(one[:4] == fingerprints[0][:4] for one in fingerprints):  # the same structure has the same text
        assert len(messages) == 1
    return messages.pop()


def changed(path, change):
    roots = batch()
    tensor = roots["inputs"]["x"] if path == "x" else roots["inputs"]["options"][0]
    change(tensor)
    return roots


def test_equal_batches():
    """Equal batches have equal fingerprints: with NaN and infinity, no samples, many tensors, different layouts."""
    assert compare(batch(), batch(), batch()) is None
    assert compare({"inputs": torch.ones(0, 3)}, {"inputs": torch.ones(0, 3)}) is None
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0])
    assert compare({"inputs": special}, {"inputs": special.clone()}) is None
    assert compare({"inputs": special}, {"inputs": special * (1 + 1e-6)}) is None
    many = {"inputs": [torch.ones(3, 2)] * 100}
    assert compare(many, many) is None
    images = torch.randn(4, 3, 5, 5)
    assert compare({"inputs": images}, {"inputs": images.to(memory_format=torch.channels_last)}) is None


@pytest.mark.parametrize(
    "dtype",
    [getattr(torch, name) for name in "float16 bfloat16 float64 complex64 uint8 uint16 int32 int64".split()],
)
def test_dtypes(dtype):
    """Tensors of every dtype are read, also dtypes that NumPy lacks; gradients do not matter."""
    one = torch.arange(1, 601).view(200, 3).to(dtype)
    other = one.flip(0)
    assert compare({"inputs": one}, {"inputs": one.t().contiguous().t()}) is None
    assert "rank 1 has a different batch than rank 0: inputs[" in compare({"inputs": one}, {"inputs": other})
    if dtype.is_floating_point:
        assert compare({"inputs": one}, {"inputs": one.clone().requires_grad_()}) is None


def test_floats_have_a_tolerance():
    """The last bits of floats may differ, relative to the tensor's values; larger differences are found."""
    assert compare(batch(), changed("x", lambda x: x.add_(1e-5))) is None
    assert "rank 1" in compare(batch(), changed("x", lambda x: x.add_(0.1)))
    tiny = {"inputs": torch.ones(20) * 1e-7}, {"inputs": torch.ones(20) * 2e-7}
    assert compare(*tiny) is None
    large = {"inputs": torch.ones(20) * 1e7}, {"inputs": torch.ones(20) * 1.0001e7}
    assert compare(*large) is None
    assert compare({"inputs": torch.ones(20) * 1e7}, {"inputs": torch.ones(20) * 1.01e7}) is not None
    assert compare({"inputs": torch.ones(3)}, {"inputs": torch.tensor([1.0, float("nan"), 1.0])}) is not None


def test_integers_have_none():
    """A difference in one element of a small integer tensor is found, though it is within the tolerance of floats."""
    one, other = torch.full((3,), 1_000_000), torch.tensor([1_000_000, 1_000_000, 1_000_001])
    assert "inputs[2] is 1000000 on rank 0 and 1000001 on rank 1" in compare({"inputs": one}, {"inputs": other})
    large = {"inputs": torch.full((250,), 1_000_000)}
    other = {"inputs": large["inputs"].clone()}
    other["inputs"][2] += 1
    assert compare(large, other).startswith("rank 1 has a different batch than rank 0: inputs has checksum ")
    message = compare(batch(), batch(), changed("labels", lambda labels: labels[3].sub_(20)))
    value = batch()["targets"][0][3].item()
    expected = f'inputs["options"][0][3] is {value} on rank 0 and {value - 20} on rank 2. Every rank must pass the same'
    assert message.startswith(f"rank 2 has a different batch than rank 0: {expected} global batch: give the loader ")
    assert message.endswith("use split_batches=False or trainer.batches(loader).")


def test_reordered_samples_are_noticed():
    """A loader without a seed gives the same samples in another order, which is found."""
    images = torch.zeros(36, 1, 8, 8)  # a fixed stride would meet the same pixel of each image
    images[:, :, 2:6, 2:6] = torch.rand(36, 1, 4, 4)  # and the border is the same in all images
    assert "inputs[" in compare({"inputs": images}, {"inputs": images.roll(1, 0)})
    tokens = torch.randint(50_000, (64, 1024))
    assert "inputs[" in compare({"inputs": tokens}, {"inputs": tokens.roll(1, 0)})


@pytest.mark.parametrize(
    ("one", "other", "what"),
    [
        (
            torch.ones(4, 2),
            torch.ones(3, 2),
            "rank 0 has inputs float32[4, 2], rank 1 has inputs float32[3, 2]",
        ),
        (torch.ones(4), torch.ones(4).double(), "rank 0 has inputs float32[4], rank 1 has inputs float64[4]"),
        ([torch.ones(1)], {"a": torch.ones(1)}, 'inputs[0] float32[1], rank 1 has inputs["a"] float32[1]'),
        ([torch.ones(1), 1], [torch.ones(1), 2], "rank 0 has inputs[1] 1, rank 1 has inputs[1] 2"),
        ([torch.ones(1)], [torch.ones(1)] * 2, "inputs[0] float32[1], inputs[1] float32[1]."),
        (
            [torch.ones(1)] * 40,
            [torch.ones(1)] * 41,
            "their structures differ after inputs[0] float32[1], inputs[1]",
        ),
    ],
)
def test_structures(one, other, what):
    """Differences in shapes, dtypes, nesting and plain values are found; the message shows both versions."""
    assert what in compare({"inputs": one}, {"inputs": other})


def test_lists():
    """Lists of plain values are compared by their text, floats within a tolerance, lists of tensors one by one."""
    names = ["a", "b", None]
    assert compare({"inputs": names}, {"inputs": list(names)}) is None
    text = compare({"inputs": names}, {"inputs": ["a", "c", None]})
    assert re.search(r"rank 0 has inputs 3 values with checksum \w{8}, rank 1 has inputs 3 values with checksum", text)
    assert compare({"inputs": [1.0, 2]}, {"inputs": [1.0 + 1e-9, 2]}) is None
    assert "inputs[1] is 2 on rank 0 and 3 on rank 1" in compare({"inputs": [1.0, 2.0]}, {"inputs": [1.0, 3.0]})
    dicts = [{"boxes": torch.zeros(2, 4), "id": number} for number in range(3)]
    assert compare({"targets": dicts}, {"targets": [dict(one) for one in dicts]}) is None
    assert 'rank 0 has targets[1]["id"] 1' in compare({"targets": dicts}, {"targets": [dicts[0], dicts[0], dicts[2]]})


def test_objects():
    """Tensors in attributes of objects are compared, too; objects without tensors by their type."""
    one, other = (types.SimpleNamespace(x=torch.arange(3) + number, name=object()) for number in range(2))
    assert compare({"inputs": one}, {"inputs": types.SimpleNamespace(x=torch.arange(3), name=1)}) is None
    assert "inputs.x[0] is 0 on rank 0 and 1 on rank 1" in compare({"inputs": one}, {"inputs": other})
    assert compare({"inputs": object()}, {"inputs": object()}) is None


def test_all_ranks_that_differ_are_named():
    """The error names all ranks whose batch differs from rank 0's."""
    other = changed("x", torch.Tensor.zero_)
    assert compare(batch(), other, batch(), other).startswith("ranks 1, 3 have a different batch than rank 0: ")


def test_devices_are_read_on_request_only():
    """Device tensors are read only on request. A meta tensor serves as a device tensor here: reading it would raise."""
    on_device = {"inputs": torch.ones(3, device="meta"), "targets": torch.ones(3)}
    assert compare(on_device, on_device) is None
    assert "inputs float32[3] on meta" in compare({"inputs": torch.ones(3), "targets": torch.ones(3)}, on_device)
    with pytest.raises((NotImplementedError, RuntimeError)):
        fingerprint(on_device, read_devices=True)


@pytest.mark.slow
def test_same_in_every_process():
    """Fingerprints do not use Python's hash, whose salt differs between processes."""
    program = (
        "import torch; from distributed_trainer.data.fingerprint import fingerprint;"
        "print(fingerprint({'inputs': {'a': torch.arange(3), 'b': 'text'}}).hex())"
    )
    printed = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path}; {program}"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout.strip()
    assert printed == fingerprint({"inputs": {"a": torch.arange(3), "b": "text"}}).hex()
