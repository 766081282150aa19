# SPDX-License-Identifier: Apache-2.0
"""Train a small transformer to continue English text: the documentation that ships with Python.

mpirun -np 2 python examples/train_characters.py

Each rank reads only its part of each batch (`trainer.loader`). The steps run in microbatches, which need less memory;
the gradients are the same.
"""

import argparse
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from distributed_trainer import create_distributed_trainer

NUM_CLASSES = 64


class Windows(Dataset):
    """Pieces of a text: `length` numbers of characters, and as targets the same piece shifted by one."""

    def __init__(self, tokens: Tensor, length: int) -> None:
        self.tokens, self.length = tokens, length

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        start = index * self.length
        return self.tokens[start : start + self.length], self.tokens[start + 1 : start + self.length + 1]


class Transformer(nn.Module):
    """Transformer that predicts each next character; input [N, length], output [N, NUM_CLASSES, length]."""

    def __init__(self, length: int, width: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(NUM_CLASSES, width)
        self.position = nn.Parameter(torch.zeros(length, width))
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.1, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, NUM_CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits with the classes in dimension 1, as nn.CrossEntropyLoss needs them."""
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], device=tokens.device)
        x = self.layers(self.embedding(tokens) + self.position, mask=mask, is_causal=True)
        return self.head(x).transpose(1, 2)


def read_text() -> tuple[Tensor, str]:
    """Return the documentation as numbers of characters, and the characters; all but the commonest have number 0."""
    text = "".join(topics[name] for name in sorted(topics)).lower()
    alphabet = "?" + "".join(sorted(set(text), key=lambda letter: (-text.count(letter), letter))[: NUM_CLASSES - 1])
    numbers = {letter: number for number, letter in enumerate(alphabet)}
    return torch.tensor([numbers.get(letter, 0) for letter in text]), alphabet


def main() -> None:
    """Train, and print the loss on text not used in training, and text that the model writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-gpus", type=int, help="devices per machine (default: as launched)")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=64, help="samples in the global batch")
    parser.add_argument("--length", type=int, default=64, help="characters in a sample")
    parser.add_argument("--text-length", type=int, help="use only the first characters of the text")
    options = parser.parse_args()

    tokens, alphabet = read_text()
    tokens = tokens[: options.text_length]
    end = len(tokens) * 9 // 10
    torch.manual_seed(0)
    model = Transformer(options.length)
    trainer = create_distributed_trainer(model, num_gpus=options.num_gpus)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    criterion = nn.CrossEntropyLoss()
    train_loader = trainer.loader(Windows(tokens[:end], options.length), options.batch_size, shuffle=True)
    test_loader = trainer.loader(Windows(tokens[end:], options.length), options.batch_size)

    for epoch in range(1, options.epochs + 1):
        for inputs, targets in train_loader:
            trainer.train_step(inputs, targets, criterion, optimizer, microbatches=2, clip_norm=1.0)
        result = trainer.evaluate(test_loader, criterion, {"accuracy": lambda outputs, y: outputs.argmax(1) == y})
        if trainer.is_main:
            print(
                f"epoch {epoch}: test loss {result['loss']:.3f}, characters right {result['accuracy']:.1%}", flush=True
            )

    if trainer.is_main:
        model.eval()
        written = tokens[end : end + options.length].to(trainer.device)
        with torch.no_grad():
            for _ in range(80):
                logits = model(written[-options.length :].unsqueeze(0))[0, :, -1]
                written = torch.cat([written, torch.multinomial(logits.softmax(0), 1)])
        print("".join(alphabet[number] for number in written[options.length :].tolist()))


if __name__ == "__main__":
    main()
