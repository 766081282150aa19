# SPDX-License-Identifier: Apache-2.0
"""Helpers for tests of torch's features that use process groups: a default group, data, and training in one process.

The tests run on shmpi. With TEST_BACKEND=gloo they run on gloo instead, with a file store: a test that fails there too
does not show a fault of shmpi.
"""

import copy
import os
from datetime import timedelta

import ranks
import torch
import torch.distributed as dist
from small_models import regression_batch, sgd

BACKEND = os.environ.get("TEST_BACKEND", "shmpi")


def start(backend, world, folder):
    """Start torch's default process group of all ranks. Collective."""
    if backend == "shmpi":
        dist.init_process_group("shmpi", init_method="mpi://", timeout=timedelta(seconds=ranks.TEST_SECONDS))
        return
    torch.set_num_threads(1)  # the start of shmpi fits the number of threads to the cores
    store = dist.FileStore(str(folder / "store"), world.size)
    dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size)


def batches(count, size, inputs, outputs, seed=1, dtype=torch.float64):
    """Return `count` pairs of inputs and targets, the same on every rank."""
    return [regression_batch(size, seed + step, dtype, inputs=inputs, outputs=outputs) for step in range(count)]


def part(world, tensor):
    """Return this rank's share of a batch that the ranks divide evenly."""
    return tensor.chunk(world.size)[world.rank]


def parts(world, data):
    """Return this rank's share of each batch."""
    return [tuple(part(world, tensor) for tensor in batch) for batch in data]


def loss_of(model, batch):
    inputs, targets = batch
    return torch.nn.functional.mse_loss(model(inputs), targets)


def train(model, data, optimizer=None, loss_of=loss_of):
    """Make one optimizer step on each batch; return the model."""
    optimizer = optimizer or sgd(model)
    for batch in data:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
    return model


def trained_alone(model, data, make_optimizer=sgd, loss_of=loss_of):
    """Return a copy of the model that one process has trained; the model itself does not change."""
    model = copy.deepcopy(model)
    return train(model, data, make_optimizer(model), loss_of)
