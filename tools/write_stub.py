# SPDX-License-Identifier: Apache-2.0
"""Write src/distributed_trainer/_engine.pyi, the types and docstrings of the engine's module, from the module itself.

Usage: python tools/write_stub.py [--check]. With --check nothing is written, and the exit code is 1 if the file
differs. The module must have been built (`make build-openmpi`). The modules of all MPIs give the same text.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from nanobind.stubgen import StubGen  # type: ignore[import-untyped]  # nanobind ships no types

from distributed_trainer.launch.mpi_library import load_engine

PATH = Path(__file__).resolve().parents[1] / "src/distributed_trainer/_engine.pyi"
HEAD = "# SPDX-License-Identifier: Apache-2.0\n# Written by tools/write_stub.py\n"


def stub() -> str:
    """Return the text of the stub for the module that was built."""
    module = load_engine()
    generator = StubGen(module, include_docstrings=True)
    generator.put(module)
    # The version is a digest of the sources, which changes with each of them.
    text = re.sub(r"^(engine_version: str) = .*$", r"\1", generator.get(), flags=re.MULTILINE)
    return HEAD + text


def main() -> int:
    """Write or check the stub; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare the file with the module")
    is_check = parser.parse_args().check
    text = stub()
    if PATH.exists() and PATH.read_text(encoding="utf-8") == text:
        return 0
    if is_check:
        print(f"{PATH} is not the stub of the module that was built: run `python tools/write_stub.py`", file=sys.stderr)
        return 1
    PATH.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
