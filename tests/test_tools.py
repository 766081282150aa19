# SPDX-License-Identifier: Apache-2.0
"""The tools for maintainers: the checker of prose finds what it is for, and each planted bug still fits the code."""

import sys
from pathlib import Path

import compatibility
import compatibility_table
import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import check_prose  # noqa: E402
import mutate  # noqa: E402

PYTHON = '''
"""Module that is described well."""

# Of the other thing.
value = 1  # which is not what it seems


class Thing:
    """Makes a thing."""

    field: int
    """SAME_AGAIN."""


def function(argument):
    """Returns the argument.

    Args:
        argument: That of the caller.
    """
    raise ValueError("what is this?")


def start():
    """Start again and wait for it. Local."""
'''.replace("SAME_AGAIN", "Like" + "wise")
CPP = """
// Has a comment.
int good = 1;  // a number
// One comment over two lines, the second of which may begin
// with any word, that is: with this one.
"""
MARKDOWN = "# Those pages\n\nText GOES here.\n\n| which | cell |\n|---|---|\n\n```\nof code\n```\n".replace(
    "GOES", "goes" + " on"
)


@pytest.mark.parametrize(
    ("name", "text", "lines"),
    [("src/a.py", PYTHON, [4, 5, 9, 12, 12, 16, 19, 21]), ("a.cpp", CPP, [2]), ("a.md", MARKDOWN, [1, 3, 5])],
)
def test_prose(tmp_path, monkeypatch, name, text, lines):
    """Each line that breaks a rule is found, and no other."""
    monkeypatch.chdir(tmp_path)
    path = Path(name)
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    assert sorted(line for line, _, _ in check_prose.check(path)) == lines


@pytest.mark.parametrize("mutation", mutate.MUTATIONS, ids=lambda mutation: mutation.name)
def test_mutation_fits(mutation):
    assert (ROOT / mutation.path).read_text().count(mutation.old) == 1
    assert mutation.old != mutation.new


def test_compatibility_table():
    """docs/compatibility.md has a row for each script of tests/compatibility."""
    rows = [row.what for module in compatibility_table.modules() for row in compatibility.ROWS[module.__name__]]
    assert compatibility_table.rows_of_document() == rows, "run `make docs-table`"
