# SPDX-License-Identifier: Apache-2.0
"""Make the report of `distributed-trainer check` from what it found on the ranks, as JSON and as one screen of text.

Nothing here communicates.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

from ..launch import hooks_for_tests
from ..launch.host_facts import warn_of_shared_memory

_MAX_ROWS = 12  # so many fit on a screen


def problem(text: str, is_fatal: bool = False) -> dict[str, Any]:
    """Return a problem for a report: `text` has cause and remedy; `is_fatal` if something will not work."""
    return {"text": text, "is_fatal": is_fatal}


def make_report(facts: Sequence[dict[str, Any]], speed: dict[str, Any]) -> dict[str, Any]:
    """Make the report of `check`.

    Args:
        facts: Result of `check_ranks.gather_facts`, by rank.
        speed: Result of `check_ranks.measure`.
    """
    first = facts[0]
    hosts = [_host(ranks) for ranks in _by_host(facts)]
    report = {
        key: first[key] for key in ("mpi", "python", "torch", "package", "engine", "kernels", "paths", "launcher")
    }
    report |= {"world_size": len(facts), "hosts": hosts, "all_reduce": speed}
    report["problems"] = _find_problems(facts, hosts)
    return report


def _by_host(facts: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Group facts by machine; a container with a separate name or network counts as a machine."""
    hosts: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for fact in facts:
        hosts.setdefault(tuple(fact["machine"]), []).append(fact)
    return list(hosts.values())


