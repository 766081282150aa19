# SPDX-License-Identifier: Apache-2.0
"""Compare the software of all ranks before they exchange anything else.

Without this check, machines whose installations differ would fail later and less clearly: at a message that one side
does not know, or by results that differ.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch

from ..errors import MismatchError
from ..launch.host_facts import package_version

_NUM_NAMED_HOSTS = 3  # in a message; further hosts are only counted
_MAX_CHARACTERS = 80  # for each fact, so that all facts fit the engine's version_text_bytes
_package_version = functools.cache(package_version)  # the process has read the files, so later changes do not count


def describe(module: ModuleType) -> str:
    """Describe the software that this process runs, for `check_alike` on every rank. Local.

    Args:
        module: The engine's module.
    """
    facts = {
        "host": os.uname().nodename,
        "distributed_trainer": _package_version(Path(__file__).parents[1]),
        "its engine": module.engine_version,
        "MPI": " ".join(module.library_version().split(",")[0].split()),
        # The third number of Python's version and torch's build (such as +cu130) may differ between ranks.
        "Python": ".".join(map(str, sys.version_info[:2])),
        "torch": torch.__version__.partition("+")[0],
    }
    return json.dumps({name: fact[:_MAX_CHARACTERS] for name, fact in facts.items()})


def check_alike(descriptions: Sequence[str]) -> None:
    """Compare the software of all ranks. Local.

    Args:
        descriptions: Result of `describe` on each rank, by rank; may come from another version of this package.

    Raises:
        MismatchError: Ranks differ. The same on every rank.
    """
    ranks = [_read(text, rank) for rank, text in enumerate(descriptions)]
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
            f"rank {rank} describes itself as {text[:80]!r}, which this version of distributed_trainer does not "
            f"understand. Install the same version on all machines."
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
