# SPDX-License-Identifier: Apache-2.0
"""What PowerSGD saves, costs and loses: mpirun -np 2 python benchmarks/compression.py

Takes about four minutes, most of it for a small transformer that is trained to the end of its schedule. The tests run
the same trainings, shorter.
"""

import copy
import math
import runpy
import time
from collections.abc import Iterable
from pathlib import Path
from pydoc_data.topics import topics
from statistics import median
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from mpi4py import MPI
from sklearn.datasets import load_digits
from torch import Tensor, nn

from distributed_trainer import create_distributed_trainer
from distributed_trainer.compression import LowRankBucket, PowerSGD, is_compressed, make_bucket

ROOT = Path(__file__).parents[1]
WINDOW = 32  # characters that the transformer sees


class Characters(nn.Module):
    """A transformer that predicts the next of 64 kinds of characters: 2 layers, width 64, 110,000 parameters."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(64, 64)
        self.position = nn.Parameter(torch.zeros(WINDOW, 64))
        layer = nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(64, 64)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits, classes second as nn.CrossEntropyLoss wants them."""
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        x = self.layers(self.embedding(tokens) + self.position, mask=mask, is_causal=True)
        return self.head(x).transpose(1, 2)


def documentation() -> Tensor:
    """Python's own documentation, which ships with it, as numbers of characters; 0 for all but the 63 commonest."""
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
    """Trains on all ranks."""
    with create_distributed_trainer(model, compression=compression) as trainer:
        for inputs, targets in batches:
            trainer.train_step(inputs, targets, nn.CrossEntropyLoss(), optimizer)
            if scheduler is not None:
                scheduler.step()
        is_compressing = any(isinstance(bucket, LowRankBucket) for bucket in trainer._replica.gradients._buckets)
        assert is_compressing == (compression is not None and trainer.world_size > 1)


def train_characters(compression: PowerSGD | None, num_steps: int) -> tuple[float, float]:
    """Loss and accuracy on 20,000 characters held back, after steps of 32 samples with Adam and a cosine schedule."""
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


def train_digits(compression: PowerSGD | None) -> float:
    """Accuracy of the example's network on 360 images of scikit-learn's digits held back, after 10 epochs."""
    make_model = runpy.run_path(str(ROOT / "examples" / "train_digits.py"))["make_model"]
    digits = load_digits()
    images, labels = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(digits.target)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(labels), generator=generator)
    test, rest = order[:360], order[360:]
    epochs = (rest[torch.randperm(len(rest), generator=generator)].split(128) for _ in range(10))
    torch.manual_seed(0)
    model = make_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    train(model, ((images[part], labels[part]) for epoch in epochs for part in epoch), optimizer, compression)
    model.eval()
    with torch.no_grad():
        return (model(images[test]).argmax(1) == labels[test]).float().mean().item()


def measure_step(title: str, model: nn.Module, inputs: Tensor, targets: Tensor, compression: PowerSGD | None) -> None:
    """Prints bytes that a rank gives to all_reduce in a step, and the step's time. Inputs are one rank's."""
    model = copy.deepcopy(model)
    trainer = create_distributed_trainer(model, compression=compression)
    optimizer = torch.optim.Adam(model.parameters())
    whole = [torch.cat([part] * trainer.world_size) for part in (inputs, targets)]
    group, sent = trainer._replica.gradients._group, []
    all_reduce = group.allreduce
    group.allreduce = lambda tensors, *options: sent.append(tensors[0].nbytes) or all_reduce(tensors, *options)
    seconds = []
    for _ in range(15):
        sent.clear()
        MPI.COMM_WORLD.Barrier()
        before = time.perf_counter()
        trainer.train_step(*whole, nn.CrossEntropyLoss(), optimizer)
        seconds.append(time.perf_counter() - before)
    say(f"{title}, {compression}: {sum(sent):,} bytes in {len(sent)} calls, step {1e3 * median(seconds[3:]):.0f} ms")
    trainer.close()


def measure_computation(title: str, model: nn.Module, compression: PowerSGD) -> None:
    """Prints the time of all that makes factors of gradients and gradients of factors, on all ranks at once."""
    no_exchange = SimpleNamespace(allreduce=lambda tensors: SimpleNamespace(wait=lambda: True))
    buckets = [
        make_bucket(no_exchange, [index], [parameter], compression)
        for index, parameter in enumerate(model.parameters())
        if is_compressed(parameter, compression)
    ]
    seconds = []
    for _ in range(15):
        for bucket in buckets:
            bucket.views[0].normal_()
        MPI.COMM_WORLD.Barrier()
        before = time.perf_counter()
        for part in ("start", "proceed", "finish"):
            for bucket in buckets:
                getattr(bucket, part)()
        seconds.append(time.perf_counter() - before)
    say(f"{title}, {compression}: its computation {1e3 * median(seconds[3:]):.0f} ms")


def say(text: str) -> None:
    if MPI.COMM_WORLD.Get_rank() == 0:
        print(text, flush=True)


def main() -> None:
    """Prints one line for each figure."""
    make = runpy.run_path(str(ROOT / "benchmarks" / "training_step.py"))
    torch.manual_seed(0)
    tokens = torch.randint(0, 65, (4, 64))
    mlp = "MLP 25 M", make["make_mlp"](), torch.randn(32, 1024), torch.randint(0, 1000, (32,))
    transformer = "transformer 10.7 M", make["Transformer"](), tokens, tokens
    both = (None, PowerSGD(rank=4))
    for subject in (mlp, transformer):
        for compression in both:
            measure_step(*subject, compression)
        measure_computation(*subject[:2], PowerSGD(rank=4))
    for compression in both:
        say(f"digits, {compression}: test accuracy {train_digits(compression):.1%}")
    for num_steps in (400, 6000):
        for compression in both:
            loss, accuracy = train_characters(compression, num_steps)
            say(f"characters, {num_steps} steps, {compression}: loss {loss:.4f}, accuracy {accuracy:.1%}")


if __name__ == "__main__":
    main()
