# SPDX-License-Identifier: Apache-2.0
"""Format of checkpoints: those of earlier versions load, and those of later versions are refused by version."""

import json
import shutil
from pathlib import Path

import checkpointed_training as training
import pytest
import torch
from ranks import on_ranks
from torch import nn
from torch.utils.data import DataLoader

from distributed_trainer import CheckpointError, create_distributed_trainer
from distributed_trainer.checkpoint import format

FIXTURE = Path(__file__).parent / "fixture"


def plain_states():
    """Return parameters, buffers and the optimizer's averages after each step of the training in plain torch."""
    model, optimizer, scheduler = training.make_training()
    states = []
    for _ in range(training.NUM_EPOCHS):
        for inputs, targets in DataLoader(training.make_dataset(), training.BATCH_SIZE):
            optimizer.zero_grad()
            nn.MSELoss()(model(inputs), targets).backward()
            optimizer.step()
            scheduler.step()
            states.append(snapshot(model, optimizer))
    return states


def snapshot(model, optimizer):
    averages = [value for state in optimizer.state_dict()["state"].values() for value in state.values()]
    learning_rate = torch.tensor(optimizer.param_groups[0]["lr"], dtype=torch.float64)
    return [tensor.clone() for tensor in (*model.state_dict().values(), *averages, learning_rate)]


@on_ranks(1, 2, 3)
def test_checkpoint_of_the_first_version(world):
    """A checkpoint of the first version loads on any number of ranks, and training continues as in plain torch."""
    states = plain_states()
    model, optimizer, scheduler = training.make_training()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    with create_distributed_trainer(model, group=world.comm) as trainer:
        loader = trainer.loader(training.make_dataset(), training.BATCH_SIZE)
        assert trainer.load(FIXTURE, optimizer=optimizer, scheduler=scheduler) == training.SAVED_AFTER
        num_steps = training.SAVED_AFTER
        torch.testing.assert_close(snapshot(model, optimizer), states[num_steps - 1], rtol=1e-11, atol=1e-13)
        for _ in trainer.epochs(training.NUM_EPOCHS):
            for inputs, targets in loader:
                trainer.train_step(inputs, targets, nn.MSELoss(), optimizer)
                scheduler.step()
                torch.testing.assert_close(snapshot(model, optimizer), states[num_steps], rtol=1e-10, atol=1e-12)
                num_steps += 1
    assert num_steps == len(states)


def test_size_of_the_fixture():
    assert sum(file.stat().st_size for file in FIXTURE.rglob("*") if file.is_file()) < 100_000


def write_with(folder, form):
    copy = shutil.copytree(next(FIXTURE.glob("step-*")), folder / "step-00000007")
    index = json.loads((copy / format.INDEX).read_text())
    (copy / format.INDEX).write_text(json.dumps(index | {"format": form}))
    return copy


def test_newer_version(tmp_path):
    newer = format.VERSION + 1
    copy = write_with(tmp_path, f"distributed_trainer checkpoint {newer}")
    with pytest.raises(CheckpointError, match=rf"version {newer}.* reads version {format.VERSION}.*Install"):
        format.Checkpoint(copy)


@pytest.mark.parametrize(
    "form", ["other", 1, None, ["distributed_trainer checkpoint 1"], "distributed_trainer checkpoint x"]
)
def test_other_format(tmp_path, form):
    copy = write_with(tmp_path, form)
    with pytest.raises(CheckpointError, match="not a checkpoint of distributed_trainer"):
        format.Checkpoint(copy)


def test_commit_as_soon_as_all_have_written(tmp_path, monkeypatch):
    """Rank 0 renames the folder as soon as the last rank's file appears, before that rank does anything else."""
    temporary = format.temporary_folder(tmp_path, 1, "token")
    temporary.mkdir()
    rename = Path.rename

    def rename_and_commit(path, target):
        rename(path, target)
        if target.name == format.rank_file(1):
            format.commit(temporary, 2, {"step": 1}, keep=1)

    monkeypatch.setattr(Path, "rename", rename_and_commit)
    for rank in range(2):
        format.write_part(temporary, rank, {}, {}, {"model": {}} if rank == 0 else None, {})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
