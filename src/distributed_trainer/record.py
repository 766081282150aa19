# SPDX-License-Identifier: Apache-2.0
"""How a job went, in a file: mpirun's exit code does not always tell."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

VARIABLE = "DTRAIN_JOB_RECORD"

STARTED = "started"
COMPLETED = "completed"
FAILED = "failed"  # then comes how


def note(what: str) -> None:
    """Adds a line to this job's record, if somebody wants one. Local."""
    path = os.environ.get(VARIABLE)
    if path:
        with contextlib.suppress(OSError), open(path, "a") as file:  # its folder may not be this host's
            file.write(what + "\n")


def read(path: Path) -> list[str]:
    """The lines of a record; none if no rank could write it. Local."""
    return path.read_text(errors="replace").splitlines() if path.exists() else []
