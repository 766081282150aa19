# SPDX-License-Identifier: Apache-2.0
"""Gradients of weight matrices sent as two thin factors, for networks slower than the computation.

Vogels, Karimireddy, Jaggi, "PowerSGD: Practical Low-Rank Gradient Compression for Distributed Optimization" (NeurIPS
2019). A matrix has n rows and m columns; rank k of the group holds

    G_k [n, m]  its gradient, already scaled so that the sum over k is the mean over the global batch
    E_k [n, m]  its error: the part of its earlier gradients that the factors did not represent
    P [n, r], Q [m, r]  the factors, the same bits on every rank once they are reduced; Q is stored transposed

One step has three parts, which are a bucket's `start`, `start_second_phase` and `finish`:

1. M_k = G_k + E_k, P = sum of M_k Q, with the Q of the last step. The reduction of P begins while backward still runs.
2. The columns of P are made orthonormal. Q_k = M_k^T P, Q = sum of Q_k.
3. E_k = M_k - P Q_k^T. The gradient is P Q^T.

Invariant: the gradient and the new errors add up to the sum of all M_k, so a later step adds what this step leaves out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..options import PowerSGD
from .buckets import Bucket, Memory, ReplaceableMemory, is_finite, starts_in_memory, view_like

MIN_RATIO = 2  # A matrix is sent as factors only if it has at least this many times their bytes.


def is_compressed(parameter: nn.Parameter, compression: PowerSGD | None) -> bool:
    """Return whether the gradient is sent as factors. The same on every rank, and for all parameters of a bucket."""
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
    """Make the bucket for parameters of one kind. Collective over the group, blocks."""
    if compression is not None and is_compressed(parameters[0], compression):
        return LowRankBucket(group, indices, parameters, compression.rank, check_finite)
    return Bucket(group, indices, parameters, check_finite)


class LowRankBucket:
    """Bucket whose `views` are replaced by their low-rank sum over the ranks. It has the interface of `Bucket`.

    A step makes two collectives for all matrices together: one for their P and one for their Q.

    Attributes:
        indices: Numbers of the parameters in the bucket. The number seeds the generator that draws a matrix's first Q.
        memory: Memory of the gradients.
        num_missing: Number of gradients that have not arrived in this step.
        is_sharded: False: each rank gets all of the sums.

    Args:
        group: Process group of the ranks. Making a bucket is collective over it, and blocks.
        indices: Numbers of the parameters.
        parameters: The parameters, all of one dtype and device.
        rank: Number of columns of the factors.
        check_finite: Whether `found_nonfinite` will be called; the same on every rank.
    """

    is_sharded = False

    def __init__(
        self, group: Any, indices: list[int], parameters: Sequence[nn.Parameter], rank: int, check_finite: bool = False
    ) -> None:
        self.indices = indices
        self._check_finite = check_finite
        self._found_nonfinite = False
        self._parameters = parameters
        self.memory = ReplaceableMemory(self._allocate)
        # E_k between steps, M_k within one.
        self._errors = [torch.zeros_like(_as_matrix(view), dtype=_factor_dtype(view.dtype)) for view in self.views]
        self._p = Bucket(group, indices, [error.new_empty(error.shape[0], rank) for error in self._errors])
        self._q = Bucket(group, indices, [error.new_empty(rank, error.shape[1]) for error in self._errors])
        self._own_q: list[Tensor] = []
        self.reset_error_feedback()
        self.reset()

    @property
    def views(self) -> list[Tensor]:
        """Places of the gradients, with the parameters' shapes and strides."""
        return self.memory.current.views

    @property
    def results(self) -> list[tuple[Tensor, Tensor]]:
        """A pair for each parameter: the parameter, whose `.grad` becomes the sum, and the sum."""
        return list(zip(self._parameters, self.views, strict=True))

    @property
    def is_started(self) -> bool:
        """Whether the reduction of this step has begun."""
        return self._p.is_started

    def reset(self) -> None:
        """Begin a step. Local."""
        self.num_missing = len(self.indices)
        self._found_nonfinite = False
        self._p.reset()
        self._q.reset()

    # The products below pass `out`, so that autocast does not change their dtype.

    def start(self) -> None:
        """Start to sum P, computed from what the views hold now. Collective; does not wait for other ranks."""
        for view, error, p, q in zip(self.views, self._errors, self._p.views, self._q.views, strict=True):
            error.add_(_as_matrix(view))
            torch.mm(error, q.T, out=p)
        self._p.start()

    def start_second_phase(self) -> None:
        """Wait for P, then start to sum Q. Collective, blocks."""
        self._p.finish()
        with _one_thread():
            for p in self._p.views:
                _make_orthonormal(p)
        for matrix, p, q in zip(self._errors, self._p.views, self._q.views, strict=True):
            torch.mm(p.T, matrix, out=q)
        self._own_q = [q.clone() for q in self._q.views]
        self._q.start()

    def finish(self, unused: Collection[int] = ()) -> None:
        """Wait for Q, and put the sums into the views. Blocks.

        Args:
            unused: Numbers of parameters that no rank used. Their errors are kept, and their views are meaningless.
        """
        self._q.finish()
        for position, index in enumerate(self.indices):
            view, matrix, p, q = (
                tensors[position] for tensors in (self.views, self._errors, self._p.views, self._q.views)
            )
            gradient = _as_matrix(view)
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
                _draw(q, index)  # otherwise the next P would be 0 for every gradient
        self._own_q = []

    def done_at_ns(self) -> int | None:
        """Return when both sums were complete, as `Bucket.done_at_ns` does. Local."""
        return self._q.done_at_ns()

    def found_nonfinite(self) -> bool:
        """Return, after `finish`, whether a sum is infinite or NaN. Local; the same on every rank."""
        return self._found_nonfinite

    def reset_error_feedback(self) -> None:
        """Set the errors to zero and draw each Q again. Local."""
        for index, error, q in zip(self.indices, self._errors, self._q.views, strict=True):
            error.zero_()
            _draw(q, index)

    def scale_error_feedback(self, factor: float) -> None:
        """Multiply the errors. Local; between steps."""
        torch._foreach_mul_(self._errors, factor)

    def close(self) -> None:
        """Release the factors' memory. Local."""
        self._p.close()
        self._q.close()

    def _allocate(self) -> Memory:
        starts, num_elements = starts_in_memory(self._parameters)
        like = self._parameters[0]
        flat = torch.zeros(num_elements, dtype=like.dtype, device=like.device)
        return Memory(flat, [view_like(p, flat[start:]) for start, p in zip(starts, self._parameters, strict=True)])


def _factor_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.itemsize < 4 else dtype


def _as_matrix(tensor: Tensor) -> Tensor:
    """Return a dense tensor as a matrix, with a row for each index of the dimension that is outermost in memory.

    Unless the tensor was transposed, this is its first dimension.
    """
    _, rows = max(zip(tensor.stride(), tensor.shape, strict=True))
    columns = tensor.numel() // rows
    return tensor.as_strided((rows, columns), (columns, 1))


def _draw(q: Tensor, seed: int) -> None:
    """Fill a Q with random numbers from a new generator. Every rank draws the same numbers."""
    generator = torch.Generator().manual_seed(seed)
    q.copy_(torch.randn(q.shape, generator=generator, dtype=torch.float64))


def _make_orthonormal(p: Tensor) -> None:
    # P is not finite if any rank's matrix is not finite. Then NaN marks the matrix in all later parts, on every rank.
    p.copy_(torch.linalg.qr(p)[0]) if p.isfinite().all() else p.fill_(torch.nan)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Use one thread in torch: the bits of a product depend on the number of threads, which may differ between ranks.

    The same is true for a decomposition.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
