# SPDX-License-Identifier: Apache-2.0
"""Layout of the buckets: the gradients that share a bucket, and the order in which buckets are sent on every rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..backend.gather import gather_objects
from ..options import PowerSGD
from .powersgd import is_compressed

# Large enough that a call costs little beside its transfer; small enough that most buckets are sent during backward.
BUCKET_BYTES = 4 << 20


@dataclass(frozen=True)
class Layout:
    """Facts that a rank knows about its gradients after the first step."""

    arrivals: list[int]
    """Numbers of the parameters, in the order in which their gradients became ready."""
    needed: list[int]
    """Numbers of the parameters that are trained, or have a gradient since they were trained earlier in the step."""
    sparse: list[int]
    """Numbers of the parameters whose gradients are sparse."""


def agree(own: Layout, group: Any) -> tuple[list[int], list[int]]:
    """Agree with the other ranks on the order of the gradients. Collective, blocks.

    Returns:
        The order of the parameters in the buckets, which is rank 0's order of arrival, then the needed parameters that
        had no gradient there; and the parameters whose gradients are sparse on any rank, which get a bucket each.
    """
    layouts = gather_objects(group, own)
    sparse: set[int] = set().union(*(layout.sparse for layout in layouts))
    needed: set[int] = set().union(*(layout.needed for layout in layouts))
    order = dict.fromkeys([*layouts[0].arrivals, *sorted(needed, reverse=True)])
    return [index for index in order if index not in sparse], sorted(sparse)


def runs(order: Sequence[int], parameters: Sequence[nn.Parameter], compression: PowerSGD | None) -> Iterator[list[int]]:
    """Cut the order, within each kind of parameter, into runs of about BUCKET_BYTES. Each run becomes a bucket."""
    open_runs: dict[tuple[torch.dtype, torch.device, bool], tuple[list[int], int]] = {}
    for index in order:
        parameter = parameters[index]
        kind = (parameter.dtype, parameter.device, is_compressed(parameter, compression))
        run, num_bytes = open_runs.pop(kind, ([], 0))
        run.append(index)
        num_bytes += parameter.numel() * parameter.element_size()
        if num_bytes >= BUCKET_BYTES:
            yield run
        else:
            open_runs[kind] = (run, num_bytes)  # inserted last: runs left over are sent in the order of their ends
    for run, _ in open_runs.values():
        yield run
