# SPDX-License-Identifier: Apache-2.0
"""Write the tables of docs/compatibility.md: the answer of each script of tests/compatibility on 2 ranks.

Run `make docs-table`, or `mpirun -np 2 python tests/support/compatibility_table.py`.
"""

import importlib
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "tests" / "compatibility"
DOCUMENT = ROOT / "docs" / "compatibility.md"
START, END = "<!-- tables: make docs-table -->\n", "<!-- end of the tables -->\n"

sys.path[:0] = [str(FOLDER)]

import compatibility  # noqa: E402
from ranks import JobSpec, World  # noqa: E402

from distributed_trainer.backend import job  # noqa: E402


def modules():
    """The test files, in the order of their names, imported."""
    return [importlib.import_module(path.stem) for path in sorted(FOLDER.glob("test_*.py"))]


def answer(row: compatibility.Row) -> str:
    """Run a row's script; return "exact", or the first sentence of the error."""
    run = row.way()
    try:
        row.script(run)
    except Exception as error:
        if row.refusal is None or not re.search(row.refusal, str(error)):
            raise
        return f"{type(error).__name__}: {re.split(r'[.;] ', str(error))[0].removesuffix('.')}"
    finally:
        run.end()
    return "exact"


def tables() -> str:
    """All tables, a section for each test file; its title is the first line of the file's docstring."""
    text = ""
    for module in modules():
        text += f"\n## {module.__doc__.splitlines()[0].removesuffix('.')}\n\n"
        text += "| your script | answer | instead |\n|---|---|---|\n"
        for row in compatibility.ROWS[module.__name__]:
            text += f"| {row.what} | {answer(row)} | {row.instead} |\n"
    return text + "\n"


def rows_of_document() -> list[str]:
    """The first column of the document's tables."""
    table = DOCUMENT.read_text().partition(START)[2].partition(END)[0]
    first = [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines() if line.startswith("| ")]
    return [what for what in first if what != "your script"]


def main() -> None:
    started = job.start(None, None)
    world = World(JobSpec(started.engine.size), started.rank)
    text = tables()
    if world.rank == 0:
        before, _, rest = DOCUMENT.read_text().partition(START)
        DOCUMENT.write_text(before + START + text + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
