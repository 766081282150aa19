# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of what is trained only: adapters are saved, the frozen base is not, and another base is refused."""

import json

import pytest
import torch
from one_process import assert_same
from ranks import on_ranks, same_message
from small_models import F64, regression_batch
from torch import nn

from distributed_trainer import create_distributed_trainer


class LoRA(nn.Module):
    """Linear layer that is frozen, with a trained product of two small matrices beside it."""

    def __init__(self, inputs, outputs, rank=2):
        super().__init__()
        self.base = nn.Linear(inputs, outputs, dtype=F64).requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, inputs, dtype=F64) / 4)
        self.up = nn.Parameter(torch.zeros(outputs, rank, dtype=F64))

    def forward(self, x):
        return self.base(x) + x @ self.down.t() @ self.up.t()


def make_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(LoRA(32, 24), nn.BatchNorm1d(24, dtype=F64), nn.Tanh(), LoRA(24, 4))


def make(model, **options):
    trainer = create_distributed_trainer(model, **options)
    return trainer, torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=0.02)


def steps(trainer, optimizer, numbers):
    for number in numbers:
        trainer.train_step(*regression_batch(9, number, inputs=32, outputs=4), nn.MSELoss(), optimizer)


@pytest.mark.parametrize("options", [{}, {"shard": "optimizer"}], ids=["plain", "sharded"])
@on_ranks(1, 2, 3)
def test_adapters(world, tmp_path, options):
    """The run continues as if it had not stopped."""
    folder = world.comm.bcast(tmp_path)
    reference, model = make_model(), make_model()
    trainer, optimizer = make(reference, **options)
    steps(trainer, optimizer, range(6))
    expected = {name: value.clone() for name, value in reference.state_dict().items()}
    trainer.close()

    trainer, optimizer = make(model, **options)
    steps(trainer, optimizer, range(3))
    trainer.save(folder, trainable_only=True, optimizer=optimizer)
    trainer.close()
    (path,) = folder.glob("step-*")
    content = json.loads((path / "checkpoint.json").read_text())["content"]
    saved = {name for name in content["tensors"] if name.startswith("model.")}
    assert saved == {f"model.{name}" for name in expected if "base" not in name}

    model = make_model()
    trainer, optimizer = make(model, **options)
    assert trainer.resume(folder, trainable_only=True, optimizer=optimizer) == 3
    steps(trainer, optimizer, range(3, 6))
    assert_same(dict(model.state_dict()), expected, rtol=1e-10)
    trainer.close()


@on_ranks(1, 2)
def test_other_base(world, tmp_path):
    folder = world.comm.bcast(tmp_path)
    trainer, optimizer = make(make_model())
    trainer.save(folder, trainable_only=True, optimizer=optimizer)
    steps(trainer, optimizer, range(1))
    trainer.close()
    for model, message in (
        (make_model(seed=1), r"was saved with trainable_only=True.* goes with 4 frozen .* This model has 4 frozen"),
        (make_model().requires_grad_(True), r"another model: it has no 0\.base\.weight"),
    ):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        trainer, optimizer = make(model)
        with pytest.raises(ValueError, match=message) as error:
            trainer.load(folder, optimizer=optimizer)
        same_message(world, error)
        assert all(map(torch.equal, before.values(), model.state_dict().values()))
        trainer.close()
    with pytest.raises(ValueError, match="was closed"):
        trainer.save(folder, trainable_only=True)


@on_ranks(1, 2)
def test_wrong_argument(world, tmp_path):
    trainer, _ = make(make_model())
    with pytest.raises(TypeError, match="trainable_only must be True or False, not 1"):
        trainer.save(tmp_path, trainable_only=1)
    trainer.close()
