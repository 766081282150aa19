# SPDX-License-Identifier: Apache-2.0
"""Tests that run on ranks: see ranks.py."""

import pytest
import ranks


def pytest_configure(config):
    config.pluginmanager.register(ranks.this_rank or ranks.Supervisor(config))


@pytest.fixture
def world(request):
    """The ranks on which a test runs; `@on_ranks` sets it."""
    return ranks.World(request.param, ranks.this_rank.rank)
