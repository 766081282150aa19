# SPDX-License-Identifier: Apache-2.0
"""Run the targets of fuzz.py with the inputs that it has kept, and with bugs that it has found."""

import json
import re
from pathlib import Path

import fuzzed
import pytest

from distributed_trainer import CheckpointError
from distributed_trainer.checkpoint import format, reader

CORPUS = Path(__file__).parent / "corpus"


@pytest.mark.parametrize("name", fuzzed.TARGETS)
def test_kept_inputs(name):
    target, make_seeds = fuzzed.TARGETS[name]
    inputs = [*make_seeds(), *(path.read_bytes() for path in sorted((CORPUS / name).iterdir()))]
    assert len(inputs) > 8
    for data in inputs:
        target(data)


def change_header(contents, change):
    length = int.from_bytes(contents[:8], "little")
    header = json.loads(contents[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + contents[8 + length :]


def first(header):
    return header["optimizer.a"]


def share_place(header):
    header["other"] = header["optimizer.a"]
    header["__metadata__"]["DCP_SHARDING_INFO"] = json.dumps({name: {"saved_offsets": [0, 0]} for name in header})


def move(header):
    offsets = {"optimizer.a": {"saved_offsets": [1, 0]}, "b0": {"saved_offsets": [0]}}
    header["__metadata__"]["DCP_SHARDING_INFO"] = json.dumps(offsets)


# Changes to a checkpoint of two ranks with a tensor in two pieces: the file, and the text that is replaced in it.
CHANGES = {
    "a file outside": (1, lambda content: content["files"].update({"../x.json": {"bytes": 0, "crc32": 0}})),
    "no time": (1, lambda content: content.update(saved_at=float("nan"))),
    "no step": (1, lambda content: content.update(step=-1)),
    "no shape": (1, lambda content: content["tensors"]["optimizer.a"].update(shape=[2, 1 << 62])),
    "another shape": (1, lambda content: content["tensors"]["optimizer.a"].update(shape=[2, 4])),
    "another type": (1, lambda content: content["tensors"]["optimizer.a"].update(dtype="I32")),
    "no such tensor": (1, lambda content: content["states"]["model"].update(state={"$tensor": "optimizer.b"})),
    "a tensor twice": (1, lambda content: content["states"]["model"].update(state=[{"$tensor": "optimizer.a"}] * 2)),
    "an unknown kind": (1, lambda content: content["states"]["model"].update(state={"$odd": []})),
    "a key that is none": (1, lambda content: content["states"]["model"].update(state={"$dict": [[[], 1]]})),
    "a piece less": (1, lambda content: content["files"].pop("rank-00001-1.safetensors")),
    "no file of the rank": (1, lambda content: content["files"].pop("rank-00000.json")),
    "a position that is none": (2, lambda about: about["own"]["position"].update(loaders=[{"epoch": 0}])),
    "no progress": (2, lambda about: about["own"].update(progress=[1])),
    "a place of two": (3, share_place),
    "a place before": (3, lambda header: first(header).update(data_offsets=[-12, 0])),
    "a huge piece": (3, lambda header: first(header).update(shape=[1 << 40, 3], data_offsets=[0, 12 << 40])),
    "pieces that overlap": (3, move),
    "a piece outside": (3, lambda header: first(header).update(shape=[3, 1])),
}


def read(data, folder):
    fuzzed.write(data, folder)
    one = format.Checkpoint(folder)
    one.verify(0, 1)
    one.of_rank(0)
    return [one.state(name) for name in one.content["states"]]


def two_ranks():
    return [*fuzzed.checkpoint_seeds()][1].split(fuzzed.SEPARATOR)


def test_whole(tmp_path):
    [[whole]] = [read(fuzzed.SEPARATOR.join(two_ranks()), tmp_path)]
    assert whole.tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("what", CHANGES)
def test_hostile_checkpoint(tmp_path, what):
    """Hostile checkpoints with right checksums are refused with our error, without reading elsewhere or endlessly."""
    (tmp_path / "x.json").touch()
    folder = tmp_path / "step"
    folder.mkdir()
    parts = two_ranks()
    number, change = CHANGES[what]
    if number == 3:
        parts[3] = change_header(parts[3], change)
    else:
        value = json.loads(parts[number])
        change(value)
        parts[number] = json.dumps(value).encode()
    with pytest.raises(CheckpointError, match=str(folder)):
        read(fuzzed.SEPARATOR.join(parts), folder)


def test_tensor_longer_than_its_file(tmp_path):
    parts = two_ranks()
    content = json.loads(parts[1])
    del content["files"]["rank-00001-1.safetensors"]
    content["tensors"]["optimizer.a"]["shape"] = [1 << 40, 3]
    parts[1] = json.dumps(content).encode()
    parts[3] = change_header(parts[3], lambda header: first(header).update(shape=[1 << 40, 3]))
    with pytest.raises(CheckpointError, match=r"rank-00000-1\.safetensors is damaged"):
        read(fuzzed.SEPARATOR.join(parts), tmp_path)


@pytest.mark.parametrize("length", [1 << 20, 1 << 40, (1 << 64) - 1])
def test_header_longer_than_its_file(tmp_path, length):
    parts = two_ranks()
    parts[3] = length.to_bytes(8, "little") + parts[3][8:]
    with pytest.raises(CheckpointError, match=r"rank-00000-1\.safetensors is damaged"):
        read(fuzzed.SEPARATOR.join(parts), tmp_path)


def test_nested_deeply(tmp_path):
    for depth in (700, 100_000):
        parts = two_ranks()
        parts[1] = parts[1].replace(b'{"$tensor": "optimizer.a"}', b"[" * depth + b"]" * depth)
        with pytest.raises(CheckpointError, match="is damaged"):
            read(fuzzed.SEPARATOR.join(parts), tmp_path)


@pytest.mark.parametrize(
    "state", [b'"MT19937", "@keys", 625', b'"MT19937", "@keys", -1', b'"MT19937", [1], 5', b'"PCG64", "@keys", 5']
)
def test_random_states_that_are_none(tmp_path, state):
    """Invalid random states are refused: NumPy would take any position, and read random numbers from other memory."""
    data = next(iter(fuzzed.checkpoint_seeds()))
    changed, num_changes = re.subn(rb'"MT19937", "@keys", \d+', state, data)
    assert num_changes == 1
    fuzzed.write(changed, tmp_path)
    model, objects, training = fuzzed.make_training()
    before = model.weight.clone()
    with pytest.raises(CheckpointError, match="invalid random states"):
        reader.load(tmp_path, objects, training, fuzzed.OneRank())
    assert model.weight.equal(before)
