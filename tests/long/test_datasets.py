# SPDX-License-Identifier: Apache-2.0
"""Streaming datasets of Hugging Face: each rank reads samples of its own."""

import itertools

import pytest
import torch
from ranks import on_ranks

from distributed_trainer import create_distributed_trainer

datasets = pytest.importorskip("datasets")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("num_shards", [2, 6])
@on_ranks(1, 2, 3)
def test_streaming(world, num_shards, workers):
    """Each sample is read by one rank, in another order in each epoch; shards need not divide the ranks."""
    numbers = torch.arange(23)
    data = datasets.Dataset.from_dict({"x": numbers}).to_iterable_dataset(num_shards=num_shards)
    data = data.shuffle(seed=1, buffer_size=4).with_format("torch")
    trainer = create_distributed_trainer(torch.nn.Linear(1, 1))
    options = {"num_workers": workers, "persistent_workers": workers > 0}
    loader = trainer.loader(data, 6, stream="sharded", **options)
    epochs = []
    for _ in range(2):
        own = [part["x"].tolist() for part in loader]
        epochs.append(world.gather(list(itertools.chain(*own))))
        assert sorted(itertools.chain(*epochs[-1])) == numbers.tolist()
        assert len(set(world.gather(len(own)))) == 1
    assert epochs[0] != epochs[1]
    trainer.close()
