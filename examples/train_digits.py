# SPDX-License-Identifier: Apache-2.0
"""Train a small convolutional network on scikit-learn's digits: 1,797 images of 8x8 pixels that ship in that package.

python examples/train_digits.py                 one process
python examples/train_digits.py --num-gpus 2    two ranks on this machine
mpirun -np 2 python examples/train_digits.py    the same, started by hand
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

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
    parser.add_argument("--results", type=Path, help="write losses, weights and time of this run to a file")
    parser.add_argument("--compare", type=Path, help="print a table of this run and the one in this file")
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

    began = time.perf_counter()
    losses: list[list[float]] = []  # losses of the steps of each epoch
    for epoch in range(1, options.epochs + 1):
        model.train()
        total = 0.0
        losses.append([])
        for inputs, targets in trainer.progress(loader, f"epoch {epoch:2d}"):
            loss = trainer.train_step(inputs, targets, criterion, optimizer).item()
            total += loss * len(targets)
            losses[-1].append(loss)

        model.eval()
        with torch.no_grad():
            predicted = model(images[test_index].to(trainer.device)).argmax(1).cpu()
        accuracy = (predicted == labels[test_index]).float().mean().item()
        if trainer.is_main:
            print(f"epoch {epoch:2d}: loss {total / len(dataset):.4f}, test accuracy {accuracy:.1%}", flush=True)

    seconds = time.perf_counter() - began
    results = {"ranks": trainer.world_size, "seconds": seconds, "accuracy": accuracy, "losses": losses}
    results["weights"] = model.state_dict()
    if trainer.is_main and options.results:
        torch.save(results, options.results)
    if trainer.is_main and options.compare:
        compare(torch.load(options.compare), results)


def compare(first: dict[str, Any], second: dict[str, Any]) -> None:
    """Print a table of two runs, and how far their losses in all epochs and their final weights are apart."""
    print("\nranks  seconds  test accuracy")
    for run in sorted((first, second), key=lambda run: run["ranks"]):
        print(f"{run['ranks']:5d}  {run['seconds']:7.1f}  {run['accuracy']:13.1%}")
    pairs = [pair for both in zip(first["losses"], second["losses"], strict=True) for pair in zip(*both, strict=True)]
    losses = max(abs(one - other) / other for one, other in pairs)
    tensors = [(one.cpu().double(), second["weights"][name].cpu()) for name, one in first["weights"].items()]
    weights = max(((one - other).abs().max() / one.abs().max()).item() for one, other in tensors)
    print(
        f"The losses of all {len(pairs)} steps differ by at most {losses:.1e} of their value, the final weights by at "
        f"most {weights:.1e} of the largest in their tensor."
    )
    if max(losses, weights) > 0.05:  # rounding in 32 bits, which grows from step to step, makes less
        raise SystemExit("The two runs do not have the same result.")


if __name__ == "__main__":
    main()
