# SPDX-License-Identifier: Apache-2.0
"""Train two models against each other, each with its own optimizer, in a manual loop.

mpirun -np 2 python examples/train_gan.py

A generator learns to make points of a ring; a discriminator learns to distinguish its points from real ones. Each model
has a trainer. `split` returns this rank's part of a batch; `backward` sums gradients over the ranks, by weight; `step`
updates the weights.
"""

import argparse
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distributed_trainer import create_distributed_trainer


def mlp(num_inputs: int, num_outputs: int) -> nn.Module:
    """Make a network of three linear layers."""
    return nn.Sequential(
        nn.Linear(num_inputs, 64), nn.LeakyReLU(0.2), nn.Linear(64, 64), nn.LeakyReLU(0.2), nn.Linear(64, num_outputs)
    )


def ring(num_points: int) -> Tensor:
    """Draw points [N, 2] near the unit circle."""
    angles = torch.rand(num_points, 1) * 2 * math.pi
    return torch.cat([angles.cos(), angles.sin()], 1) + 0.02 * torch.randn(num_points, 2)


def main() -> None:
    """Train, and print how far from the circle the generator's points are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-gpus", type=int, help="devices per machine (default: as launched)")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=256, help="samples in the global batch")
    options = parser.parse_args()

    torch.manual_seed(0)
    generator, discriminator = mlp(8, 2), mlp(2, 1)
    trainer_g = create_distributed_trainer(generator, num_gpus=options.num_gpus)
    trainer_d = create_distributed_trainer(discriminator, num_gpus=options.num_gpus)
    optimizer_g = torch.optim.Adam(generator.parameters(), lr=1e-3, betas=(0.5, 0.9))
    optimizer_d = torch.optim.Adam(discriminator.parameters(), lr=1e-3, betas=(0.5, 0.9))

    for step in range(1, options.steps + 1):
        # All ranks draw the same batch, since their random states agree outside of forward.
        batch = {"real": ring(options.batch_size), "noise": torch.randn(options.batch_size, 8)}
        part = {name: tensor.to(trainer_g.device) for name, tensor in trainer_g.split(batch).items()}
        weight = len(part["real"])
        ones, zeros = torch.ones(weight, 1, device=trainer_g.device), torch.zeros(weight, 1, device=trainer_g.device)

        with trainer_d.forward():
            fake = generator(part["noise"])
            loss_d = F.binary_cross_entropy_with_logits(discriminator(part["real"]), ones)
            loss_d = loss_d + F.binary_cross_entropy_with_logits(discriminator(fake.detach()), zeros)
        optimizer_d.zero_grad()
        loss_d = trainer_d.backward(loss_d, weight=weight)
        trainer_d.step(optimizer_d)

        with trainer_g.forward():
            loss_g = F.binary_cross_entropy_with_logits(discriminator(fake), ones)
        optimizer_g.zero_grad()
        loss_g = trainer_g.backward(loss_g, weight=weight)
        trainer_g.step(optimizer_g)

        if step % 500 == 0 or step == options.steps:
            with torch.no_grad():
                points = generator(torch.randn(1000, 8).to(trainer_g.device))
            distance = (points.norm(dim=1) - 1).abs().mean().item()
            if trainer_g.is_main:
                losses = f"losses {loss_d:.3f} and {loss_g:.3f}"
                print(f"step {step}: {losses}, {distance:.3f} from the circle", flush=True)


if __name__ == "__main__":
    main()
