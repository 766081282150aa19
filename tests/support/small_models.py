# SPDX-License-Identifier: Apache-2.0
"""Small models, and the data, losses and optimizers that train them: the same on every rank."""

import itertools
import random

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset

F64 = torch.float64
PAD = -1


class Net(nn.Module):
    """Model with a convolution and a view by the batch size, which would fail for an empty part.

    No parameter has a gradient of rounding errors alone: Adam would make it a step as large as the learning rate.
    """

    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 3, 3, dtype=dtype)
        self.linear = nn.Linear(12, 4, dtype=dtype)

    def forward(self, x):
        x = torch.tanh(self.conv(x))
        return self.linear(x.view(x.size(0), -1))


class NormNet(nn.Module):
    """Model with BatchNorm after layers without a bias, since a bias would have a gradient of rounding errors alone."""

    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 3, 3, bias=False, dtype=dtype)
        self.norm = nn.BatchNorm2d(3, dtype=dtype)
        self.linear = nn.Linear(12, 5, bias=False, dtype=dtype)
        self.norm1 = nn.BatchNorm1d(5, dtype=dtype)
        self.last = nn.Linear(5, 4, dtype=dtype)

    def forward(self, x):
        x = torch.tanh(self.norm(self.conv(x)))
        return self.last(torch.tanh(self.norm1(self.linear(x.view(x.size(0), -1)))))


def mlp(*sizes, seed=0, dtype=F64):
    """Return linear layers with GELU between them, the same on every rank."""
    torch.manual_seed(seed)
    layers = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs, dtype=dtype), nn.GELU()]
    return nn.Sequential(*layers[:-1])


def batch(num_samples, dtype, seed=1):
    """Return images for `Net` and `NormNet`, and their classes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_samples, 2, 4, 4, generator=generator, dtype=dtype)
    return x, torch.randint(4, (num_samples,), generator=generator)


def regression_batch(num_samples=8, seed=1, dtype=F64, *, inputs, outputs):
    """Return inputs and targets; `inputs` and `outputs` are the shape of one sample, or its number of elements."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(shape,) if isinstance(shape, int) else shape for shape in (inputs, outputs)]
    return tuple(torch.randn(num_samples, *shape, generator=generator).to(dtype) for shape in shapes)


class Squares(Dataset):
    """Dataset that records the indices that are read, and draws from all random streams, as augmentation does."""

    def __init__(self, num_samples):
        self.num_samples = num_samples
        self.read = []

    def __len__(self):
        return self.num_samples

    def __getitem__(self, index):
        self.read.append(index)
        return index, torch.tensor([random.random(), np.random.rand(), torch.rand(()).item()], dtype=F64)


def sgd(model, lr=0.05):
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def adam(model):
    return torch.optim.Adam(model.parameters(), lr=0.01)


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def masked(outputs, targets):
    """Return the mean loss over the positions that are not padding; NaN if there are none."""
    losses = F.cross_entropy(outputs, targets.clamp(min=0), reduction="none")
    return losses[targets != PAD].mean()


def num_tokens(targets):
    return (targets != PAD).sum()


def own_loss(trainer, model, x, y, criterion=F.cross_entropy):
    """Return the loss of this rank's part, and its weight; for an empty part, the loss of the first sample, and 0."""
    own_x, own_y = trainer.split((x, y))
    weight = len(own_y)
    if not weight:
        own_x, own_y = x[:1], y[:1]
    return criterion(model(own_x), own_y), weight
