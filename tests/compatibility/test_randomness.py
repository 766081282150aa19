# SPDX-License-Identifier: Apache-2.0
"""Random numbers: shuffling, augmentation, decisions of a model, noise of an optimizer."""

import random

import numpy as np
import torch
from compatibility import refused, works
from small_models import F64, Net, NormNet, batch, mlp, sgd
from torch import nn
from torch.utils.data import DataLoader, Dataset, RandomSampler, TensorDataset, WeightedRandomSampler, random_split


def seed_all(seed=11):
    for generator in (random.seed, np.random.seed, torch.manual_seed):
        generator(seed)


def draw():
    """Draw from the script's streams, which the steps before must have left alone."""
    return random.random(), np.random.randn(), *torch.randn(2, dtype=F64).tolist()


@works("a plain `DataLoader(shuffle=True)`, for three epochs")
def test_shuffled_loader(run):
    seed_all()
    model = run.start(NormNet(F64))
    torch.manual_seed(5)
    optimizer = sgd(model)
    loader = DataLoader(TensorDataset(*batch(22, F64)), batch_size=6, shuffle=True)
    for _ in range(3):
        for inputs, targets in loader:
            run.step(inputs, targets, nn.CrossEntropyLoss(), optimizer)
    return draw()


class Augmented(Dataset):
    """Dataset that draws from all streams for each sample."""

    def __init__(self):
        self.tensors = batch(14, F64)

    def __len__(self):
        return 14

    def __getitem__(self, index):
        x, y = (tensor[index] for tensor in self.tensors)
        return x + 0.1 * torch.randn(x.shape, dtype=F64) + 0.1 * random.random() + 0.1 * np.random.rand(), y


@works(
    "samplers, `random_split` and augmentation that draw from torch, NumPy and `random`",
    note="with workers, too",  # test_streams.py tests them in processes of their own
)
def test_augmentation(run):
    seed_all()
    model = run.start(Net(F64))
    optimizer = sgd(model)
    first, second = random_split(Augmented(), [8, 6])
    loaders = [
        DataLoader(first, 5, sampler=RandomSampler(first, replacement=True)),
        DataLoader(second, 4, sampler=WeightedRandomSampler([1.0] * 3 + [2.0] * 3, 7)),
        DataLoader(first, 8, shuffle=True),
    ]
    for _ in range(2):
        for loader in loaders:
            for inputs, targets in loader:
                run.step(inputs, targets, nn.CrossEntropyLoss(), optimizer)
    return draw()


@works("batches that the script itself shuffles, mixes (mixup) and adds noise to, by any stream")
def test_own_draws(run):
    seed_all()
    model = run.start(Net(F64))
    optimizer = sgd(model)
    x, y = batch(14, F64)
    for _ in range(3):
        order = np.random.permutation(14)
        for start in range(0, 14, 5):
            index = order[start : start + 5].tolist()
            inputs, targets = x[index], nn.functional.one_hot(y[index], 4).double()
            weight, partner = np.random.beta(0.4, 0.4), torch.randperm(len(index))
            inputs = weight * inputs + (1 - weight) * inputs[partner] + 0.1 * torch.randn_like(inputs)
            targets = weight * targets + (1 - weight) * targets[partner]
            run.step(inputs, targets, nn.CrossEntropyLoss(), optimizer)
            random.shuffle(index)
    return draw()


class RandomDepth(nn.Module):
    """Layers of which each is left out by chance, as one number of `random` or NumPy says."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(mlp(5, 5, seed=seed) for seed in range(4))
        self.norm = nn.BatchNorm1d(5, dtype=F64)
        self.last = nn.Linear(5, 5, dtype=F64)

    def forward(self, x):
        for number, layer in enumerate(self.layers):
            if (random.random, np.random.rand)[number % 2]() < 0.6:
                x = self.norm(x + torch.tanh(layer(x)))
        return self.last(x)


@works("layers that a model drops by a number of `random` or NumPy", note="by torch: `common_random()`")
def test_random_depth(run):
    model = run.start(RandomDepth())
    seed_all()
    optimizer = sgd(model)
    loader = DataLoader(TensorDataset(*(torch.randn(14, 5, dtype=F64) for _ in range(2))), 6, shuffle=True)
    for _ in range(3):
        for inputs, targets in loader:
            run.step(inputs, targets, nn.MSELoss(), optimizer)
    return draw()


class Langevin(torch.optim.SGD):
    """SGD with noise."""

    @torch.no_grad()
    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter += 0.01 * torch.randn_like(parameter)


@works("an optimizer that draws noise")
def test_noisy_optimizer(run):
    seed_all()
    model = run.start(Net(F64))
    optimizer = Langevin(model.parameters(), lr=0.1)
    for step in range(3):
        run.step(*batch(5, F64, step), nn.CrossEntropyLoss(), optimizer)
    return draw()


@refused(
    "dropout in a manual loop that does not call the model inside `trainer.forward()`",
    "module '1' draws random numbers, .* Call the model inside `with trainer.forward",
    instead="`with trainer.forward(): loss = ...`",
    ways=("manual-loop",),
)
def test_dropout_outside_of_forward(run):
    model = run.start(nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(32, 4, dtype=F64)))
    x, y = run.trainer.split(batch(5, F64))
    run.trainer.backward(nn.CrossEntropyLoss()(model(x), y), weight=len(y))
