# SPDX-License-Identifier: Apache-2.0
"""A model in one file for inference, read by the safetensors library in plain torch."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from one_process import assert_same
from ranks import mixed, on_ranks, same_message
from small_models import F64, NormNet, batch, sgd
from torch import nn

from distributed_trainer import create_distributed_trainer


@pytest.fixture
def folder(world):
    """A folder that all ranks share."""
    path = world.gather(tempfile.mkdtemp() if world.rank == 0 else None)[0]
    yield Path(path)
    world.comm.Barrier()
    shutil.rmtree(path, ignore_errors=True)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.ones((), dtype=torch.bfloat16))
        self.register_buffer("empty", torch.empty(0, 3))

    def forward(self, x):
        return self.head(self.embedding(x)) * self.scale


@mixed
def test_trained_model(world, folder):
    model = NormNet(F64)
    trainer = create_distributed_trainer(model)
    optimizer, path = sgd(model), folder / "model.safetensors"
    for step in range(2):
        trainer.train_step(*batch(4 * world.size, F64, step), nn.CrossEntropyLoss(), optimizer)
        trainer.export(os.fspath(path))  # the second replaces the first
        loaded = safetensors.torch.load_file(path)
        assert loaded.keys() == model.state_dict().keys()
        assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())
        world.comm.Barrier()
    assert os.listdir(folder) == [path.name]
    other = NormNet(F64)
    other.load_state_dict(loaded)
    assert_same(model, other, 0)
    trainer.close()


@on_ranks(1, 2)
def test_tied_weights(world, folder):
    model, path = Tied(), folder / "model.safetensors"
    trainer = create_distributed_trainer(model, shard="optimizer")
    optimizer = torch.optim.Adam(model.parameters())
    trainer.train_step(torch.arange(4), torch.arange(4), nn.CrossEntropyLoss(), optimizer)
    trainer.export(path)
    assert safetensors.torch.load_file(path).keys() == {"embedding.weight", "scale", "empty"}
    other = Tied()
    safetensors.torch.load_model(other, path)
    assert_same(model, other, 0)
    trainer.close()


@on_ranks(1, 2)
def test_errors(world, folder):
    """Each error is the same on all ranks, and leaves an earlier file as it was."""
    model = nn.Linear(2, 2)
    trainer = create_distributed_trainer(model)
    with pytest.raises(FileNotFoundError, match="no-folder") as raised:
        trainer.export(folder / "no-folder" / "model.safetensors")
    same_message(world, raised)
    if world.rank == 0:
        (folder / "link").symlink_to("model.safetensors")
    trainer.export(folder / "link")
    assert (folder / "link").is_symlink()
    model.register_buffer("phases", torch.zeros(2, dtype=torch.complex128))
    with pytest.raises(ValueError, match=r"'phases' in the model's state_dict\(\) is a tensor of torch.complex128"):
        trainer.export(folder / "model.safetensors")
    assert safetensors.torch.load_file(folder / "model.safetensors").keys() == {"weight", "bias"}
    with pytest.raises(TypeError):
        trainer.export(3)
    with pytest.raises(FileExistsError, match="is no file that could be replaced"):
        trainer.export(folder)
    trainer.close()
