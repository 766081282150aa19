# SPDX-License-Identifier: Apache-2.0
"""Record in a file how a job ended, since mpirun's exit code does not always show it."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

VARIABLE = "DTRAIN_JOB_RECORD"

STARTED = "started"
COMPLETED = "completed"
FAILED = "failed"  # the line continues with the type of the exception and the rank


def append(line: str) -> None:
    """Append a line to this job's record, if `VARIABLE` names a file for it. Local."""
    path = os.environ.get(VARIABLE)
    if path:
        with contextlib.suppress(OSError), open(path, "a") as file:  # the folder may not exist on this host
            file.write(line + "\n")


def read(path: Path) -> list[str]:
    """Return the lines of a record; none if no rank could write it. Local."""
    return path.read_text(errors="replace").splitlines() if path.exists() else []
