# SPDX-License-Identifier: Apache-2.0
"""The console command's own options. Its sub-commands have files of their own."""

import re
import subprocess
import sys

from scripts import shell_environment

import distributed_trainer


def test_version():
    """The command prints the package's version, and does not wait for torch."""
    command = [sys.executable, "-X", "importtime", "-m", "distributed_trainer", "--version"]
    result = subprocess.run(command, env=shell_environment(), capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"distributed-trainer {distributed_trainer.__version__}\n"
    assert not re.search(r"\| +(torch|numpy)$", result.stderr, re.MULTILINE)
