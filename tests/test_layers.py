# SPDX-License-Identifier: Apache-2.0
"""Imports and includes go down only, in the order in which a newcomer reads the files."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "distributed_trainer"
ENGINE = ROOT / "engine"

# A module imports only from those below it, on lower lines.
PYTHON_LAYERS = """
__main__
__init__
command_line
check
run check_report check_ranks
restart
preflight hostfile device_transfer
create
trainer
elastic
computation own_loop save_and_load
handover
saving restoring
writing
training_state
checkpoint positions
agreement
balance share advice evaluate loader memory profile replica reporting timing
drift clocks criterion
reproducible
data batchnorm direct alignment sharding
tensor_files
checkpoint_form
gradients
options
compression
buckets
job
inner
backend
work
store devices versions mpi_environment
launch
mpirun
library
places
host_facts errors record
""".split("\n")[1:-1]

# A folder of the engine includes only itself and those below it.
ENGINE_LAYERS = ["bindings", "runtime", "collectives", "mpi", "memory", "kernels"]


def layer_of(module):
    return next(number for number, line in enumerate(PYTHON_LAYERS) if module in line.split())


def imports_of(path):
    """Names of the package's own modules that a file imports, wherever in it; not for type checkers alone."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(node)
        for test in ast.walk(tree)
        if isinstance(test, ast.If) and getattr(test.test, "id", "") == "TYPE_CHECKING"
        for node in ast.walk(test)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and id(node) not in skipped:
            if node.level == 1 and node.module:
                yield node.module.split(".")[0]
            elif node.level == 1:
                yield from (alias.name for alias in node.names)
            elif (node.module or "").startswith("distributed_trainer"):
                yield node.module.partition(".")[2] or "__init__"


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.stem)
def test_python_imports_go_down(path):
    own = layer_of(path.stem)
    for name in imports_of(path):
        assert layer_of(name) > own, f"{path.name} imports {name}, which is not below it"


def test_every_module_has_a_place():
    assert {path.stem for path in PACKAGE.glob("*.py")} <= set(" ".join(PYTHON_LAYERS).split())


def sources(*folders):
    return [path for folder in folders for path in sorted((ENGINE / folder).rglob("*.[ch]pp"))]


def without_comments(path):
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", path.read_text(), flags=re.DOTALL)


def test_engine_includes_go_down():
    for own, folder in enumerate(ENGINE_LAYERS):
        for path in sources(folder):
            for included in re.findall(r'#include "(\w+)/', path.read_text()):
                where = ENGINE_LAYERS.index(included)
                assert where >= own, f"{path.relative_to(ROOT)} includes {included}/, which is above it"


def test_mpi_only_in_its_folder():
    others = [folder.name for folder in ENGINE.iterdir() if folder.is_dir() and folder.name not in ("mpi", "tests")]
    for path in sources(*others):
        assert not re.search(r"\bMPIX?_\w|<mpi\.h>", without_comments(path)), path


def test_nanobind_only_in_its_folder():
    others = [folder.name for folder in ENGINE.iterdir() if folder.is_dir() and folder.name != "bindings"]
    for path in sources(*others):
        assert not re.search(r"\bnb::|nanobind|Python\.h", without_comments(path)), path


def test_no_torch_in_the_engine():
    for path in sources("."):
        assert not re.search(r"#include\s*<(torch|ATen|c10)|\b(torch|at|c10)::", without_comments(path)), path


def test_engine_is_imported_in_one_place():
    """Everyone else gets it from there, for the MPI that is in use."""
    naming = {path.stem for path in PACKAGE.glob("*.py") if re.search(r"import.*_engine|_engine_", path.read_text())}
    assert naming <= {"library", "job", "host_facts"}  # the last compares the files of machines


def test_one_licence_line():
    for path in [*PACKAGE.glob("*.py"), *(ROOT / "tests").glob("*.py"), *sources(".")]:
        comment = "//" if path.suffix in (".cpp", ".hpp") else "#"
        assert path.read_text().startswith(f"{comment} SPDX-License-Identifier: Apache-2.0\n"), path
