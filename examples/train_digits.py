# SPDX-License-Identifier: Apache-2.0
"""Trains a small convolutional network on scikit-learn's digits: 1,797 images of 8x8 pixels that ship in that package.

python examples/train_digits.py                 one process
python examples/train_digits.py --num-gpus 2    two ranks on this machine
mpirun -np 2 python examples/train_digits.py    the same, started by hand
"""

import argparse
import json
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from tqdm import tqdm

from distributed_trainer import create_distributed_trainer


def make_model() -> nn.Module:
    """Two convolutions with BatchNorm and one linear layer; input [N, 1, 8, 8], output [N, 10]."""
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
    """Trains, prints a line for each epoch and the accuracy on the images that were held back."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-gpus", type=int, help="devices per machine (default: as launched)")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=128, help="of the global batch")
    parser.add_argument("--losses", type=Path, help="write the losses of the first epoch to this file")
    parser.add_argument("--compare", type=Path, help="say how far they are from those in this file")
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

    losses: list[float] = []
    for epoch in range(1, options.epochs + 1):
        model.train()
        bar = tqdm(loader, desc=f"epoch {epoch}", leave=False, disable=trainer.rank != 0)
        total = 0.0
        for inputs, targets in bar:
            loss = trainer.train_step(inputs, targets, criterion, optimizer).item()
            total += loss * len(targets)
            bar.set_postfix(loss=f"{loss:.4f}")
            if epoch == 1:
                losses.append(loss)

        model.eval()
        with torch.no_grad():
            predicted = model(images[test_index].to(trainer.device)).argmax(1).cpu()
        accuracy = (predicted == labels[test_index]).float().mean().item()
        if trainer.rank == 0:
            print(f"epoch {epoch:2d}: loss {total / len(dataset):.4f}, test accuracy {accuracy:.1%}", flush=True)

    if trainer.rank == 0 and options.losses:
        options.losses.write_text(json.dumps({"ranks": trainer.world_size, "losses": losses}))
    if trainer.rank == 0 and options.compare:
        other = json.loads(options.compare.read_text())
        apart = max(abs(ours - theirs) / theirs for ours, theirs in zip(losses, other["losses"], strict=True))
        print(
            f"losses of the first epoch, {other['ranks']} ranks against {trainer.world_size}: "
            f"{len(losses)} steps, at most {apart:.1e} apart (relative)"
        )


if __name__ == "__main__":
    main()
