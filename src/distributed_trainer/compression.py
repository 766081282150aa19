# SPDX-License-Identifier: Apache-2.0
"""Gradients of weight matrices sent as two thin factors, for networks slower than the computation.

Vogels, Karimireddy, Jaggi, "PowerSGD: Practical Low-Rank Gradient Compression for Distributed Optimization" (NeurIPS
2019). A matrix has n rows and m columns; rank k of the group holds

    G_k [n, m]  its gradient, already scaled so that the sum over k is the mean over the global batch
    E_k [n, m]  its error: what it had to give in earlier steps and the factors did not hold
    P [n, r], Q [m, r]  the factors, the same bits on every rank once they are reduced; Q is stored transposed

One step, whose three parts are a bucket's `start`, `proceed` and `finish`:

1. M_k = G_k + E_k, P = sum of M_k Q, with the Q of the last step. Its reduction begins while backward still runs.
2. The columns of P are made orthonormal. Q_k = M_k^T P, Q = sum of Q_k.
3. E_k = M_k - P Q_k^T. The gradient is P Q^T.

Invariant: the gradient and the new errors add up to all M_k, so what a step leaves out comes in a later one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .buckets import Bucket, is_finite

MIN_RATIO = 2  # How many times smaller the factors must be than their matrix, or it is sent as it is.


@dataclass(frozen=True)
class PowerSGD:
    """Low-rank compression of gradients, with error feedback: for `create_distributed_trainer(compression=...)`.

    The gradient of a weight [n, ...], seen as a matrix of n rows, is sent as two factors of `rank` columns wherever
    these have at most half its bytes. Biases, norms and small weights are sent as they are. What the factors do not
    hold stays on its rank and is added to the gradient of the next step.

    This is lossy: parameters differ from those of a run without it, though not between ranks on the same kind of CPU.
    With one rank nothing is compressed. A rank without samples sends what it kept of earlier steps, and a parameter
    that no rank used keeps it. A gradient that is not finite on any rank becomes NaN as a whole on every rank, and what
    was kept of that matrix is dropped, so that later steps are free of it. Everything that was kept is dropped when a
    parameter is frozen or unfrozen, and when a step is skipped for such a gradient (`nonfinite_gradients`).

    Each rank keeps one more copy of the compressed gradients, in float32 for 16-bit parameters, as are the factors.
    """

    rank: int = 4
    """Columns of the factors. More are nearer to the exact gradient, and cost more bytes."""

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or isinstance(self.rank, bool):
            raise TypeError(f"PowerSGD: rank must be an int, not {type(self.rank).__name__}")
        if self.rank < 1:
            raise ValueError(f"PowerSGD: rank must be at least 1, not {self.rank}")


def is_compressed(parameter: nn.Parameter, compression: PowerSGD | None) -> bool:
    """Whether the gradient is sent as factors. The same on every rank, and for all of a bucket."""
    if compression is None or parameter.dim() < 2 or parameter.numel() == 0:
        return False
    rows, columns = _as_matrix(torch.empty_like(parameter, device="meta")).shape
    factor_bytes = (rows + columns) * compression.rank * _factor_dtype(parameter.dtype).itemsize
    return MIN_RATIO * factor_bytes <= parameter.numel() * parameter.element_size()


def make_bucket(
    group: Any,
    indices: list[int],
    parameters: Sequence[nn.Parameter],
    compression: PowerSGD | None,
    check_finite: bool = False,
) -> Bucket | LowRankBucket:
    """Makes the bucket for parameters of one kind. Collective over the group, blocks."""
    if compression is not None and is_compressed(parameters[0], compression):
        return LowRankBucket(group, indices, parameters, compression.rank, check_finite)
    return Bucket(group, indices, parameters, check_finite)


class LowRankBucket:
    """Puts the low-rank sum over the ranks of what `views` hold into them. The methods of a `Bucket`, and its calls.

    Two collectives for all matrices together, of their P and of their Q.

    Attributes:
        indices: Numbers of the parameters in it. The first Q of a matrix is drawn from a generator seeded with its.
        views: Places of their gradients, of their shapes and strides.
        results: For each of them, the parameter whose `.grad` the sum becomes, and the sum.
        num_missing: How many gradients have not come in this step.
        gives_parts: As of `Bucket`.

    Args:
        group: A process group. Making a bucket is collective over it, and blocks.
        indices: Numbers of the parameters.
        parameters: Those, of one dtype and device.
        rank: Columns of the factors.
        check_finite: For `found_nonfinite`; the same on every rank.
    """

    gives_parts = False

    def __init__(
        self, group: Any, indices: list[int], parameters: Sequence[nn.Parameter], rank: int, check_finite: bool = False
    ) -> None:
        self.indices = indices
        self._check_finite = check_finite
        self._found_nonfinite = False
        self.views = [torch.zeros_like(parameter, requires_grad=False) for parameter in parameters]
        self.results = list(zip(parameters, self.views, strict=True))
        self._gradients = [_as_matrix(view) for view in self.views]
        # E_k between steps, M_k within one.
        self._errors = [torch.zeros_like(gradient, dtype=_factor_dtype(gradient.dtype)) for gradient in self._gradients]
        self._p = Bucket(group, indices, [error.new_empty(error.shape[0], rank) for error in self._errors])
        self._q = Bucket(group, indices, [error.new_empty(rank, error.shape[1]) for error in self._errors])
        self._own_q: list[Tensor] = []
        self.forget()
        self.reset()

    @property
    def is_started(self) -> bool:
        """Whether the reduction of this step has begun."""
        return self._p.is_started

    def reset(self) -> None:
        """Begins a step. Local."""
        self.num_missing = len(self.indices)
        self._found_nonfinite = False
        self._p.reset()
        self._q.reset()

    # Products below have `out`, which keeps autocast out of them.

    def start(self) -> None:
        """Begins the sum of P, from what the views hold now. Collective; returns after local work."""
        for gradient, error, p, q in zip(self._gradients, self._errors, self._p.views, self._q.views, strict=True):
            error.add_(gradient)
            torch.mm(error, q.T, out=p)
        self._p.start()

    def proceed(self) -> None:
        """Waits for P and begins the sum of Q. Collective, blocks."""
        self._p.finish()
        with _one_thread():
            for p in self._p.views:
                _make_orthonormal(p)
        for matrix, p, q in zip(self._errors, self._p.views, self._q.views, strict=True):
            torch.mm(p.T, matrix, out=q)
        self._own_q = [q.clone() for q in self._q.views]
        self._q.start()

    def finish(self, unused: Collection[int] = ()) -> None:
        """Waits for Q, after which the views hold the sums. Blocks.

        Args:
            unused: Numbers of parameters that no rank used. They keep their errors, and their views mean nothing.
        """
        self._q.finish()
        for position, index in enumerate(self.indices):
            gradient, matrix, p, q = (
                tensors[position] for tensors in (self._gradients, self._errors, self._p.views, self._q.views)
            )
            if not q.isfinite().all():
                gradient.fill_(torch.nan)
                matrix.zero_()
                _draw(q, index)
                self._found_nonfinite |= index not in unused
                continue
            if index not in unused:
                matrix.addmm_(p, self._own_q[position], alpha=-1)
                product = gradient if gradient.dtype == p.dtype else torch.empty_like(matrix)
                with _one_thread():
                    torch.mm(p, q, out=product)
                if product is not gradient:
                    gradient.copy_(product)
                if self._check_finite and not is_finite(gradient):  # the product may overflow
                    self._found_nonfinite = True
            if not q.any():
                _draw(q, index)  # Else the next P would be 0, whatever the gradient.
        self._own_q = []

    def done_at_ns(self) -> int | None:
        """As of `Bucket`: when both sums were there. Local."""
        return self._q.done_at_ns()

    def found_nonfinite(self) -> bool:
        """Whether a sum is infinite or NaN, after `finish`; the same on every rank. Local."""
        return self._found_nonfinite

    def forget(self) -> None:
        """Drops what is kept for later steps. Local."""
        for index, error, q in zip(self.indices, self._errors, self._q.views, strict=True):
            error.zero_()
            _draw(q, index)

    def close(self) -> None:
        """Gives the factors' memory back. Local."""
        self._p.close()
        self._q.close()


def _factor_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.itemsize < 4 else dtype


def _as_matrix(tensor: Tensor) -> Tensor:
    """A dense tensor as [outermost dimension in memory, rest]: the first dimension, unless it was transposed."""
    _, rows = max(zip(tensor.stride(), tensor.shape, strict=True))
    columns = tensor.numel() // rows
    return tensor.as_strided((rows, columns), (columns, 1))


def _draw(q: Tensor, seed: int) -> None:
    """Fills a Q with what every rank draws alike, from a stream of its own."""
    generator = torch.Generator().manual_seed(seed)
    q.copy_(torch.randn(q.shape, generator=generator, dtype=torch.float64))


def _make_orthonormal(p: Tensor) -> None:
    # Not finite if any rank's matrix is not: NaN in all that follows, on every rank.
    p.copy_(torch.linalg.qr(p)[0]) if p.isfinite().all() else p.fill_(torch.nan)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """The bits of a decomposition or product depend on the number of threads, which may differ between ranks."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
