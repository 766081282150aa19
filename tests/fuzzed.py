# SPDX-License-Identifier: Apache-2.0
"""What of the Python code is given any bytes (fuzz.py), and what must hold then: an exception that gets out is a bug.

A checkpoint's files lie in one input, in this order, with a separator between them: flags, content of checkpoint.json,
rank-00000.json, rank-00000-1.safetensors, rank-00001.json, rank-00001-1.safetensors. With flag 1 the checksum of the
content is made to fit, with flag 2 lengths and checksums of the files, so that what is behind them is reached.
Random states are long, so names stand for them.
"""

import base64
import contextlib
import copy
import json
import pickle
import random
import shutil
import tempfile
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from distributed_trainer import (
    CheckpointError,
    MismatchError,
    checkpoint,
    host_facts,
    preflight,
    record,
    restoring,
    versions,
)
from distributed_trainer.alignment import random_states, set_random_states
from distributed_trainer.hostfile import place_ranks, read_hostfile
from distributed_trainer.positions import Positions
from distributed_trainer.tensor_files import Part, copy_to_files, pieces_of
from distributed_trainer.training_state import TrainingState, _random_to_json

SEPARATOR = b"\n%%\n"
FILES = ["rank-00000.json", "rank-00000-1.safetensors", "rank-00001.json", "rank-00001-1.safetensors"]
MEMORY = Path("/dev/shm")
_CPU = torch.device("cpu")
_RANDOM = random_states(_CPU)
_STATES = _random_to_json(_RANDOM)
_LOADERS = b'"loaders": [{"epoch": 0, "num_read": 1, "seed": 5}, null]'
_NAMES = {
    b'"@python"': json.dumps(_STATES[0]["$tuple"][1]).encode(),
    b'"@keys"': json.dumps(_STATES[1]["$tuple"][1]).encode(),
    b'"@torch"': json.dumps(base64.b64encode(_RANDOM[2].numpy().tobytes()).decode()).encode(),
}


class OneRank:
    """In place of a group."""

    def rank(self):
        return 0

    def size(self):
        return 1


def make_training():
    """A model with its optimizer, and the state of its training, without MPI."""
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    counts = {"num_steps": 1, "num_sums": 0, "num_skipped_steps": 0, "progress": (1, 0)}
    replica = SimpleNamespace(**counts, optimizer_parts=contextlib.nullcontext)
    return model, {"optimizer": optimizer}, TrainingState(model, replica, Positions(), _CPU, has_common_stream=True)


def checkpoint_seeds():
    """Whole checkpoints: of one rank, and of two that have parts of what the optimizer holds."""
    for num_ranks in (1, 2):
        with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
            temporary = checkpoint.temporary_folder(Path(folder), 1, "a")
            temporary.mkdir()
            _, objects, state = make_training()
            for rank in range(num_ranks):
                set_random_states(_RANDOM, _CPU)
                part = state.take({"optimizer": None}, objects, rank, num_ranks)
                files = part.files
                if num_ranks == 2:
                    whole = torch.arange(6.0).view(2, 3)
                    own = Part(whole.view(-1)[rank * 3 : rank * 3 + 3], rank * 3, whole)
                    files = copy_to_files(
                        [*pieces_of("optimizer.a", own), *pieces_of(f"b{rank}", torch.ones(rank))], f"rank-{rank:05}"
                    )
                checkpoint.write_part(temporary, rank, files, {}, part.states, part.own)
                del part
            about = {"step": 1}
            folder = checkpoint.commit(temporary, num_ranks, about, 1)
            if num_ranks == 2:
                about["tensors"] = {"optimizer.a": {"dtype": "F32", "shape": [2, 3]}}
                about["states"] = {"model": {"type": "M", "state": {"$tensor": "optimizer.a"}}}
            else:
                about["tensors"] = {
                    name: {"dtype": one["dtype"], "shape": one["shape"]}
                    for name, one in _header((folder / FILES[1]).read_bytes()).items()
                    if name != "__metadata__"
                }
            files = [(folder / name).read_bytes() for name in FILES[: 2 * num_ranks]]
            yield join(about, [text.replace(b'"loaders": []', _LOADERS) for text in files])


def _header(contents):
    length = int.from_bytes(contents[:8], "little")
    return json.loads(contents[8 : 8 + length])


def join(content, files, flags=b"3"):
    """An input of `read_checkpoint`."""
    parts = [flags, json.dumps(content).encode()]
    for contents in files:
        for name, text in _NAMES.items():
            contents = contents.replace(text, name)
        parts.append(contents)
    return SEPARATOR.join(parts)


