# SPDX-License-Identifier: Apache-2.0
"""Whether MPI takes memory of GPUs: what it says is proven by a transfer.

A wrong "yes" is a crash, so a process of its own makes the transfer, which is this file's `main`. It sends to itself,
as a job of one that no launcher has started.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys

import torch

_LIMIT_SECONDS = 60  # most of it is to import torch
_LENGTHS = (8, 1 << 19)  # of tensors of 8 bytes: MPI sends 64 bytes in another way than 4 MiB
# Begin the names of the variables that tell a process its place in a job. What users tell MPI is left.
_OF_LAUNCHERS = ("OMPI_", "PMIX_", "PRTE_", "PMI_", "PMI2_", "HYDI_", "MPI_LOCAL", "SLURM_", "PALS_", "FLUX_")
_OF_USERS = ("OMPI_MCA_", "PMIX_MCA_")


def describe(mpi_path: str, device: torch.device) -> str:
    """Says whether the MPI takes memory of a rank's device, for a report. Local; takes seconds if it says that it does.

    Args:
        mpi_path: The library, which is initialised.
        device: The rank's.
    """
    if not _says_yes(mpi_path):
        return "no"
    if device.type == "cpu":
        return "MPI says yes, not tried: no GPU is in use"
    failure = try_transfer(mpi_path, device)
    return f"no, although MPI says yes: {failure}" if failure else "yes"


def _says_yes(mpi_path: str) -> bool:
    query = getattr(ctypes.CDLL(mpi_path), "MPIX_Query_cuda_support", None)
    return query is not None and query() == 1


def try_transfer(mpi_path: str, device: torch.device) -> str | None:
    """Has another process send tensors on a device to itself. Returns what went wrong, None for nothing. Local."""
    environ = {
        name: value
        for name, value in os.environ.items()
        if name.startswith(_OF_USERS) or not name.startswith(_OF_LAUNCHERS)
    }
    command = [sys.executable, "-m", __name__, mpi_path, str(device)]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            env=environ,
            timeout=_LIMIT_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return f"a transfer of memory of {device} did not end within {_LIMIT_SECONDS} s"
    if done.returncode == 0:
        return None
    if done.returncode < 0:
        return f"a transfer of memory of {device} ended with {signal.Signals(-done.returncode).name}"
    words = [line for line in done.stderr.splitlines() if line.strip(" -=")] or [f"exit code {done.returncode}"]
    return f"a transfer of memory of {device} failed: {words[-1].strip()}"


def main(mpi_path: str, device: torch.device) -> None:
    """Sends tensors from this process to itself by plain MPI, which must not have been initialised.

    Raises:
        SystemExit: Other values came than were sent. (MPI ends the process where it finds an error.)
    """
    if device.type != "cpu":
        torch.accelerator.set_device_index(device.index)  # before MPI looks which is in use
    mpi = ctypes.CDLL(mpi_path, mode=os.RTLD_GLOBAL)
    if hasattr(mpi, "ompi_mpi_comm_self"):
        comm_self, byte = (
            ctypes.c_void_p(ctypes.addressof(ctypes.c_char.in_dll(mpi, name)))
            for name in ("ompi_mpi_comm_self", "ompi_mpi_byte")
        )
    else:
        comm_self, byte = ctypes.c_int(0x44000001), ctypes.c_int(0x4C00010D)  # of MPICH's ABI
    pairs = [(torch.arange(n, device=device) + 1, torch.zeros(n, dtype=torch.int64, device=device)) for n in _LENGTHS]
    mpi.MPI_Init(None, None)
    for sent, received in pairs:
        expected, _ = sent.cpu(), received.cpu()  # which waits until both are there
        status = ctypes.create_string_buffer(256)  # more than any MPI's
        ends = [(ctypes.c_void_p(tensor.data_ptr()), tensor.nbytes, byte, 0, 0) for tensor in (sent, received)]
        mpi.MPI_Sendrecv(*ends[0], *ends[1], comm_self, status)
        if not torch.equal(received.cpu(), expected):
            sys.exit(f"{sent.nbytes} bytes came otherwise than they were sent")
    mpi.MPI_Finalize()


if __name__ == "__main__":
    main(sys.argv[1], torch.device(sys.argv[2]))
