# SPDX-License-Identifier: Apache-2.0
"""What the tests of what torch builds on process groups share: a default process group, small models and their answer.

They are about shmpi. With TEST_BACKEND=gloo they run on gloo instead, over a file: what fails there as well does not
speak against shmpi.
"""

import copy
import itertools
import os
from datetime import timedelta

import ranks
import torch
import torch.distributed as dist

BACKEND = os.environ.get("TEST_BACKEND", "shmpi")


def start(backend, world, folder):
    """Makes torch's default process group of all ranks; collective."""
    if backend == "shmpi":
        dist.init_process_group("shmpi", init_method="mpi://", timeout=timedelta(seconds=ranks.TEST_SECONDS))
        return
    torch.set_num_threads(1)  # shmpi's start fits them to the cores
    store = dist.FileStore(str(folder / "store"), world.size)
    dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size)


def mlp(*sizes, seed=0, dtype=torch.float64):
    """Linear layers with GELU between them, the same on every rank."""
    torch.manual_seed(seed)
    layers = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [torch.nn.Linear(inputs, outputs, dtype=dtype), torch.nn.GELU()]
    return torch.nn.Sequential(*layers[:-1])


def batches(count, size, inputs, outputs, seed=1, dtype=torch.float64):
    """`count` pairs of inputs and targets, the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(size, inputs), (size, outputs)]
    return [tuple(torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes) for _ in range(count)]


def part(world, tensor):
    """This rank's share of a batch that the ranks divide evenly."""
    return tensor.chunk(world.size)[world.rank]


def parts(world, data):
    """This rank's share of each batch."""
    return [tuple(part(world, tensor) for tensor in batch) for batch in data]


def loss_of(model, batch):
    inputs, targets = batch
    return torch.nn.functional.mse_loss(model(inputs), targets)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def train(model, data, optimizer=None, loss_of=loss_of):
    """One optimizer step on each batch; returns the model."""
    optimizer = optimizer or sgd(model)
    for batch in data:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
    return model


def trained_alone(model, data, make_optimizer=sgd, loss_of=loss_of):
    """What one process makes of a model, which stays as it is."""
    model = copy.deepcopy(model)
    return train(model, data, make_optimizer(model), loss_of)


def assert_same(found, expected, rtol=1e-12):
    """Two models' or dicts' tensors agree; in float64 up to the order in which sums are taken."""
    if isinstance(found, torch.nn.Module):
        found, expected = found.state_dict(), expected.state_dict()
    assert list(found) == list(expected)
    for name, tensor in found.items():
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        message = lambda text, name=name: f"{name}: {text}"  # noqa: E731
        scale = expected[name].abs().max().item() if expected[name].numel() else 0.0
        torch.testing.assert_close(whole, expected[name], rtol=rtol, atol=rtol * scale, msg=message)
