# SPDX-License-Identifier: Apache-2.0
"""Targets for fuzz.py: Python code that gets arbitrary bytes. An exception that a target does not catch is a bug.

The input for a checkpoint has its files in this order, with a separator between them: flags, content of
checkpoint.json, rank-00000.json, rank-00000-1.safetensors, rank-00001.json, rank-00001-1.safetensors. With flag 1 the
checksum of the content is corrected, with flag 2 the lengths and checksums of the files, so that later checks are
reached. Random states are long, so the input has names for them.
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

from distributed_trainer import CheckpointError, MismatchError
from distributed_trainer.backend import version_check
from distributed_trainer.checkpoint import format, reader
from distributed_trainer.checkpoint.safetensors import copy_to_files, pieces_of
from distributed_trainer.checkpoint.state import TrainingState
from distributed_trainer.cli import preflight
from distributed_trainer.cli.hostfile import place_ranks, read_hostfile
from distributed_trainer.data.position import DataPosition
from distributed_trainer.data.rng import RngState
from distributed_trainer.gradients.sharded_optimizer import Part
from distributed_trainer.launch import host_facts, job_record
from distributed_trainer.replica.replica import Progress

SEPARATOR = b"\n%%\n"
FILES = ["rank-00000.json", "rank-00000-1.safetensors", "rank-00001.json", "rank-00001-1.safetensors"]
MEMORY = Path("/dev/shm")
_CPU = torch.device("cpu")
_RANDOM = RngState.capture(_CPU)
_REPLICA = SimpleNamespace(optimizer_parts=contextlib.nullcontext)  # a replica without a sharded optimizer
_STATES = format.encode(_RANDOM.to_plain(), "random", {})
_LOADERS = b'"loaders": [{"epoch": 0, "num_read": 1, "seed": 5}, null]'
_NAMES = {
    b'"@python"': json.dumps(_STATES[0]["$tuple"][1]).encode(),
    b'"@keys"': json.dumps(_STATES[1]["$tuple"][1]).encode(),
    b'"@torch"': json.dumps(base64.b64encode(_RANDOM.torch.numpy().tobytes()).decode()).encode(),
}


class OneRank:
    """Replacement for a process group of torch, with one rank."""

    _device_types = (_CPU,)

    def rank(self):
        return 0

    def size(self):
        return 1

    def _allgather_base(self, output, tensor):
        output.copy_(tensor)
        return SimpleNamespace(wait=lambda: None)


def make_training():
    """Make a model, its optimizer and the state of its training, without MPI."""
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    state = TrainingState(model, Progress(num_steps=1), DataPosition(), _CPU, has_common_stream=True)
    return model, {"optimizer": optimizer}, state


def checkpoint_seeds():
    """Return whole checkpoints: of one rank, and of two ranks that have parts of the optimizer's state."""
    for num_ranks in (1, 2):
        with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
            temporary = format.temporary_folder(Path(folder), 1, "a")
            temporary.mkdir()
            _, objects, state = make_training()
            for rank in range(num_ranks):
                _RANDOM.restore(_CPU)
                part = state.snapshot(_REPLICA, {"optimizer": None}, objects, rank, num_ranks, False)
                files = part.files
                if num_ranks == 2:
                    whole = torch.arange(6.0).view(2, 3)
                    own = Part(whole.view(-1)[rank * 3 : rank * 3 + 3], rank * 3, whole)
                    files = copy_to_files(
                        [*pieces_of("optimizer.a", own), *pieces_of(f"b{rank}", torch.ones(rank))], f"rank-{rank:05}"
                    )
                format.write_part(temporary, rank, files, {}, part.states, part.own)
                del part
            about = {"step": 1}
            folder = format.commit(temporary, num_ranks, about, 1)
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
    """Join files to an input of `read_checkpoint`."""
    parts = [flags, json.dumps(content).encode()]
    for contents in files:
        for name, text in _NAMES.items():
            contents = contents.replace(text, name)
        parts.append(contents)
    return SEPARATOR.join(parts)


def write(data, folder):
    """Write the files of a checkpoint from an input of `read_checkpoint`."""
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
            index = {
                "format": f"distributed_trainer checkpoint {format.VERSION}",
                "crc32": format._checksum(value),
                "content": value,
            }
            content = json.dumps(index).encode()
    (folder / format.INDEX).write_bytes(content)


def refuse(*_arguments, **_options):
    """Fail; it replaces the functions that unpickle."""
    raise AssertionError("unpickled")


_MODEL, _OBJECTS, _STATE = make_training()
_BEFORE = copy.deepcopy(_OBJECTS["optimizer"].state_dict())


def read_checkpoint(data):
    """Read a checkpoint as `trainer.load` does; allow CheckpointError, and ValueError if it is of another model."""
    folder = Path(tempfile.mkdtemp(dir=MEMORY))
    kept = {name: getattr(pickle, name) for name in ("load", "loads", "Unpickler")}, torch.load
    try:
        for name in kept[0]:
            setattr(pickle, name, refuse)
        torch.load = refuse
        step = folder / "step-1"
        step.mkdir()
        write(data, step)
        with contextlib.suppress(CheckpointError):
            one = format.Checkpoint(step)
            one.verify(0, 1)
            one.of_rank(0)
            for name in one.content["states"]:
                one.state(name)
        with contextlib.suppress(CheckpointError, ValueError), contextlib.redirect_stdout(None):
            reader.load(folder, _OBJECTS, _STATE, OneRank())
        random.random(), np.random.rand(), torch.rand(1)
    finally:
        for name, value in kept[0].items():
            setattr(pickle, name, value)
        torch.load = kept[1]
        shutil.rmtree(folder)
        _OBJECTS["optimizer"].load_state_dict(_BEFORE)


_REQUEST = preflight.Request("python", "/libmpi.so", "openmpi", "/", [], None, {})


def read_answers(data):
    """Read texts of users, hosts and ranks: a hostfile, answers before mpirun, versions. Allow only our errors."""
    with tempfile.NamedTemporaryFile(dir=MEMORY) as file:
        file.write(data)
        file.flush()
        with contextlib.suppress(ValueError):
            hosts = read_hostfile(file.name)
            assert all(host.name[0] != "-" and (host.slots is None or host.slots > 0) for host in hosts)
            assert sum(host.slots for host in place_ranks(hosts, 3, {}, oversubscribe=True)) == 3
            assert place_ranks(hosts, None, {host.name: 2 for host in hosts})
        job_record.read(Path(file.name))
        host_facts.cpu_limit(file.name)
    answer = preflight.read_answer(data, _REQUEST) or "is silent"
    preflight.find_problems({"node1": answer, "node2": answer}, _REQUEST)
    if not isinstance(answer, str):
        host_facts.warn_of_shared_memory("mpich", answer["gpus"] or answer["cores"], answer["free_shared_memory"])
    with contextlib.suppress(MismatchError):
        version_check.check_alike([data.decode(errors="replace"), '{"host": "a", "torch": "2"}'])


def answer_seeds():
    """Yield one text of each kind."""
    yield b"node1 slots=2\nnode2:3\n# none\nnode3\n"
    yield b"node1\nnode1\nnode2"
    yield b"0::/a/b\n3:cpu,cpuacct:/c\n"
    facts = host_facts.host_facts("/libmpi.so", "openmpi", [], None)
    yield b"Welcome\n" + preflight.MARK.encode() + json.dumps(facts).encode()
    yield b"no-python"
    yield b'{"host": "b", "torch": "2", "MPI": "x"}'


TARGETS = {"checkpoint": (read_checkpoint, checkpoint_seeds), "answers": (read_answers, answer_seeds)}
