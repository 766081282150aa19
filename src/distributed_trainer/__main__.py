# SPDX-License-Identifier: Apache-2.0
"""Run the console command: `python -m distributed_trainer`."""

import sys

from .cli.main import main

if __name__ == "__main__":
    sys.exit(main())
