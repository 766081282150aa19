# SPDX-License-Identifier: Apache-2.0
"""Tests that run on ranks: see ranks.py and torch_groups.py. Tests that watch how a script ends: see scripts.py."""

import pytest
import ranks
import scripts
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


@pytest.fixture
def run(tmp_path):
    """Starts a script; see `scripts.Run`."""
    runs = []

    def start(script, *arguments, **options):
        runs.append(scripts.Run(tmp_path, script, *arguments, **options))
        return runs[-1]

    yield start
    for started in runs:
        ranks.end(started.process, [pid for pid in started.pids if scripts.is_alive(pid)])
