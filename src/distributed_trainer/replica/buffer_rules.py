# SPDX-License-Identifier: Apache-2.0
"""Rules by which the ranks' values of a buffer are combined: the option `buffers=`.

With n_r the number of samples of rank r:

    first   the value of the first rank that has samples: the default. It is that of one process if it does not depend
            on the samples, such as a count of steps.
    mean    sum_r n_r value_r / sum_r n_r. It is that of one process if it is linear in a mean over samples, such as a
            moving average of means.
    gather  the rows of all ranks that have samples, in the order of the ranks. It is that of one process if forward
            puts one row per sample into it, in place of the earlier rows.

"mean" and "gather" act after each microbatch, since the next one may read the buffer; "first" acts after each step.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import MismatchError
from .model_state import Description, bytes_of


def match_rules(names: Iterable[str], rules: Mapping[str, str], is_strict: bool = False) -> dict[str, str]:
    """Return the rule of each buffer that a pattern matches: that of the first pattern that matches. Local.

    Args:
        names: Full names of the buffers.
        rules: Rule by pattern (fnmatch).
        is_strict: Raise ValueError for a pattern that is the first to match no buffer.
    """
    names, found, used = list(names), {}, set()
    for name in names:
        pattern = next((pattern for pattern in rules if fnmatch.fnmatchcase(name, pattern)), None)
        if pattern is not None:
            found[name] = rules[pattern]
            used.add(pattern)
    for pattern in rules if is_strict else ():
        if pattern not in used:
            earlier = " that an earlier pattern does not match" if any(fnmatch.filter(names, pattern)) else ""
            raise ValueError(
                f"buffers={{{pattern!r}: {rules[pattern]!r}}} matches no buffer{earlier}. The model's buffers are "
                f"{', '.join(names) or 'none'} (without those of BatchNorm, unless sync_batchnorm=False)."
            )
    return found


def check_mean(name: str, dtype: torch.dtype) -> None:
    """Raise ValueError if the rule "mean" does not fit a buffer's type. Local."""
    if not (dtype.is_floating_point or dtype.is_complex):
        raise ValueError(
            f'buffers: {name} is {str(dtype).removeprefix("torch.")}, but the rule "mean" needs floating-point numbers'
        )


def combine(
    name: str, rule: str, value: Tensor | None, layouts: list[Description], weights: list[float], group: Any
) -> Tensor | None:
    """Combine the ranks' values of a buffer. Collective, blocks.

    Args:
        name: Name of the buffer.
        rule: "mean" or "gather".
        value: This rank's value.
        layouts: Description of each rank's value; None also for ranks without samples.
        weights: Number of samples of each rank, 0 for ranks without.
        group: Process group of the ranks.

    Returns:
        The combined value, None if the ranks' values are None.

    Raises:
        MismatchError: The values do not fit together. The same on every rank.
        ValueError: The rule does not fit the values. The same on every rank.
    """
    num_row_dims = 1 if rule == "gather" else 0  # dimensions that may differ
    first = next(rank for rank, weight in enumerate(weights) if weight)
    layout = layouts[first]
    for rank in range(first, len(weights)):
        if weights[rank] and _fixed(layouts[rank], num_row_dims) != _fixed(layout, num_row_dims):
            raise MismatchError(
                f'buffer {name}, whose rule is "{rule}", is {_text(layout)} on rank {first} and '
                f"{_text(layouts[rank])} on rank {rank}, so it cannot be combined. Give it the same shape on all ranks"
                f"{', except for the number of rows' if num_row_dims else ''}."
            )
    if layout is None:
        return None
    shape, dtype = layout[0], getattr(torch, layout[1].removeprefix("torch."))
    if not layout[2] or len(shape) < num_row_dims:
        raise ValueError(f'buffer {name} is {_text(layout)}: the rule "{rule}" needs a dense tensor with rows')
    own = value.detach() if value is not None and weights[group.rank()] else None
    device = torch.device("cpu") if value is None else value.device
    if rule == "mean":
        check_mean(name, dtype)
        share = weights[group.rank()] / sum(weights)
        return _sum(None if own is None else own, share, shape, dtype, device, group)
    num_rows = [0 if other is None else other[0][0] for other in layouts]
    return _join(own, num_rows, shape[1:], dtype, device, group)


def _sum(
    own: Tensor | None, share: float, shape: list[int], dtype: torch.dtype, device: torch.device, group: Any
) -> Tensor:
    """Return the sum of all ranks' values times their shares. Collective, blocks."""
    wide = torch.promote_types(dtype, torch.float32) if dtype.itemsize > 1 else torch.float32
    result = torch.zeros(shape, dtype=wide, device=device)
    if own is not None:
        torch.mul(own.to(wide), share, out=result)
    group.allreduce([torch.view_as_real(result) if wide.is_complex else result]).wait()
    return result.to(dtype)


def _join(
    own: Tensor | None, num_rows: list[int], shape: list[int], dtype: torch.dtype, device: torch.device, group: Any
) -> Tensor:
    """Return the rows of all ranks, in the order of the ranks; each row has a shape. Collective, blocks."""
    row_bytes = math.prod(shape) * dtype.itemsize
    padded = torch.zeros(max(num_rows) * row_bytes, dtype=torch.uint8, device=device)
    if own is not None:
        data = bytes_of(own)
        padded[: len(data)] = data
    gathered = padded.new_empty(len(num_rows), len(padded))
    group._allgather_base(gathered.view(-1), padded).wait()
    parts = [row[: number * row_bytes] for row, number in zip(gathered, num_rows, strict=True)]
    return torch.cat(parts).view(dtype).view(sum(num_rows), *shape)


def _fixed(layout: Description, num_row_dims: int) -> Any:
    return None if layout is None else (layout[0][num_row_dims:], len(layout[0]), *layout[1:])


def _text(layout: Description) -> str:
    return "None" if layout is None else f"{layout[0]} {layout[1].removeprefix('torch.')}"
