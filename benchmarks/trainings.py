# SPDX-License-Identifier: Apache-2.0
"""Trainings that show the accuracy that PowerSGD loses, for compression.py and tests/gradients/test_powersgd.py."""

import math
import runpy
from collections.abc import Iterable
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from distributed_trainer import PowerSGD, create_distributed_trainer

EXAMPLES = Path(__file__).parents[1] / "examples"
WINDOW = 32  # characters that the transformer sees


class Characters(nn.Module):
    """Transformer that predicts the next of 64 kinds of characters: 2 layers, width 64, 110,000 parameters."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(64, 64)
        self.position = nn.Parameter(torch.zeros(WINDOW, 64))
        layer = nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(64, 64)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits with the classes in dimension 1, as nn.CrossEntropyLoss needs them."""
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        x = self.layers(self.embedding(tokens) + self.position, mask=mask, is_causal=True)
        return self.head(x).transpose(1, 2)


def documentation() -> Tensor:
    """Return the documentation that ships with Python as numbers of characters: 0 for all but the 63 commonest."""
    text = "".join(topics[name] for name in sorted(topics)).lower()
    common = sorted(set(text), key=lambda letter: (-text.count(letter), letter))[:63]
    numbers = {letter: number for number, letter in enumerate(common, 1)}
    return torch.tensor([numbers.get(letter, 0) for letter in text])


def train(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    compression: PowerSGD | None,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
) -> None:
    """Train on all ranks."""
    with create_distributed_trainer(model, compression=compression) as trainer:
        for inputs, targets in batches:
            trainer.train_step(inputs, targets, nn.CrossEntropyLoss(), optimizer)
            if scheduler is not None:
                scheduler.step()


def train_characters(compression: PowerSGD | None, num_steps: int) -> tuple[float, float]:
    """Train with Adam and a cosine schedule, 32 samples a step; return loss and accuracy on 20,000 other characters."""
    tokens = documentation()
    end = len(tokens) - 20000
    model = Characters()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 20) * (1 + math.cos(math.pi * step / num_steps)) / 2
    )
    generator = torch.Generator().manual_seed(1)
    starts = (torch.randint(end - WINDOW, (32, 1), generator=generator) for _ in range(num_steps))
    samples = (tokens[start + torch.arange(WINDOW + 1)] for start in starts)
    batches = ((sample[:, :-1], sample[:, 1:]) for sample in samples)
    train(model, batches, optimizer, compression, scheduler)
    windows = tokens[end:].unfold(0, WINDOW + 1, WINDOW + 1)
    with torch.no_grad():
        logits = model(windows[:, :-1])
    accuracy = (logits.argmax(1) == windows[:, 1:]).float().mean()
    return F.cross_entropy(logits, windows[:, 1:]).item(), accuracy.item()


def train_digits(compression: PowerSGD | None, num_epochs: int = 10) -> float:
    """Train the example's network; return its accuracy on 360 other images of scikit-learn's digits."""
    make_model = runpy.run_path(str(EXAMPLES / "train_digits.py"))["make_model"]
    digits = load_digits()
    images, labels = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(digits.target)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(labels), generator=generator)
    test, rest = order[:360], order[360:]
    epochs = (rest[torch.randperm(len(rest), generator=generator)].split(128) for _ in range(num_epochs))
    torch.manual_seed(0)
    model = make_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    train(model, ((images[part], labels[part]) for epoch in epochs for part in epoch), optimizer, compression)
    model.eval()
    with torch.no_grad():
        return (model(images[test]).argmax(1) == labels[test]).float().mean().item()