def _host(ranks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    first = ranks[0]
    cores = len(set().union(*(fact["core_ids"] for fact in ranks)))
    if all(fact["cpu_limit"] for fact in ranks):  # ranks of several containers may have limits of several groups
        cores = min(cores, math.ceil(sum(cpus for _, cpus in {tuple(fact["cpu_limit"]) for fact in ranks})))
    return {
        "name": first["name"],
        "ranks": [fact["rank"] for fact in ranks],
        "cores": cores,
        "threads": sorted({fact["threads"] for fact in ranks}),
        "shares_memory": len({fact["node"] for fact in ranks}) == 1,
        "gpus": sorted({f"{fact['device']} {fact['gpu']}" for fact in ranks if fact["gpu"]}),
        "free_shared_memory": first["free_shared_memory"],
        "leftovers": first["leftovers"],
    }


def _find_problems(facts: Sequence[dict[str, Any]], hosts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    problems = []
    for host, ranks in zip(hosts, _by_host(facts), strict=True):
        name, first = host["name"], ranks[0]
        if first["binding"]:
            problems.append(problem(f"{name}: {first['binding']}."))
        elif len(ranks) > host["cores"] and not host["gpus"]:
            text = f"{name}: {len(ranks)} ranks share {host['cores']} core(s) and take turns. Start fewer ranks there."
            problems.append(problem(text))
        if first["has_gpu_driver"] and first["device"] == "cpu":
            text = f"{name} has GPUs, but torch {first['torch']} uses none. See `nvidia-smi`; install a build for GPUs."
            problems.append(problem(text))
        shm = warn_of_shared_memory(first["family"], len(ranks), host["free_shared_memory"], name)
        problems += [problem(text) for text in shm]
        if host["leftovers"]:
            problems.append(problem(_about_leftovers(name, host["leftovers"])))
        if any(fact["is_apart"] for fact in ranks) and len(ranks) > 1:
            text = (
                f"{name}: its ranks are in separate containers. They do share the engine's memory, but MPI's own "
                f"messages between them are slower. Start them in one container, or pass --pid=host --ipc=host."
            )
            problems.append(problem(text))
    return problems + _find_torn_machines(facts)


def _find_torn_machines(facts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Find machines whose ranks the engine treats as several nodes."""
    problems = []
    machines: dict[str, list[dict[str, Any]]] = {}
    for fact in facts:
        machines.setdefault(fact["machine"][0], []).append(fact)
    for ranks in machines.values():
        if len({fact["node"] for fact in ranks}) == 1:
            continue
        names = " and ".join(dict.fromkeys(fact["name"] for fact in ranks))
        if len({fact["network"] for fact in ranks}) > 1:
            text = (
                f"{names} are one machine, but its ranks have separate networks, so they share no memory and use MPI. "
                f"Start the containers with --network=host, or all ranks of a machine in one container."
            )
        elif hooks_for_tests.ranks_per_node(os.environ):
            text = f"{hooks_for_tests.RANKS_PER_NODE} keeps ranks of one machine from sharing memory. Unset it."
        else:
            text = (
                f"{names}: ranks of one machine can't map each other's memory, so they use MPI. See the settings of "
                f"their container."
            )
        problems.append(problem(text))
    return problems


def _about_leftovers(host: str, files: Sequence[str]) -> str:
    shown = " ".join(files[:3]) + (" ..." if len(files) > 3 else "")
    return (
        f"{host}: {len(files)} file(s) in /dev/shm are left of MPI jobs that were killed. If no other job runs there, "
        f"remove them: `rm {shown}`."
    )


def render(report: dict[str, Any]) -> str:
    """Return the report as one screen of text."""
    lines = []
    if "hosts" in report:
        paths = report["paths"]
        for title, value, path in (
            ("MPI", report["mpi"], paths["mpi"]),
            ("started by", report["launcher"] or "a launcher that is not visible here", ""),
            ("Python", report["python"], paths["python"]),
            ("torch", report["torch"], paths["torch"]),
            ("package", report["package"], paths["package"]),
            ("engine", report["engine"], f"{report['kernels']} kernels"),
        ):
            lines.append(f"{title:<12}{value}  {path}".rstrip())
        if len(report["hosts"]) > 1:
            lines.append(f"            the same on all {len(report['hosts'])} hosts")
        lines += ["", *_table(report["hosts"]), "", *_about_speed(report)]
    problems = report["problems"]
    lines += ["", f"{len(problems)} problem{'s' if len(problems) != 1 else ''}{':' if problems else ''}"]
    shown = problems[:_MAX_ROWS]
    lines += [f"{'WILL NOT WORK' if item['is_fatal'] else 'look at'}: {item['text']}" for item in shown]
    lines += [f"... and {len(problems) - len(shown)} more"] if len(problems) > len(shown) else []
    return "\n".join(lines).strip()


def _table(hosts: Sequence[dict[str, Any]]) -> list[str]:
    rows = [("host", "ranks", "cores", "threads", "memory", "/dev/shm free", "GPUs")]
    for host in hosts[:_MAX_ROWS]:
        ranks, threads = host["ranks"], host["threads"]
        is_row = ranks == list(range(ranks[0], ranks[-1] + 1)) and len(ranks) > 1
        memory = ("one rank" if len(ranks) == 1 else "shared") if host["shares_memory"] else "NOT SHARED"
        rows.append(
            (
                host["name"],
                f"{ranks[0]}-{ranks[-1]}" if is_row else ",".join(map(str, ranks)),
                str(host["cores"]),
                "-".join(map(str, sorted({threads[0], threads[-1]}))) + " each",
                memory,
                f"{host['free_shared_memory'] >> 20} MiB",
                ", ".join(host["gpus"]) or "none",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return lines + ([f"... and {len(hosts) - _MAX_ROWS} more"] if len(hosts) > _MAX_ROWS else [])


def _about_speed(report: dict[str, Any]) -> list[str]:
    inside, between = report["all_reduce"]["inside"], report["all_reduce"]["between"]
    lines = []
    if any(host["gpus"] for host in report["hosts"]):
        lines.append("GPU tensors go to NCCL where torch has it, else through host memory")
    if inside:
        lines.append(
            f"all_reduce on a machine, {inside['bytes'] >> 20} MiB: {_rate(inside['bytes'], inside['seconds'])}, over "
            f"shared memory; each rank copies at {_rate(inside['bytes'], inside['copy_seconds'])}"
        )
    if between:
        interfaces = ", ".join(between["interfaces"]) or "no interface that Linux counts"
        lines.append(
            f"all_reduce over all, {between['bytes'] >> 20} MiB: {_rate(between['bytes'], between['seconds'])}, "
            f"between machines over {interfaces}; the network alone takes {1e3 * between['wire_seconds']:.3g} ms "
            f"({between['wire_bytes_per_second'] / 1e6:.4g} MB/s each way)"
        )
    return lines


def _rate(num_bytes: int, seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms ({num_bytes / seconds / 1e6:.4g} MB/s)"
