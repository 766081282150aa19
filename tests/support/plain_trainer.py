# SPDX-License-Identifier: Apache-2.0
"""Stand-in for `distributed_trainer`: its calls in one process, by plain torch, on whole batches.

Scripts of the documentation run with it for a reference: `sys.modules["distributed_trainer"] = plain_trainer`.
"""

import contextlib
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader


class MeanLoss(NamedTuple):
    """Loss that is a sum over something, divided by how much of it there is."""

    total: torch.Tensor
    count: float


def create_distributed_trainer(model, **options):
    """Return a trainer of one process."""
    return PlainTrainer(model)


def _mean(term):
    return term.total / term.count if isinstance(term, MeanLoss) else term


class PlainTrainer:
    """Trainer of one process."""

    rank, world_size, is_main, device = 0, 1, True, torch.device("cpu")

    def __init__(self, model):
        self.model = model

    def _loss(self, inputs, targets, criterion):
        is_structure = isinstance(inputs, (tuple, list))
        named = isinstance(inputs, Mapping)
        outputs = self.model(**inputs) if named else self.model(*inputs) if is_structure else self.model(inputs)
        loss = criterion(outputs, targets)
        return {name: _mean(term) for name, term in loss.items()} if isinstance(loss, dict) else _mean(loss)

    def train_step(self, inputs, targets, criterion, optimizer, clip_norm=None, **options):
        """Train one step; `options` say how a batch is cut, which this trainer does not do."""
        optimizers = optimizer if isinstance(optimizer, list) else [optimizer]
        for one in optimizers:
            one.zero_grad()
        loss = self._loss(inputs, targets, criterion)
        (sum(loss.values()) if isinstance(loss, dict) else loss).backward()
        if clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), clip_norm)
        for one in optimizers:
            one.step()
        return loss

    def evaluate(self, loader, criterion):
        """Return the mean of a loss that is a mean over equally weighted batches."""
        self.model.eval()
        with torch.no_grad():
            losses = [self._loss(inputs, targets, criterion) for inputs, targets in loader]
        self.model.train()
        return {"loss": sum(losses) / len(losses)}

    def split(self, batch):
        """Return the whole batch."""
        return batch

    def forward(self):
        """Surround the model's calls by nothing."""
        return contextlib.nullcontext()

    def backward(self, loss, weight):
        """Run backward; the only loss has all of the weight."""
        loss.backward()
        return loss.detach()

    def step(self, optimizer, closure=None):
        """Make the optimizer's step."""
        optimizer.step(closure)

    def gather(self, tensor):
        """Return the rows of all ranks, which are those of this one."""
        return tensor

    def reduce(self, value, op="sum"):
        """Return the only rank's value."""
        return value

    def any(self, flag):
        """Return the only rank's flag."""
        return flag

    def loader(self, dataset, batch_size, **options):
        """Return torch's loader."""
        return DataLoader(dataset, batch_size, **options)

    def epochs(self, num_epochs):
        """Return the numbers of the epochs."""
        return range(num_epochs)

    def save(self, *arguments, **options):
        """Save nothing."""
