# SPDX-License-Identifier: Apache-2.0
"""The console command `distributed-trainer`, also `python -m distributed_trainer`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .. import __version__
from ..errors import DistributedTrainerError
from . import check, run


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a sub-command; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="distributed-trainer",
        description="Starts training scripts on MPI ranks, and checks whether ranks will work together.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    run.add_parser(commands)
    check.add_parser(commands)
    options, unknown = parser.parse_known_args(arguments)
    if unknown:  # argparse itself would show the usage of the parent
        options.parser.error(f"unknown argument {unknown[0]}: the usage above shows what is allowed")
    try:
        exit_code: int = options.main(options)
        return exit_code
    except (ValueError, OSError, DistributedTrainerError) as error:
        print(f"distributed-trainer: {error}", file=sys.stderr)
        return 1 if isinstance(error, DistributedTrainerError) else 2
