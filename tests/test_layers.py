# SPDX-License-Identifier: Apache-2.0
"""Check that imports and includes only go down, in the order in which a newcomer reads the files."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "distributed_trainer"
ENGINE = ROOT / "engine"

# Rooms that each room may import, besides its own files and the two leaves, errors and options.
ROOMS = {
    "": {"trainer", "replica", "data", "cli", "backend"},  # the public names and the command
    "trainer": {"checkpoint", "replica", "gradients", "data", "metrics", "backend", "launch"},
    "checkpoint": {"replica", "gradients", "data", "backend", "launch"},
    "replica": {"gradients", "data", "backend", "launch.devices"},
    "gradients": {"data.split", "metrics", "backend"},
    "data": {"backend"},
    "metrics": {"backend"},
    "backend": {"launch"},
    "launch": set(),
    "cli": {"", "backend", "launch"},  # the version
}
LEAVES = {"errors", "options"}

# Folders of the engine; each includes only itself and those below it.
ENGINE_LAYERS = ["bindings", "runtime", "collectives", "mpi", "memory", "kernels"]


def module_of(path):
    """Return the name below the package, such as "data.split"."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def room_of(module):
    return module.partition(".")[0] if (PACKAGE / module.partition(".")[0]).is_dir() else ""


def imports_of(module):
    """Return the package's modules that a module imports anywhere, except imports only for type checkers."""
    path = MODULES[module]
    tree = ast.parse(path.read_text())
    skipped = {
        id(node)
        for test in ast.walk(tree)
        if isinstance(test, ast.If) and getattr(test.test, "id", "") == "TYPE_CHECKING"
        for node in ast.walk(test)
    }
    folder = path.relative_to(PACKAGE).parent.parts
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or id(node) in skipped:
            continue
        if node.level:
            base = ".".join([*folder[: len(folder) + 1 - node.level], *filter(None, [node.module])])
        elif (node.module or "").split(".")[0] == "distributed_trainer":
            base = node.module.partition(".")[2]
        else:
            continue
        for name in node.names:
            module_or_name = f"{base}.{name.name}".strip(".")
            yield module_or_name if module_or_name in MODULES else base


@pytest.mark.parametrize("module", MODULES)
def test_rooms(module):
    own = room_of(module)
    for name in imports_of(module):
        if name in LEAVES or room_of(name) == own:
            continue
        assert own or not module.startswith(tuple(LEAVES)), f"{module} is a leaf and imports {name}"
        assert {room_of(name), name} & ROOMS[own], f"{module} imports {name}, which is not below its room"


def test_no_circles():
    """Imports have no circles, so a module can be read once those that it imports have been read."""
    unread = {module: set(imports_of(module)) - {module} for module in MODULES if module not in ("", "__main__")}
    while ready := [module for module, names in unread.items() if not names & unread.keys()]:
        for module in ready:
            del unread[module]
    assert not unread, f"these import each other: {', '.join(unread)}"


def test_launch_imports_no_torch():
    names = ", ".join(path.stem for path in (PACKAGE / "launch").glob("*.py") if path.stem != "__init__")
    as_command = "import sys; sys.argv = ['distributed-trainer']"  # makes the package itself import no others
    code = f"{as_command}; from distributed_trainer.launch import {names}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


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
    """Only one place imports the engine; all others get it from there, for the MPI that is in use."""
    naming = {module for module, path in MODULES.items() if re.search(r"import.*_engine|_engine_", path.read_text())}
    assert naming <= {
        "launch.mpi_library",
        "backend.job",
        "launch.host_facts",
    }  # the last one compares the files of machines


def test_one_licence_line():
    for path in [*MODULES.values(), *(ROOT / "tests").rglob("*.py"), *sources(".")]:
        comment = "//" if path.suffix in (".cpp", ".hpp") else "#"
        assert path.read_text().startswith(f"{comment} SPDX-License-Identifier: Apache-2.0\n"), path
