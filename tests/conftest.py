# SPDX-License-Identifier: Apache-2.0
"""Tests that run on ranks: see ranks.py and torch_groups.py."""

import pytest
import ranks
import torch.distributed as dist
import torch_groups


def pytest_configure(config):
    config.pluginmanager.register(ranks.this_rank or ranks.Supervisor(config))


@pytest.fixture
def world(request):
    """The ranks on which a test runs; `@on_ranks` sets it."""
    return ranks.World(request.param, ranks.this_rank.rank)


@pytest.fixture
def shared_folder(world):
    """A folder that all ranks of a test see."""
    return ranks.this_rank.shared_folder()


@pytest.fixture
def default_group(world, shared_folder):
    """torch's default process group of all ranks, on the backend under test; returns its name."""
    torch_groups.start(torch_groups.BACKEND, world, shared_folder)
    yield torch_groups.BACKEND
    dist.destroy_process_group()


@pytest.fixture
def group(default_group):
    """The same, as torch's own object."""
    return dist.group.WORLD
