# SPDX-License-Identifier: Apache-2.0
"""Train a small convolutional network on scikit-learn's digits: 1,797 images of 8x8 pixels that ship in that package.

python examples/train_digits.py                 one process
python examples/train_digits.py --num-gpus 2    two ranks on this machine
mpirun -np 2 python examples/train_digits.py    the same, started by hand
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from tqdm import tqdm

from distributed_trainer import create_distributed_trainer


def make_model() -> nn.Module:
    """Make two convolutions with BatchNorm and one linear layer; input [N, 1, 8, 8], output [N, 10]."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 10),
    )


def main() -> None:
    """Train, and print a line for each epoch and the accuracy on images not used in training."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-gpus", type=int, help="devices per machine (default: as launched)")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=128, help="samples in the global batch")
    parser.add_argument("--results", type=Path, help="write the losses of all steps and the weights to this file")
    parser.add_argument("--compare", type=Path, help="print how far losses and weights differ from those in this file")
    options = parser.parse_args()

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    train_index, test_index = train_test_split(range(len(labels)), test_size=360, random_state=0, stratify=labels)
    dataset = torch.utils.data.TensorDataset(images[train_index], labels[train_index])

    torch.manual_seed(0)
    model = make_model()
    trainer = create_distributed_trainer(model, num_gpus=options.num_gpus)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    criterion = nn.CrossEntropyLoss()
    loader = torch.utils.data.DataLoader(dataset, batch_size=options.batch_size, shuffle=True)

    losses: list[list[float]] = []  # losses of the steps of each epoch
    for epoch in range(1, options.epochs + 1):
        model.train()
        bar = tqdm(loader, desc=f"epoch {epoch}", leave=False, disable=not trainer.is_main)
        total = 0.0
        losses.append([])
        for inputs, targets in bar:
            loss = trainer.train_step(inputs, targets, criterion, optimizer).item()
            total += loss * len(targets)
            bar.set_postfix(loss=f"{loss:.4f}")
            losses[-1].append(loss)

        model.eval()
        with torch.no_grad():
            predicted = model(images[test_index].to(trainer.device)).argmax(1).cpu()
        accuracy = (predicted == labels[test_index]).float().mean().item()
        if trainer.is_main:
            print(f"epoch {epoch:2d}: loss {total / len(dataset):.4f}, test accuracy {accuracy:.1%}", flush=True)

    results = {"ranks": trainer.world_size, "losses": losses, "weights": model.state_dict()}
    if trainer.is_main and options.results:
        torch.save(results, options.results)
    if trainer.is_main and options.compare:
        compare(torch.load(options.compare), results)


def compare(first: dict[str, Any], second: dict[str, Any]) -> None:
    """Print how far two runs are apart: the losses of each epoch, and the final weights."""
    print(f"{first['ranks']} ranks against {second['ranks']}: losses and weights, at most this far apart (relative):")
    for epoch, both in enumerate(zip(first["losses"], second["losses"], strict=True), 1):
        apart = max(abs(theirs - ours) / theirs for theirs, ours in zip(*both, strict=True))
        print(f"losses of epoch {epoch:2d}, {len(both[0])} steps: {apart:.1e}")
    pairs = [(theirs.cpu().double(), second["weights"][name].cpu()) for name, theirs in first["weights"].items()]
    apart = max(((theirs - ours).abs().max() / theirs.abs().max()).item() for theirs, ours in pairs)
    print(f"weights after {len(first['losses'])} epochs: {apart:.1e} (of each tensor's largest element)")


if __name__ == "__main__":
    main()
