# SPDX-License-Identifier: Apache-2.0
"""The recipes of docs/recipes.md: short, and with the result of plain torch in one process."""

import pages
import pytest
from ranks import on_ranks

RECIPES = pages.scripts("recipes.md")
NUM_LINES = 40


@on_ranks(1, 2, 3)
@pytest.mark.parametrize("name", [name for name in RECIPES if name != "Graphs"])  # in tests/long
def test_recipe(world, name):
    """The recipe gives the weights and prints the losses of one process."""
    pages.check(RECIPES[name])


@pytest.mark.parametrize("name", RECIPES)
def test_length(name):
    """A recipe has fewer than 40 lines of code."""
    assert sum(bool(line.strip()) for line in RECIPES[name].splitlines()) < NUM_LINES
