# SPDX-License-Identifier: Apache-2.0
"""Cutting of batches, and the fingerprint that tells different ones apart."""

import collections
import itertools
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from torch import nn

from distributed_trainer.data import (
    FINGERPRINT_BYTES,
    batch_size,
    call_model,
    compare_fingerprints,
    fingerprint,
    part_bounds,
    slice_batch,
    to_device,
)

Pair = collections.namedtuple("Pair", ["image", "label"])


class Encoding(collections.UserDict):
    """Like a tokenizer's batch: a mapping with more to it, whose constructor takes something else."""

    def __init__(self, data, encodings):
        super().__init__(data)
        self.encodings = encodings


class Fixed(collections.abc.Mapping):
    """A mapping that can be neither updated nor made from a dict."""

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


# ---- size


def test_batch_size():
    """Any nesting, any dtype, zero samples too."""
    assert batch_size(batch()) == 10
    assert batch_size({"inputs": torch.ones(3)}) == 3
    assert batch_size({"inputs": torch.ones(0, 2)}) == 0


def test_different_sizes_are_listed():
    """Every tensor with its path, so that the odd one is seen."""
    inputs = {"ids": torch.ones(10, 2), "pair": Pair(torch.ones(10), torch.ones(8)), 3: torch.ones(10)}
    with pytest.raises(ValueError, match="same first dimension") as error:
        batch_size({"inputs": inputs, "targets": [torch.ones(9)]})
    listed = 'inputs["ids"]: 10, inputs["pair"].image: 10, inputs["pair"].label: 8, inputs[3]: 10, targets[0]: 9.'
    assert str(error.value).endswith(listed)


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ({"a": None}, ValueError, "inputs and targets contain no tensor"),
        ([torch.tensor(1.0)], ValueError, r"inputs\[0\] is a 0-dimensional tensor.*Python number.*unsqueeze"),
        ({"a": np.ones(3)}, TypeError, r'inputs\["a"\] is a ndarray.*torch.as_tensor'),
        (nn.Linear(1, 1), TypeError, "inputs is a Linear, which cannot be cut"),
    ],
)
def test_what_has_no_size(inputs, error, message):
    """Refused by path, with what to do."""
    with pytest.raises(error, match=message):
        batch_size({"inputs": inputs, "targets": "text"})


# ---- parts


@pytest.mark.parametrize(
    ("num_samples", "world_size"), list(itertools.product([0, 1, 2, 3, 4, 5, 10, 10_007], [1, 2, 3, 4, 7]))
)
def test_part_bounds(num_samples, world_size):
    """Contiguous, in rank order, at most one apart, the longer ones first: rank 0 is empty last of all."""
    bounds = [part_bounds(num_samples, rank, world_size) for rank in range(world_size)]
    assert bounds[0][0] == 0
    assert bounds[-1][1] == num_samples
    assert all(one[1] == other[0] for one, other in itertools.pairwise(bounds))
    sizes = [stop - start for start, stop in bounds]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] - sizes[-1] <= 1


def test_slices_are_views_in_the_same_structure():
    """Nothing is copied; what is no tensor is passed on."""
    whole = batch()
    part = slice_batch(whole, 7, 10)
    assert part.keys() == whole.keys()
    assert part["inputs"]["x"].data_ptr() == whole["inputs"]["x"][7].data_ptr()
    assert part["inputs"]["options"][1:] == [None, 0.5]
    assert torch.equal(part["targets"][0], whole["targets"][0][7:10])
    assert batch_size(slice_batch(whole, 3, 3)) == 0
    assert batch_size(whole) == 10


def test_containers_keep_their_type():
    """Named tuples, ordered dicts, and mappings that hold more than their items."""
    tensor = torch.arange(4)
    pair = slice_batch(Pair(tensor, "label"), 1, 3)
    assert type(pair) is Pair
    assert pair.image.tolist() == [1, 2]
    for mapping in (
        collections.OrderedDict(a=tensor),
        collections.defaultdict(list, a=tensor),
        types.MappingProxyType({"a": tensor}),
    ):
        part = slice_batch(mapping, 1, 3)
        assert type(part) is type(mapping)
        assert part["a"].tolist() == [1, 2]
        assert mapping["a"] is tensor
    encoding = Encoding({"a": tensor}, encodings="kept")
    part = slice_batch(encoding, 1, 3)
    assert (type(part), part.encodings, part["a"].tolist()) == (Encoding, "kept", [1, 2])
    assert encoding["a"] is tensor


def test_other_mappings_become_dicts():
    """A type that cannot be rebuilt does not stop anyone."""
    part = slice_batch(Fixed(torch.arange(4), "b"), 1, 3)
    assert type(part) is dict
    assert part["a"].tolist() == [1, 2]
    assert part["b"] == "b"


