# SPDX-License-Identifier: Apache-2.0
"""The console command `distributed-trainer`, also `python -m distributed_trainer`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import check, run
from .errors import DistributedTrainerError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a sub-command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="distributed-trainer",
        description="Starts training scripts on MPI ranks, and looks whether they will work.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    run.add_parser(commands)
    check.add_parser(commands)
    options = parser.parse_args(arguments)
    try:
        return options.main(options)
    except (ValueError, OSError, DistributedTrainerError) as error:
        print(f"distributed-trainer: {error}", file=sys.stderr)
        return 1 if isinstance(error, DistributedTrainerError) else 2