def write(data, folder):
    """Makes the files of a checkpoint from an input of `read_checkpoint`."""
    flags, content, *files = data.split(SEPARATOR, 5) if data.count(SEPARATOR) else (b"0", data)
    bits = flags[0] if flags else 0
    for name, contents in zip(FILES, files, strict=False):
        for short, text in _NAMES.items():
            contents = contents.replace(short, text)
        (folder / name).write_bytes(contents)
        files[FILES.index(name)] = contents
    if bits & 1:
        with contextlib.suppress(ValueError, TypeError, LookupError, RecursionError):
            value = json.loads(content)
            if bits & 2:
                for name, contents in zip(FILES, files, strict=False):
                    if name in value["files"]:
                        value["files"][name] = {"bytes": len(contents), "crc32": zlib.crc32(contents)}
            index = {"format": checkpoint.FORMAT, "crc32": checkpoint._checksum(value), "content": value}
            content = json.dumps(index).encode()
    (folder / checkpoint.INDEX).write_bytes(content)


def refuse(*_arguments, **_options):
    """In place of what unpickles."""
    raise AssertionError("unpickled")


_MODEL, _OBJECTS, _STATE = make_training()
_BEFORE = copy.deepcopy(_OBJECTS["optimizer"].state_dict())


def read_checkpoint(data):
    """Reads it as `trainer.load` does. CheckpointError, or ValueError where it is of another model."""
    folder = Path(tempfile.mkdtemp(dir=MEMORY))
    kept = {name: getattr(pickle, name) for name in ("load", "loads", "Unpickler")}, torch.load, restoring.gather_json
    try:
        for name in kept[0]:
            setattr(pickle, name, refuse)
        torch.load = refuse
        restoring.gather_json = lambda group, value: [json.loads(json.dumps(value))]
        step = folder / "step-1"
        step.mkdir()
        write(data, step)
        with contextlib.suppress(CheckpointError):
            one = checkpoint.Checkpoint(step)
            one.verify(0, 1)
            one.of_rank(0)
            for name in one.content["states"]:
                one.state(name)
        with contextlib.suppress(CheckpointError, ValueError), contextlib.redirect_stdout(None):
            restoring.load(folder, _OBJECTS, _STATE, OneRank())
        random.random(), np.random.rand(), torch.rand(1)
    finally:
        for name, value in kept[0].items():
            setattr(pickle, name, value)
        torch.load, restoring.gather_json = kept[1:]
        shutil.rmtree(folder)
        _OBJECTS["optimizer"].load_state_dict(_BEFORE)


_REQUEST = preflight.Request("python", "/libmpi.so", "openmpi", "/", [], None, {})


def read_answers(data):
    """What hosts, ranks and people say: a hostfile, answers before mpirun, introductions. The errors are ours."""
    with tempfile.NamedTemporaryFile(dir=MEMORY) as file:
        file.write(data)
        file.flush()
        with contextlib.suppress(ValueError):
            hosts = read_hostfile(file.name)
            assert all(host.name[0] != "-" and (host.slots is None or host.slots > 0) for host in hosts)
            assert sum(host.slots for host in place_ranks(hosts, 3, {}, oversubscribe=True)) == 3
            assert place_ranks(hosts, None, {host.name: 2 for host in hosts})
        record.read(Path(file.name))
        host_facts.cpu_limit(file.name)
    answer = preflight.read_answer(data, _REQUEST) or "is silent"
    preflight.find_problems({"node1": answer, "node2": answer}, _REQUEST)
    if not isinstance(answer, str):
        host_facts.warn_of_shared_memory("mpich", answer["gpus"] or answer["cores"], answer["free_shared_memory"])
    with contextlib.suppress(MismatchError):
        versions.check_alike([data.decode(errors="replace"), '{"host": "a", "torch": "2"}'])


def answer_seeds():
    """One of each."""
    yield b"node1 slots=2\nnode2:3\n# none\nnode3\n"
    yield b"node1\nnode1\nnode2"
    yield b"0::/a/b\n3:cpu,cpuacct:/c\n"
    facts = host_facts.host_facts("/libmpi.so", "openmpi", [], None)
    yield b"Welcome\n" + preflight.MARK.encode() + json.dumps(facts).encode()
    yield b"no-python"
    yield b'{"host": "b", "torch": "2", "MPI": "x"}'


TARGETS = {"checkpoint": (read_checkpoint, checkpoint_seeds), "answers": (read_answers, answer_seeds)}
