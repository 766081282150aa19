# SPDX-License-Identifier: Apache-2.0
"""Runs the benchmarks, and writes a table, the figures as JSON and two plots: python benchmarks/run.py FOLDER

The allocator's settings are a process's, and so is memory: what differs in them takes turns, launch by launch, three
times, and figures are medians over the launches.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib.pyplot as plt

NUM_ROUNDS = 3
SECONDS_PER_MODEL = "10"
BENCHMARKS = Path(__file__).parent
# Script, arguments, ranks, variables.
LAUNCHES: list[tuple[str, list[str], int, dict[str, str]]] = [
    ("all_reduce.py", [], 2, {}),
    ("training_step.py", [], 2, {}),
    ("training_step.py", [], 2, {"DTRAIN_MALLOC": "default"}),
    ("training_step.py", ["mlp"], 4, {}),
    ("loading.py", [], 2, {}),
    *(("memory.py", [contender], 2, {}) for contender in ("plain", "ours", "sharded")),
]


def launch(script: str, arguments: list[str], num_ranks: int, variables: dict[str, str], results: Path) -> None:
    """Runs a benchmark under this environment's mpirun; its lines go to `results`."""
    command = [f"{sys.prefix}/bin/mpirun", "--bind-to", "none", "-np", str(num_ranks), sys.executable]
    environ = {**os.environ, "BENCH_SECONDS": SECONDS_PER_MODEL, "BENCH_RESULTS": str(results), **variables}
    subprocess.run([*command, str(BENCHMARKS / script), *arguments], env=environ, check=True)


def key_of(result: dict[str, Any]) -> str:
    """What a result is of, the same in each round."""
    names = ("benchmark", "model", "KiB", "ranks", "allocator", "contender")
    return ", ".join(f"{name} {result[name]}" for name in names if name in result)


def medians(results: list[dict[str, Any]]) -> dict[str, Any]:
    """One of results of the same kind: of each number the median."""

    def merge(values: list[Any]) -> Any:
        if isinstance(values[0], dict):
            return {name: merge([value[name] for value in values]) for name in values[0]}
        return median(values) if isinstance(values[0], (int, float)) else values[0]

    groups = defaultdict(list)
    for result in results:
        groups[key_of(result)].append(result)
    return {key: merge(group) for key, group in groups.items()}


def table(figures: dict[str, Any]) -> str:
    """Milliseconds, of which those of the first contender stand in brackets as a ratio."""
    lines = []
    for key, result in figures.items():
        if "seconds" in result:
            first = next(iter(result["seconds"].values()))
            columns = (f"{name} {1e3 * value:.4g} ({value / first:.2f})" for name, value in result["seconds"].items())
            lines.append(f"{key}: " + ", ".join(columns) + " ms")
        else:
            lines.append(f"{key}: {result['bytes'] / (1 << 20):.0f} MiB")
    return "\n".join(lines) + "\n"


def plot_all_reduce(figures: dict[str, Any], file: Path) -> None:
    """Time against size, all contenders and the floor."""
    results = sorted((r for r in figures.values() if r["benchmark"] == "all_reduce"), key=lambda result: result["KiB"])
    _, axes = plt.subplots(figsize=(7, 5))
    for name in results[-1]["seconds"]:
        points = [(result["KiB"], 1e3 * result["seconds"][name]) for result in results if name in result["seconds"]]
        axes.loglog(*zip(*points, strict=True), marker="o", label=name)
    axes.set(xlabel="KiB of float32", ylabel="milliseconds", title="all_reduce, 2 ranks on 2 cores")
    axes.legend()
    plt.savefig(file, dpi=120, bbox_inches="tight")


def plot_steps(figures: dict[str, Any], file: Path) -> None:
    """Phases of a step as stacked bars."""
    results = [
        r
        for r in figures.values()
        if r["benchmark"] == "training_step" and r["ranks"] == 2 and r["allocator"] == "ours"
    ]
    _, panels = plt.subplots(1, len(results), figsize=(6 * len(results), 5), squeeze=False)
    names = ["forward", "backward", "exchange that is waited for", "optimizer"]
    for axes, result in zip(panels[0], results, strict=True):
        contenders, bottoms = list(result["phases"]), [0.0] * len(result["phases"])
        for name in names:
            heights = [1e3 * result["phases"][contender].get(name, 0.0) for contender in contenders]
            axes.bar(contenders, heights, bottom=bottoms, label=name)
            bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
        axes.set(ylabel="milliseconds", title=result["model"])
    panels[0][0].legend()
    plt.savefig(file, dpi=120, bbox_inches="tight")


def main() -> None:
    """Prints the table and writes everything to the folder."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    lines = folder / "launches.jsonl"
    lines.unlink(missing_ok=True)
    for _ in range(NUM_ROUNDS):
        for arguments in LAUNCHES:
            launch(*arguments, lines)
    figures = medians([json.loads(line) for line in lines.read_text().splitlines()])
    (folder / "figures.json").write_text(json.dumps(figures, indent=1))
    (folder / "table.txt").write_text(table(figures))
    print("\n" + table(figures))
    plot_all_reduce(figures, folder / "all_reduce.png")
    plot_steps(figures, folder / "training_step.png")
    print(f"figures.json, table.txt, all_reduce.png and training_step.png are in {folder}")


if __name__ == "__main__":
    main()
