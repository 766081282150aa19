# SPDX-License-Identifier: Apache-2.0
"""Fixtures for tests on ranks (see ranks.py and torch_groups.py) and for tests of a script's end (see scripts.py)."""

import pytest
import ranks
import scripts
import torch.distributed as dist
import torch_groups


def pytest_configure(config):
    config.pluginmanager.register(ranks.this_rank or ranks.Supervisor(config))


@pytest.hookimpl(tryfirst=True)  # before pytest selects by markers
def pytest_collection_modifyitems(items):
    for item in ranks.slow_tests(items):
        item.add_marker(pytest.mark.slow)


def pytest_itemcollected(item):
    if item.path.parent.name == "long":
        item.add_marker(pytest.mark.long)


@pytest.fixture
def world(request):
    """Ranks on which the test runs; the decorator `@on_ranks` sets them."""
    return ranks.World(request.param, ranks.this_rank.rank)


@pytest.fixture
def shared_folder(world):
    """Folder that all ranks of a test see."""
    return ranks.this_rank.shared_folder()


@pytest.fixture
def default_group(world, shared_folder):
    """Start torch's default process group of all ranks on the backend under test; return the backend's name."""
    torch_groups.start(torch_groups.BACKEND, world, shared_folder)
    yield torch_groups.BACKEND
    dist.destroy_process_group()


@pytest.fixture
def group(default_group):
    """Start torch's default process group, as `default_group` does; return it as torch's object."""
    return dist.group.WORLD


@pytest.fixture
def run(tmp_path):
    """Start a script; see `scripts.Run`."""
    runs = []

    def start(script, *arguments, **options):
        runs.append(scripts.Run(tmp_path, script, *arguments, **options))
        return runs[-1]

    yield start
    for started in runs:
        ranks.end(started.process, [pid for pid in started.pids if scripts.is_alive(pid)])