def test_to_device():
    """Tensors move, structure and other leaves stay."""
    moved = to_device(batch(), "meta")
    assert moved["inputs"]["x"].device.type == "meta"
    assert moved["inputs"]["options"][1:] == [None, 0.5]
    same = batch()
    assert to_device(same, torch.device("cpu"))["targets"][0] is same["targets"][0]


def test_call_model():
    """A mapping's items are keywords, a tuple's or list's elements positional, a tensor is one argument."""

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
    if all(one[:4] == fingerprints[0][:4] for one in fingerprints):  # the same structure: the same text
        assert len(messages) == 1
    return messages.pop()


def changed(path, change):
    roots = batch()
    tensor = roots["inputs"]["x"] if path == "x" else roots["inputs"]["options"][0]
    change(tensor)
    return roots


def test_equal_batches():
    """Also with NaN and infinity, no samples, many tensors, and layouts that differ."""
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
    """Every dtype is read, those too that NumPy lacks, and gradients do not matter."""
    one = torch.arange(1, 601).view(200, 3).to(dtype)
    other = one.flip(0)
    assert compare({"inputs": one}, {"inputs": one.t().contiguous().t()}) is None
    assert "rank 1 has another batch than rank 0: inputs[" in compare({"inputs": one}, {"inputs": other})
    if dtype.is_floating_point:
        assert compare({"inputs": one}, {"inputs": one.clone().requires_grad_()}) is None


def test_floats_have_a_tolerance():
    """Last bits may differ, by the size of the tensor's values; more may not."""
    assert compare(batch(), changed("x", lambda x: x.add_(1e-5))) is None
    assert "rank 1" in compare(batch(), changed("x", lambda x: x.add_(0.1)))
    tiny = {"inputs": torch.ones(20) * 1e-7}, {"inputs": torch.ones(20) * 2e-7}
    assert compare(*tiny) is None
    large = {"inputs": torch.ones(20) * 1e7}, {"inputs": torch.ones(20) * 1.0001e7}
    assert compare(*large) is None
    assert compare({"inputs": torch.ones(20) * 1e7}, {"inputs": torch.ones(20) * 1.01e7}) is not None
    assert compare({"inputs": torch.ones(3)}, {"inputs": torch.tensor([1.0, float("nan"), 1.0])}) is not None


def test_integers_have_none():
    """One element of a small tensor is enough, though neighbours would pass as floats."""
    one, other = torch.full((3,), 1_000_000), torch.tensor([1_000_000, 1_000_000, 1_000_001])
    assert "inputs[2] is 1000000 on rank 0 and 1000001 on rank 1" in compare({"inputs": one}, {"inputs": other})
    large = {"inputs": torch.full((250,), 1_000_000)}
    other = {"inputs": large["inputs"].clone()}
    other["inputs"][2] += 1
    assert compare(large, other).startswith("rank 1 has another batch than rank 0: inputs has checksum ")
    message = compare(batch(), batch(), changed("labels", lambda labels: labels[3].sub_(20)))
    value = batch()["targets"][0][3].item()
    expected = f'inputs["options"][0][3] is {value} on rank 0 and {value - 20} on rank 2. Every rank must pass the same'
    assert message.startswith(f"rank 2 has another batch than rank 0: {expected} global batch: seed the loader alike")
    assert message.endswith("use split_batches=False or trainer.batches(loader).")


def test_reordered_samples_are_noticed():
    """What an unseeded loader does: the same samples in another order."""
    images = torch.zeros(36, 1, 8, 8)  # a fixed stride would meet the same pixel of each
    images[:, :, 2:6, 2:6] = torch.rand(36, 1, 4, 4)  # and the border says nothing
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
    """Shapes, dtypes, nesting and plain values, all told in both versions."""
    assert what in compare({"inputs": one}, {"inputs": other})


def test_all_ranks_that_differ_are_named():
    """Rank 0 is the measure."""
    other = changed("x", torch.Tensor.zero_)
    assert compare(batch(), other, batch(), other).startswith("ranks 1, 3 have another batch than rank 0: ")


def test_devices_are_read_on_request_only():
    """A meta tensor stands for an accelerator's: reading it would raise."""
    on_device = {"inputs": torch.ones(3, device="meta"), "targets": torch.ones(3)}
    assert compare(on_device, on_device) is None
    assert "inputs float32[3] on meta" in compare({"inputs": torch.ones(3), "targets": torch.ones(3)}, on_device)
    with pytest.raises((NotImplementedError, RuntimeError)):
        fingerprint(on_device, read_devices=True)


def test_same_in_every_process():
    """Python salts its own hash, so two processes would not agree on that."""
    program = (
        "import torch; from distributed_trainer.data import fingerprint;"
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
