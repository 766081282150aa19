# SPDX-License-Identifier: Apache-2.0
"""Proof that MPI takes memory of GPUs, on memory of the CPU: the code is the same, and no GPU was at hand."""

import os

import pytest
import torch
from ranks import is_openmpi, on_ranks

from distributed_trainer import device_transfer
from distributed_trainer.library import load_engine, loaded_mpi

CPU = torch.device("cpu")
# Pointers that are not what MPI takes them for: to where nothing is mapped, as those of a GPU are to the CPU, and to
# other memory.
POINTERS = {"unmapped": "4096", "elsewhere": "address(kept.append(self.clone()) or kept[-1])"}


class Gpu:
    """It goes as the CPU to the child."""

    type = "cuda"

    def __str__(self):
        return "cpu"


def path():
    load_engine()
    return loaded_mpi().path


@on_ranks(2)
def test_in_a_rank(world, monkeypatch):
    """Whose child is a job of its own, which no variable of the launcher ties to the rank."""
    world.comm.Barrier()  # starts MPI
    assert device_transfer.try_transfer(path(), CPU) is None
    monkeypatch.setattr(device_transfer, "try_transfer", None)  # no more of that
    assert device_transfer.describe(path(), Gpu()) == device_transfer.describe(path(), CPU) == "no"  # says PyPI's MPI
    monkeypatch.setattr(device_transfer, "_says_yes", lambda path: True)
    assert device_transfer.describe(path(), CPU) == "MPI says yes, not tried: no GPU is in use"


@pytest.mark.parametrize(
    ("pointer", "failure"),
    [
        (None, None),
        ("unmapped", "ended with SIGSEGV" if is_openmpi() else "failed: Abort"),  # MPICH finds the error
        ("elsewhere", "failed: 64 bytes came otherwise than they were sent"),
    ],
)
def test_mpi_says_yes(pointer, failure, tmp_path, monkeypatch):
    """A crash is the child's alone."""
    (tmp_path / "sitecustomize.py").write_text(
        f"import sys\n"
        f"if {device_transfer.__name__!r} in sys.orig_argv:\n"
        f"    import torch\n"
        f"    kept, address = [], torch.Tensor.data_ptr\n"
        f"    torch.Tensor.data_ptr = lambda self: {POINTERS.get(pointer, 'address(self)')}\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setattr(device_transfer, "_says_yes", lambda path: True)
    answer = device_transfer.describe(path(), Gpu())
    if failure is None:
        assert answer == "yes"
    else:
        assert answer.startswith(f"no, although MPI says yes: a transfer of memory of cpu {failure}")
