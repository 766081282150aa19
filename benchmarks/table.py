# SPDX-License-Identifier: Apache-2.0
"""Options that all benchmarks take, the tables that they print, and their launches. Starts no MPI."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

RATIOS = {
    "speed": "in brackets the time of `{}` over that",
    "time": "in brackets that over the time of `{}`",
    "size": "in brackets that over `{}`",
}


def make_parser(description: str, seconds: float) -> argparse.ArgumentParser:
    """Return a parser of the options that all benchmarks take.

    Args:
        description: A module's docstring.
        seconds: Default of `--seconds`.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round of small sizes, to see that it runs")
    parser.add_argument("--seconds", type=float, default=seconds, help="how long each row of a table is measured")
    parser.add_argument("--results", type=Path, help="file to which each table is appended as a line of JSON")
    return parser


@dataclass
class Table:
    """Table in Markdown: a row for each subject, a column for each contender."""

    title: str
    subject: str
    """Heading of the first column."""
    columns: list[str]
    """Headings of the others, in their order."""
    unit: str = "milliseconds"
    """Unit of the numbers that are printed."""
    scale: float = 1e3
    """Factor by which numbers in `rows` are multiplied when they are printed."""
    ratios: str | None = None
    """Key of RATIOS by which each number is compared with that of the first column; None for no comparison."""
    rows: dict[str, dict[str, float]] = field(default_factory=dict)
    """Numbers by row and column."""

    def add(self, row: str, values: dict[str, float]) -> None:
        """Add a row. A column without a value stays empty; a value without a column is not printed."""
        self.rows[row] = values

    def show(self, results: Path | None = None) -> None:
        """Print the table, and append it to the file `results`. Only rank 0 does so, or a process without ranks."""
        if os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK", "0")) != "0":
            return
        print(f"\n{self}", flush=True)
        if results is not None:
            with results.open("a") as file:
                file.write(json.dumps(asdict(self)) + "\n")

    def __str__(self) -> str:
        ratios = [RATIOS[self.ratios].format(self.columns[0])] if self.ratios else []
        heads = [self.subject, *self.columns]
        lines = [
            f"{self.title} ({'; '.join([self.unit, *ratios])})",
            "",
            f"| {' | '.join(heads)} |",
            "|" + "---|" * len(heads),
        ]
        for row, values in self.rows.items():
            cells = [self._cell(values, column) for column in self.columns]
            lines.append(f"| {' | '.join([row, *cells])} |")
        return "\n".join(lines)

    def _cell(self, values: dict[str, float], column: str) -> str:
        first = self.columns[0]
        if column not in values:
            return ""
        text = number(values[column] * self.scale)
        if self.ratios is None or column == first or first not in values:
            return text
        ratio = values[first] / values[column]
        return f"{text} ({ratio if self.ratios == 'speed' else 1 / ratio:.2f})"


def number(value: float) -> str:
    """Format a number with four digits, or with all digits before the point."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def run_on_ranks(
    num_ranks: int,
    script: Path,
    *words: str,
    run_options: Sequence[str] = (),
    variables: Mapping[str, str] | None = None,
    is_quiet: bool = False,
) -> None:
    """Run a script on ranks that may use all cores. Blocks.

    Args:
        num_ranks: Number of ranks.
        script: Script that each rank runs.
        words: Arguments of the script.
        run_options: Further options for `distributed-trainer run`.
        variables: Variables to add to the environment.
        is_quiet: Whether to show the script's output only if it fails.

    Raises:
        subprocess.CalledProcessError: The script failed.
    """
    command = [sys.executable, "-m", "distributed_trainer", "run", *run_options, "-np", str(num_ranks), str(script)]
    command += words
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} if is_quiet else {}
    done = subprocess.run(command, stdin=subprocess.DEVNULL, env={**os.environ, **(variables or {})}, **pipe)
    if done.returncode and is_quiet:
        print(done.stdout.decode(errors="replace"), file=sys.stderr)
    done.check_returncode()
