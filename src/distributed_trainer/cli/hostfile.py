# SPDX-License-Identifier: Apache-2.0
"""Read hostfiles in the format of Open MPI or MPICH, and decide how many ranks each host gets."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

_SLOTS = "[0-9]{1,9}"
_LINE = re.compile(rf"(?P<name>\w[\w.-]*)(?::(?P<mpich>{_SLOTS})|\s+slots\s*=\s*(?P<openmpi>{_SLOTS}))?")


@dataclass(frozen=True)
class Host:
    """A machine to run ranks on."""

    name: str
    """Name by which mpirun reaches the machine."""
    slots: int | None
    """Number of ranks that the machine takes; None if the hostfile does not say."""


def read_hostfile(path: str | Path) -> list[Host]:
    """Read a hostfile. Local.

    A line is `name slots=2` (Open MPI's format), `name:2` (MPICH's) or `name`. The slots of several lines with one name
    are added. If a bare name is repeated, as in the node file of PBS, each bare line counts one slot; otherwise bare
    names leave the number of slots open.

    Raises:
        OSError: The file cannot be read.
        ValueError: A line has another form, or only some of the hosts have slots.
    """
    if not str(path):
        raise ValueError("--hostfile is followed by an empty name: name the file, or leave the option out")
    path = Path(path)
    try:
        lines = path.read_text(errors="replace").splitlines()
    except FileNotFoundError:
        raise FileNotFoundError(
            f"there is no hostfile {path.name} in {path.absolute().parent}. Write one with a line for each host: "
            f"`node1 slots=2` starts 2 ranks on node1."
        ) from None
    bare: Counter[str] = Counter()
    slots: Counter[str] = Counter()
    for number, text in enumerate(lines, 1):
        line = text.partition("#")[0].strip()
        if not line:
            continue
        match = _LINE.fullmatch(line)
        count = match and (match["mpich"] or match["openmpi"])
        if match is None or (count and not int(count)):
            raise ValueError(
                f"{path}, line {number}: `{line}` is no host. A line is `node1 slots=2`, `node1:2` or `node1`. Another "
                f"user name or port belongs in ~/.ssh/config; for other features of an MPI's hostfiles call its mpirun."
            )
        if count:
            slots[match["name"]] += int(count)
        else:
            bare[match["name"]] += 1
    if not slots and not bare:
        raise ValueError(f"{path} names no host. Write a line `node1 slots=2` for each.")
    if slots and bare:
        name, other = next(iter(bare)), next(iter(slots))
        raise ValueError(f"{path} says how many slots {other} has, but not {name}. Give all hosts slots, or none.")
    if slots or max(bare.values()) > 1:
        return [Host(name, count) for name, count in (slots or bare).items()]
    return [Host(name, None) for name in bare]


def place_ranks(
    hosts: Sequence[Host], num_ranks: int | None, room: Mapping[str, int], oversubscribe: bool = False
) -> list[Host]:
    """Decide how many ranks each host gets; return the hosts with these numbers as their slots. Local.

    Hosts that get no rank are left out. Slots are filled in the order of the hosts. Without slots `num_ranks` is spread
    evenly over the hosts. With neither, each host gets as many ranks as it has room for.

    Args:
        hosts: Result of `read_hostfile`.
        num_ranks: Number of ranks; None for as many as there are slots.
        room: Number of GPUs, or else of cores, of each host; read only if neither slots nor `num_ranks` are given.
        oversubscribe: Whether there may be more ranks than slots; the excess is spread evenly over the hosts.

    Raises:
        ValueError: There are more ranks than slots, and `oversubscribe` is False.
    """
    if hosts[0].slots is None and num_ranks is None:
        return [replace(host, slots=room[host.name]) for host in hosts]
    total = sum(host.slots or 0 for host in hosts)
    num_ranks = total if num_ranks is None else num_ranks
    if hosts[0].slots is not None and num_ranks > total and not oversubscribe:
        raise ValueError(
            f"-np {num_ranks} is more than the {total} slots of {', '.join(f'{h.name} ({h.slots})' for h in hosts)}. "
            f"Start at most {total}, raise the slots, or pass --oversubscribe so that ranks share them."
        )
    counts = []
    left = num_ranks
    for host in hosts:
        counts.append(min(host.slots or 0, left))
        left -= counts[-1]
    counts = [count + left // len(hosts) + (i < left % len(hosts)) for i, count in enumerate(counts)]
    return [replace(host, slots=count) for host, count in zip(hosts, counts, strict=True) if count]
