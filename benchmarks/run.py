# SPDX-License-Identifier: Apache-2.0
"""Run the main benchmarks, and write tables, the figures as JSON and two plots: python benchmarks/run.py FOLDER

Contenders with different settings of the allocator, or whose memory is measured, need separate processes. All launches
take turns, three times, and figures are medians over the launches.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import NamedTuple

import matplotlib.pyplot as plt
from table import Table, run_on_ranks

MINUTES = 13  # time of all launches on a machine with 2 cores
NUM_ROUNDS = 3
BENCHMARKS = Path(__file__).parent
KEPT, DEFAULT = "freed memory kept", "malloc's default"


class Launch(NamedTuple):
    """A benchmark in one environment."""

    script: str
    num_ranks: int | None = 2
    """Number of ranks; None if the benchmark itself starts ranks."""
    words: tuple[str, ...] = ()
    variables: tuple[tuple[str, str], ...] = ()
    label: str = ""
    """Label that distinguishes its tables from those of the same benchmark in another environment."""

    def run(self, words: list[str]) -> None:
        """Run the benchmark with further arguments. Blocks."""
        script, words = BENCHMARKS / self.script, [*self.words, *words]
        if self.num_ranks is None:
            subprocess.run([sys.executable, str(script), *words], check=True)
        else:
            run_on_ranks(self.num_ranks, script, *words, variables=dict(self.variables))


LAUNCHES = [
    Launch("all_reduce.py"),
    Launch("training_step.py", words=("--seconds", "10"), label=KEPT),
    Launch("training_step.py", words=("--seconds", "10"), variables=(("DTRAIN_MALLOC", "default"),), label=DEFAULT),
    Launch("training_step.py", num_ranks=4, words=("--seconds", "10", "--only-mlp"), label=KEPT),
    Launch("loading.py", words=("--seconds", "5")),
    Launch("memory.py", num_ranks=None),
]


def run_all(num_rounds: int, words: list[str], results: Path) -> list[Table]:
    """Run all launches in turn; return their tables, with medians over the rounds."""
    of_rounds: dict[str, list[Table]] = defaultdict(list)
    for number in range(num_rounds):
        began = time.monotonic()
        for launch in LAUNCHES:
            results.unlink(missing_ok=True)
            launch.run([*words, "--results", str(results)])
            for line in results.read_text().splitlines():
                table = Table(**json.loads(line))
                table.title += f", {launch.label}" if launch.label else ""
                of_rounds[table.title].append(table)
        minutes = (time.monotonic() - began) / 60
        print(f"\nround {number + 1} of {num_rounds} took {minutes:.1f} minutes", flush=True)
    results.unlink()
    return [merge(tables) for tables in of_rounds.values()]


def merge(tables: list[Table]) -> Table:
    """Merge tables with the same rows to one, which has the median of each number."""
    first = tables[0]
    rows = {
        row: {column: median(table.rows[row][column] for table in tables) for column in values}
        for row, values in first.rows.items()
    }
    return replace(first, rows=rows)


def plot_all_reduce(table: Table, file: Path) -> None:
    """Plot time against size, for all contenders and the floor."""
    _, axes = plt.subplots(figsize=(7, 5))
    for column in table.columns:
        points = [(row, 1e3 * values[column]) for row, values in table.rows.items() if column in values]
        axes.semilogy(*zip(*points, strict=True), marker="o", label=column)
    axes.set(xlabel="float32", ylabel="milliseconds", title=table.title)
    axes.legend()
    plt.savefig(file, dpi=120, bbox_inches="tight")


def plot_phases(table: Table, file: Path) -> None:
    """Plot the phases of steps as stacked bars."""
    _, axes = plt.subplots(figsize=(9, 5))
    left = [0.0] * len(table.rows)
    for phase in table.columns:
        widths = [1e3 * values.get(phase, 0.0) for values in table.rows.values()]
        axes.barh(list(table.rows), widths, left=left, label=phase)
        left = [before + width for before, width in zip(left, widths, strict=True)]
    axes.set(xlabel="milliseconds", title=table.title)
    axes.invert_yaxis()
    axes.legend()
    plt.savefig(file, dpi=120, bbox_inches="tight")


def main() -> None:
    """Print the tables, and write all results to the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--quick", action="store_true", help="one round of small sizes, to see that all of it runs")
    options = parser.parse_args()
    num_rounds = 1 if options.quick else NUM_ROUNDS
    expected = "about a minute" if options.quick else f"about {MINUTES} minutes"
    rounds = "1 round" if options.quick else f"{num_rounds} rounds"
    print(f"{rounds} of {len(LAUNCHES)} launches: this takes {expected}", flush=True)
    began = time.monotonic()
    folder = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    tables = run_all(num_rounds, ["--quick"] if options.quick else [], folder / "launch.jsonl")
    (folder / "figures.json").write_text(json.dumps([asdict(table) for table in tables], indent=1))
    text = "\n\n".join(map(str, tables))
    (folder / "tables.md").write_text(text + "\n")
    print(f"\n==== Medians of {rounds}\n\n{text}\n")
    by_title = {table.title: table for table in tables}
    plot_all_reduce(by_title["all_reduce on 2 ranks"], folder / "all_reduce.png")
    plot_phases(by_title[f"Phases of a step on 2 ranks, means, {KEPT}"], folder / "training_step.png")
    minutes = (time.monotonic() - began) / 60
    print(f"{minutes:.1f} minutes; figures.json, tables.md, all_reduce.png and training_step.png are in {folder}")


if __name__ == "__main__":
    main()
