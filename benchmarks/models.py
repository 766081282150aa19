# SPDX-License-Identifier: Apache-2.0
"""Models that several benchmarks train, and their batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from distributed_trainer import DistributedTrainer


class Transformer(nn.Module):
    """Transformer with input [N, 64] (tokens below 65) and output [N, 65, 64].

    By default it has 10.7 M parameters: 6 layers, width 384, 6 heads.
    """

    def __init__(self, width: int = 384, num_layers: int = 6) -> None:
        super().__init__()
        self.embedding = nn.Embedding(65, width)
        self.position = nn.Parameter(torch.zeros(64, width))
        layer = nn.TransformerEncoderLayer(width, 6, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, num_layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, 65)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits with the classes in dimension 1, as nn.CrossEntropyLoss needs them."""
        return self.head(self.layers(self.embedding(tokens) + self.position)).transpose(1, 2)


def make_mlp(width: int = 4096) -> nn.Sequential:
    """Make a network with input [N, 1024] and output [N, 1000], by default of 25 M parameters."""
    return nn.Sequential(
        *(nn.Linear(1024, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1000))
    )


class Subject(NamedTuple):
    """A model to train, and its batches."""

    title: str
    model: nn.Module
    inputs: Tensor
    targets: Tensor

    @property
    def batch(self) -> tuple[Tensor, Tensor]:
        return self.inputs, self.targets


def make_subjects(num_parts: int, is_quick: bool) -> list[Subject]:
    """Make the MLP and the transformer, the same on every rank.

    Args:
        num_parts: Number of parts of the batch; each has 32 samples for the MLP, 4 of 64 tokens for the transformer.
        is_quick: Whether to make smaller models.
    """
    torch.manual_seed(0)
    mlp = make_mlp(128) if is_quick else make_mlp()
    transformer = Transformer(48, 2) if is_quick else Transformer()
    tokens = torch.randint(0, 65, (4 * num_parts, 64))
    inputs, targets = torch.randn(32 * num_parts, 1024), torch.randint(0, 1000, (32 * num_parts,))
    return [Subject("MLP", mlp, inputs, targets), Subject("transformer", transformer, tokens, tokens)]


def describe(subjects: list[Subject]) -> str:
    """Return a text with the numbers of parameters and samples."""
    counts = {s.title: sum(p.numel() for p in s.model.parameters()) for s in subjects}
    return ", ".join(f"{s.title}: {counts[s.title] / 1e6:.1f} M parameters, {len(s.inputs)} samples" for s in subjects)


def make_step(model: nn.Module, inputs: Tensor, targets: Tensor) -> Callable[[], None]:
    """Return a step with Adam in plain torch."""
    optimizer, criterion = torch.optim.Adam(model.parameters()), nn.CrossEntropyLoss()

    def step() -> None:
        optimizer.zero_grad()
        criterion(model(inputs), targets).backward()
        optimizer.step()

    return step


def make_trainer_step(trainer: DistributedTrainer, inputs: Tensor, targets: Tensor) -> Callable[[], object]:
    """Return a step with Adam by a trainer, on the global batch."""
    optimizer, criterion = torch.optim.Adam(trainer.model.parameters()), nn.CrossEntropyLoss()
    return lambda: trainer.train_step(inputs, targets, criterion, optimizer)
