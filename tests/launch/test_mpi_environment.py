# SPDX-License-Identifier: Apache-2.0
"""Variables for MPI; tests/long/test_wrong_setups.py and test_slurm.py run the set-ups that need them."""

import os

import pytest

from distributed_trainer.launch import mpi_environment
from distributed_trainer.launch.launcher import Launcher
from distributed_trainer.launch.mpi_library import MPILibrary

MPIRUN = Launcher("mpirun of Open MPI", 0, 2, 0, 2)


def prepared(environ, family, apart, monkeypatch):
    monkeypatch.setattr(mpi_environment, "is_apart", lambda launcher: apart)
    monkeypatch.setattr(mpi_environment.socket, "if_nameindex", lambda: [(1, "lo"), (2, "eth0")])
    environ = {"HOME": "/home/anna", **environ}
    mpi_environment.prepare(environ, MPIRUN, MPILibrary("/opt/mpi/lib/libmpi.so", family))
    assert environ.pop("HOME") == "/home/anna"
    return environ


@pytest.mark.parametrize("offered", ["munge,native", "native", "native,munge"])
def test_slurms_pmix(offered, monkeypatch):
    """If Slurm offers the method of authentication that every PMIx has, it is chosen; else nothing is changed."""
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
    """A launcher of another user, such as Slurm's daemon, hides its namespaces, which alone does not mean apart."""

    def hidden(path):
        raise PermissionError

    monkeypatch.setattr(mpi_environment, "find_launcher_process", lambda launcher: 1)
    monkeypatch.setattr(os, "readlink", hidden)
    monkeypatch.setattr(mpi_environment.Path, "read_text", lambda path: f"   {map_of_users}\n")
    assert mpi_environment.is_apart(Launcher("srun", 0, 2, 0, None)) == apart


def avoided(tmp_path, monkeypatch, interfaces, settings="", **environ):
    """Return the networks that Open MPI is told to leave out; `settings` is the text of a user's file of settings."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".openmpi").mkdir(exist_ok=True)
    (tmp_path / ".openmpi" / "mca-params.conf").write_text(settings)
    environ = dict(environ)
    mpi_environment._avoid_bridges(environ, MPILibrary(f"{tmp_path}/lib/libmpi.so", "openmpi"), interfaces)
    return environ


def test_bridges_of_containers(tmp_path, monkeypatch):
    bridges = ["docker0", "br-0123456789ab", "virbr0", "cni0"]
    told = avoided(tmp_path, monkeypatch, ["lo", "eth0", "br0", "ib0", "bridge", *bridges])
    assert told == {"OMPI_MCA_btl_tcp_if_exclude": f"127.0.0.1/8,sppp,{','.join(bridges)}"}
    assert avoided(tmp_path, monkeypatch, ["lo", "eth0", "br0"]) == {}


def test_interfaces_that_the_user_has_chosen(tmp_path, monkeypatch):
    """A user's choice of interfaces is kept, in a variable (which mpirun's arguments set) or a file, not a comment."""
    told = avoided(tmp_path, monkeypatch, ["docker0"], OMPI_MCA_btl_tcp_if_include="eth0")
    assert told == {"OMPI_MCA_btl_tcp_if_include": "eth0"}
    assert avoided(tmp_path, monkeypatch, ["docker0"], " btl_tcp_if_include = eth0\n") == {}
    assert avoided(tmp_path, monkeypatch, ["docker0"], "# btl_tcp_if_include = eth0\n") != {}
