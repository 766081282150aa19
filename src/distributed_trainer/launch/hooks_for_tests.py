# SPDX-License-Identifier: Apache-2.0
"""Variables by which tests make the package behave differently. Users need none."""

from __future__ import annotations

from collections.abc import Mapping

RANKS_PER_NODE = "DTRAIN_RANKS_PER_NODE"
"""Variable with the number of ranks that count as one machine's, so that one machine can stand for several."""


def ranks_per_node(environ: Mapping[str, str]) -> int:
    """Return how many ranks at most count as one machine's; 0 for as many as the machine really has. Local."""
    return int(environ.get(RANKS_PER_NODE, "0"))
