# SPDX-License-Identifier: Apache-2.0
"""Read the limits on how long ranks wait for one that does not arrive, which the environment sets for a whole job."""

from __future__ import annotations

import math
from collections.abc import Mapping

REPORT_VARIABLE = "DTRAIN_STALL_REPORT"
"""Seconds of waiting after which a rank says which rank it waits for; 5 unless it is set."""

TIMEOUT_VARIABLE = "DTRAIN_STALL_TIMEOUT"
"""Seconds after which a rank that is stopped or does not answer ends the job; 600 unless it is set."""


def parse_seconds(name: str, text: str) -> float:
    """Read a limit from a text of the environment or of a command line. Local.

    Args:
        name: Name of the limit, for the error.
        text: Number of seconds.

    Raises:
        ValueError: `text` is no number of seconds above 0.
    """
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ValueError(f"{name} must be a number of seconds above 0, not {text!r}")
    return seconds


def read_stall_limits(environ: Mapping[str, str]) -> tuple[float | None, float | None]:
    """Return the seconds until a report and until the end of the job; None for each that is not set. Local.

    Raises:
        ValueError: A variable is no number of seconds above 0.
    """
    report, timeout = (
        parse_seconds(name, environ[name]) if name in environ else None for name in (REPORT_VARIABLE, TIMEOUT_VARIABLE)
    )
    return report, timeout
