# SPDX-License-Identifier: Apache-2.0
"""Variables for MPI; tests/test_wrong_setups_long.py and test_slurm_long.py run what needs them."""

import os

import pytest

from distributed_trainer import mpi_environment
from distributed_trainer.launch import Launcher

MPIRUN = Launcher("mpirun of Open MPI", 0, 2, 0, 2)


def prepared(environ, family, apart, monkeypatch):
    monkeypatch.setattr(mpi_environment, "is_apart", lambda launcher: apart)
    environ = dict(environ)
    mpi_environment.prepare(environ, MPIRUN, family)
    return environ


@pytest.mark.parametrize("offered", ["munge,native", "native", "native,munge"])
def test_slurms_pmix(offered, monkeypatch):
    """The way to sign on that every PMIx has; without a choice it stays."""
    assert prepared({"PMIX_SECURITY_MODE": offered}, "openmpi", False, monkeypatch) == {"PMIX_SECURITY_MODE": "native"}
    assert prepared({"PMIX_SECURITY_MODE": "munge"}, "openmpi", False, monkeypatch) == {"PMIX_SECURITY_MODE": "munge"}
    assert prepared({}, "openmpi", False, monkeypatch) == {}


@pytest.mark.parametrize(
    ("before", "after"),
    [(None, "^sm"), ("^ofi", "^ofi,sm"), ("^ofi,sm", "^ofi,sm"), ("self,sm,tcp", "self,sm,tcp")],
)
def test_open_mpi_apart(before, after, monkeypatch):
    environ = {} if before is None else {"OMPI_MCA_btl": before}
    assert prepared(environ, "openmpi", True, monkeypatch) == {"OMPI_MCA_btl": after}
    assert prepared(environ, "openmpi", False, monkeypatch) == environ


def test_mpich_apart(monkeypatch):
    assert prepared({}, "mpich", True, monkeypatch) == {"MPIR_CVAR_NOLOCAL": "1", "UCX_TLS": "^sm"}
    assert prepared({"UCX_TLS": "tcp"}, "mpich", True, monkeypatch)["UCX_TLS"] == "tcp"
    assert prepared({}, "mpich", False, monkeypatch) == {}


def test_beside_the_launcher(monkeypatch):
    monkeypatch.setattr(mpi_environment, "find_launcher_process", lambda launcher: os.getppid())
    assert not mpi_environment.is_apart(MPIRUN)


def test_launcher_that_is_not_to_be_seen(monkeypatch):
    monkeypatch.setattr(mpi_environment, "find_launcher_process", lambda launcher: None)
    assert mpi_environment.is_apart(MPIRUN)
    assert not mpi_environment.is_apart(Launcher("a PMIx launcher", 0, None, None, None))  # may have any name
    assert not mpi_environment.is_apart(None)


@pytest.mark.parametrize(("map_of_users", "apart"), [("0 0 4294967295", False), ("0 1000 1", True)])
def test_launcher_of_another_user(map_of_users, apart, monkeypatch, tmp_path):
    """Such as Slurm's daemon, as a user sees it: its namespaces are hidden, which says nothing."""

    def hidden(path):
        raise PermissionError

    monkeypatch.setattr(mpi_environment, "find_launcher_process", lambda launcher: 1)
    monkeypatch.setattr(os, "readlink", hidden)
    monkeypatch.setattr(mpi_environment.Path, "read_text", lambda path: f"   {map_of_users}\n")
    assert mpi_environment.is_apart(Launcher("srun", 0, 2, 0, None)) == apart
