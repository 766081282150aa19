# SPDX-License-Identifier: Apache-2.0
"""PowerSGD as one process computes it for all ranks, and a model whose gradients it compresses."""

import functools

import torch
import torch.nn.functional as F
from small_models import F64, regression_batch
from torch import nn


class Net(nn.Module):
    """Convolution and two linear layers whose weights are compressed up to rank 2, and one whose weight is not."""

    def __init__(self, dtype=F64, memory_format=torch.contiguous_format):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 16, 3, dtype=dtype)
        self.first = nn.Linear(64, 20, dtype=dtype)
        self.second = nn.Linear(20, 24, dtype=dtype)
        self.last = nn.Linear(24, 3, dtype=dtype)
        self.to(memory_format=memory_format)

    def forward(self, x):
        x = torch.tanh(self.first(torch.tanh(self.conv(x)).flatten(1)))
        return self.last(torch.tanh(self.second(x)))


COMPRESSED = ["conv.weight", "first.weight", "second.weight"]

batch = functools.partial(regression_batch, inputs=(2, 4, 4), outputs=3)


def assert_close(actual, expected, tolerance, name=""):
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max(), name


class Simulation:
    """Compression of all ranks in one process, by projections, which do not depend on the basis that QR chooses."""

    def __init__(self, model, num_ranks, rank):
        self.num_ranks = num_ranks
        self.of = {name: index for index, (name, _) in enumerate(model.named_parameters()) if name in COMPRESSED}
        self.errors = {name: [0.0] * num_ranks for name in self.of}
        self.q = {}
        for name, parameter in model.named_parameters():
            if name in self.of:
                generator = torch.Generator().manual_seed(self.of[name])
                self.q[name] = torch.randn(rank, parameter[0].numel(), generator=generator, dtype=F64).T

    def reduce(self, name, of_ranks):
        """Return a parameter's gradient for the whole batch, from the ranks' gradients."""
        if name not in self.of:
            return sum(of_ranks)
        matrices = [g.flatten(1) + error for g, error in zip(of_ranks, self.errors[name], strict=True)]
        directions = torch.linalg.svd(sum(matrices) @ self.q[name], full_matrices=False)[0]
        projection = directions @ directions.T
        self.errors[name] = [matrix - projection @ matrix for matrix in matrices]
        self.q[name] = sum(matrices).T @ directions
        return (projection @ sum(matrices)).view_as(of_ranks[0])

    def gradients(self, model, x, y):
        """Return the gradients of one step, with parts cut as the trainer does; a rank without samples gives zeros."""
        of_ranks = []
        for start, stop in bounds(len(x), self.num_ranks):
            model.zero_grad()
            if stop > start:
                (F.mse_loss(model(x[start:stop]), y[start:stop]) * ((stop - start) / len(x))).backward()
            of_ranks.append({n: torch.zeros_like(p) if stop == start else p.grad for n, p in model.named_parameters()})
            model.zero_grad()
        return {name: self.reduce(name, [of_rank[name] for of_rank in of_ranks]) for name in of_ranks[0]}


def bounds(num_samples, num_ranks):
    share, longer = divmod(num_samples, num_ranks)
    start = 0
    for rank in range(num_ranks):
        stop = start + share + (rank < longer)
        yield start, stop
        start = stop
