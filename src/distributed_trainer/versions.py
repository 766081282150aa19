# SPDX-License-Identifier: Apache-2.0
"""What each rank runs, compared before anything else passes between the ranks.

Machines whose installations differ would fail later, and oddly: at a message that one side does not know, or with
results that differ.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .errors import MismatchError
from .host_facts import package_version

_NUM_NAMED_HOSTS = 3  # in a message; the others are counted
_MAX_CHARACTERS = 80  # of a fact: all of them must fit the engine's introduction_bytes
_package_version = functools.cache(package_version)  # of files that this process has read already


def introduce(module: Any) -> str:
    """Says what this process runs, for `check_alike` on every rank. Local.

    Args:
        module: The engine's.
    """
    facts = {
        "host": os.uname().nodename,
        "distributed_trainer": _package_version(Path(__file__).parent),
        "its engine": module.engine_version,
        "MPI": " ".join(module.library_version().split(",")[0].split()),
        # What is left out makes no difference that matters: bug fixes of Python, and for which devices torch was built.
        "Python": ".".join(map(str, sys.version_info[:2])),
        "torch": torch.__version__.partition("+")[0],
    }
    return json.dumps({name: fact[:_MAX_CHARACTERS] for name, fact in facts.items()})


def check_alike(introductions: Sequence[str]) -> None:
    """Compares what all ranks run. Local.

    Args:
        introductions: Of each rank, which may be from another version of `introduce`.

    Raises:
        MismatchError: Ranks differ. The same on every rank.
    """
    ranks = [_read(text, rank) for rank, text in enumerate(introductions)]
    names = list(dict.fromkeys(name for facts in ranks for name in facts if name != "host"))
    differences = [f"\n  {name}: {_by_value(name, ranks)}" for name in names if len({r.get(name) for r in ranks}) > 1]
    if differences:
        raise MismatchError(
            f"the machines of this job run different software, so their ranks can't work together:"
            f"{''.join(differences)}\nInstall the same on all: one wheel of distributed_trainer, or one checkout built "
            f"again on each, and one version of torch, Python and MPI."
        )


def _read(text: str, rank: int) -> dict[str, str]:
    try:
        facts = json.loads(text)
    except (ValueError, RecursionError):
        facts = None
    if not isinstance(facts, dict):
        raise MismatchError(
            f"rank {rank} says of itself {text[:80]!r}, which this version of distributed_trainer does not understand. "
            f"Install the same version on all machines."
        )
    return {name: str(fact) for name, fact in facts.items()}


def _by_value(name: str, ranks: Sequence[dict[str, str]]) -> str:
    hosts: dict[str, list[str]] = {}
    for facts in ranks:
        of_value = hosts.setdefault(facts.get(name, "unknown"), [])
        host = facts.get("host", "an unknown host")
        if host not in of_value:
            of_value.append(host)
    parts = []
    for value, where in hosts.items():
        others = f" and {len(where) - _NUM_NAMED_HOSTS} more" if len(where) > _NUM_NAMED_HOSTS else ""
        parts.append(f"{value} on {', '.join(where[:_NUM_NAMED_HOSTS])}{others}")
    return "; ".join(parts)
