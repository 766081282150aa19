# SPDX-License-Identifier: Apache-2.0
"""The first pages of the docs: their code runs, their commands exist, their links and tables are right."""

import functools
import re
import shlex
import subprocess
import sys
from pathlib import Path

import forked
import numpy as np
import pytest
import safetensors.torch
import torch
from ranks import JobSpec, job_environment, mpirun_path

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
FIRST_HOUR = (DOCS / "first-hour.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]

# Variables that the package sets for its own processes, or that only tests set; the table of variables lacks them.
INTERNAL_VARIABLES = {
    "DTRAIN_ELASTIC": "set by `run --elastic`",
    "DTRAIN_JOB_RECORD": "set by `run --restarts` and `--elastic`",
    "DTRAIN_LOG_DIR": "set by `run --log-dir`",
    "DTRAIN_RANKS_PER_NODE": "for tests and CONTRIBUTING.md: makes one machine stand for several",
    "DTRAIN_RANK_PID": "set by a rank for the processes that it starts",
    "DTRAIN_RESTARTED": "set for the script that `num_gpus` starts again",
    "DTRAIN_STARTER": "set by the ranks for a process that replaces a killed rank",
}


def blocks(text, language):
    found = re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [code for name, code in found if name == language]


def commands(text):
    lines = [line.split("#")[0].strip() for block in blocks(text, "") for line in block.splitlines()]
    return list(filter(None, lines))


CODE = "\n".join(blocks(README, "python"))
AFTER = "\nprint('trained on', trainer.world_size)\n"
CHECKSUM = """
values = torch.cat([value.double().flatten() for value in model.state_dict().values()])
print("weights and buffers:", values.sum().item())
"""
WITHOUT_PACKAGE = "import sys\nsys.modules['distributed_trainer'] = None\n"  # makes its import an error
ONE_PROCESS = "env python train.py"  # in a process that has imported torch already, without mpirun
# Each way to start the example. mpirun starts it in processes that have imported torch already.
STARTS = [
    pytest.param(command, marks=[] if command.startswith("mpirun") else pytest.mark.slow)
    for command in commands(README)
    if command.endswith(" train.py")
]


@functools.cache
def digits():
    from sklearn.datasets import load_digits

    return load_digits(return_X_y=True)


def put_digits(folder):
    """Put scikit-learn's digits where a script finds them before scikit-learn, whose import takes a second."""
    folder.mkdir(exist_ok=True)
    (folder / "__init__.py").touch()
    np.savez(folder / "digits.npz", *digits())
    lines = (
        "import numpy as np",
        "def load_digits(return_X_y):",
        f"    return [*np.load({str(folder)!r} + '/digits.npz').values()]",
    )
    (folder / "datasets.py").write_text("\n".join(lines))


def run_script(tmp_path, code, command):
    (tmp_path / "train.py").write_text(code)
    (tmp_path / "hosts.txt").write_text("localhost slots=4\n" if "slots" in command else "localhost\n")
    program, *words = shlex.split(command)
    if "python" in words:
        put_digits(tmp_path / "sklearn")
    words = [other for word in words for other in (forked.python() if word == "python" else [word])]
    programs = {
        "mpirun": [mpirun_path()],
        "distributed-trainer": [sys.executable, "-m", "distributed_trainer"],
        "python": [sys.executable],
        "env": ["env"],
    }
    result = subprocess.run(
        [*programs[program], *words],
        cwd=tmp_path,
        env=job_environment(JobSpec(4)),
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result


def losses(result):
    """The losses that a script has printed, one for each epoch."""
    printed = re.findall(r"^epoch (\d+): loss ([\d.]+)$", result.stdout, re.MULTILINE)
    assert [int(epoch) for epoch, _ in printed] == list(range(len(printed))), result.stdout
    return [float(loss) for _, loss in printed]


@pytest.fixture(scope="module")
def losses_of_one_rank(tmp_path_factory):
    return losses(run_script(tmp_path_factory.mktemp("one"), CODE, "mpirun -np 1 python train.py"))


@pytest.mark.parametrize("command", STARTS or [None])
def test_example(tmp_path, losses_of_one_rank, command):
    """Each way to start the README's example trains as one rank does; only rank 0 prints, and it saves the model."""
    assert command, "the README names no way to start the script"
    num_ranks = 4 if command.startswith("mpirun -np 4") else 2  # 4 ranks only once, because they take seconds to start
    result = run_script(tmp_path, CODE + AFTER, command.replace("-np 4", f"-np {num_ranks}"))
    assert result.stdout.count(f"trained on {num_ranks}") == num_ranks
    assert losses(result) == pytest.approx(losses_of_one_rank, rel=0.02)
    assert len(losses_of_one_rank) == 5
    assert losses_of_one_rank[-1] < 0.7
    assert "WARNING" not in result.stderr
    assert list(torch.load(tmp_path / "model.pt")) == ["0.weight", "0.bias", "2.weight", "2.bias"]


@pytest.mark.slow
def test_first_hour(tmp_path):
    """Both scripts of the difference in docs/first-hour.md print the same losses; the page's other code runs, too."""
    (difference,) = blocks(FIRST_HOUR, "diff")
    plain, converted = (
        "".join(line[1:] or "\n" for line in difference.splitlines(keepends=True) if not line.startswith(sign))
        for sign in "+-"
    )
    expected = losses(run_script(tmp_path, plain, ONE_PROCESS))
    head, tail = FIRST_HOUR.split("## Save and resume")
    script = "\n".join([converted, *blocks(head, "python"), AFTER])
    result = run_script(tmp_path, script, "mpirun -np 2 python train.py")
    assert len(expected) == 3
    assert losses(result) == pytest.approx(expected, rel=0.01)
    assert len(re.findall(r"^loss 0\.\d+, accuracy 9\d\.\d%$", result.stdout, re.MULTILINE)) == 1
    assert result.stderr.count("WARNING") == 0

    script = "\n".join([converted.split("\nfor epoch")[0], *blocks(tail, "python")])
    first = run_script(tmp_path, script, "mpirun -np 2 python train.py")
    assert first.stdout.count("\nbegins\n") == 1
    second = run_script(tmp_path, script, "mpirun -np 3 python train.py")
    assert second.stdout.count("continues after step 87\n") == 1
    weights = torch.load(tmp_path / "model.pt")
    torch.testing.assert_close(safetensors.torch.load_file(tmp_path / "model.safetensors"), dict(weights))


@pytest.mark.slow
def test_inference(tmp_path):
    """Models that the training code of docs/inference.md writes load in its other code, without this package."""
    model, *code = blocks((DOCS / "inference.md").read_text(), "python")
    assert model.startswith("# model.py\n")
    (tmp_path / "model.py").write_text(model)
    training = "\n".join([*(block for block in code if "trainer" in block), CHECKSUM])
    serving = "\n".join([WITHOUT_PACKAGE, *(block for block in code if "trainer" not in block)])
    saved = []
    for num_ranks, options in ((2, ""), (3, ', shard="optimizer"')):
        script = training.replace("create_distributed_trainer(model", "create_distributed_trainer(model" + options)
        result = run_script(tmp_path, script, f"mpirun -np {num_ranks} python train.py")
        sums = re.findall("weights and buffers: .*", result.stdout)
        assert len(sums) == num_ranks
        assert len(set(sums)) == 1
        run_script(tmp_path, serving, ONE_PROCESS)
        saved.append(safetensors.torch.load_file(tmp_path / "model.safetensors"))
        torch.testing.assert_close(saved[-1], dict(torch.load(tmp_path / "model.pt")), rtol=0, atol=0)
    torch.testing.assert_close(*saved)


def test_training_document(tmp_path):
    """The code of docs/training.md runs, from its first block to its last."""
    code = blocks((DOCS / "training.md").read_text(), "python")
    assert len(code) >= 6
    support = ROOT / "tests" / "support"
    stand_in = f"import sys\nsys.path.append({str(support)!r})\nimport small_graphs\n"
    stand_in += "sys.modules['torch_geometric.data'] = small_graphs\n"  # torch_geometric need not be installed
    seed = "import torch\ntorch.manual_seed(0)\n"
    result = run_script(tmp_path, "\n".join([stand_in, seed, *code, AFTER]), "mpirun -np 2 python train.py")
    assert result.stdout.count("trained on 2") == 2
    assert len(set(re.findall(r"accuracy ([\d.]+)%", result.stdout))) == 1
    assert "WARNING" not in result.stderr


@pytest.mark.slow
def test_example_with_a_new_optimizer_each_step(tmp_path):
    """A new optimizer in each step, as beginners write it, works and gives one warning."""
    code = CODE.replace("optimizer = torch.optim.Adam(model.parameters())\n", "")
    code = code.replace("criterion, optimizer)", "criterion, torch.optim.Adam(model.parameters()))")
    result = run_script(tmp_path, code + AFTER, "python train.py")
    assert result.stdout.count("trained on 2") == 2
    assert result.stderr.count("Make the optimizer once, before the loop.") == 1


def test_commands_exist():
    """Targets of make, extras of the package, and scripts that the first pages name exist."""
    targets = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))
    project = (ROOT / "pyproject.toml").read_text()
    known = ("make ", "pip install", "python setup.py", "python train.py", "mpirun ", "distributed-trainer ")
    packages = [set(line.split()[2:]) for line in commands(README + CONTRIBUTING) if line.startswith("apt install ")]
    assert packages[0] == packages[1]
    for command in commands(README.replace("apt install", "pip install") + FIRST_HOUR):
        assert command.startswith(known), f"{command!r}: say here how to test it"
        if command.startswith("make "):
            assert command.split()[1] in targets
        for extras in re.findall(r"\.\[([\w,]+)\]", command):
            for extra in extras.split(","):
                assert re.search(rf"^{extra} = \[", project, re.MULTILINE)


def test_environment_variables():
    """The table of docs/first-hour.md has all variables of the package that users may set, and no others."""
    (table,) = re.findall(r"^\| variable \|.*\n\|[-|]+\n((?:\|.*\n)+)", FIRST_HOUR, re.MULTILINE)
    rows = [re.findall(r"`([A-Z_]+)`", row.split("|")[1]) for row in table.splitlines()]
    documented = {name for names in rows for name in names}
    files = [ROOT / "CMakeLists.txt", *(ROOT / "tools").glob("*.py")]
    for folder in ("src", "engine"):
        files += [file for file in (ROOT / folder).rglob("*") if file.suffix in (".py", ".cpp", ".hpp")]
    code = "\n".join(file.read_text() for file in files)
    used = set(re.findall(r"\bDTRAIN_[A-Z_]*[A-Z]\b", code))
    assert all(rows)
    assert INTERNAL_VARIABLES.keys() <= used
    assert {name for name in documented if name.startswith("DTRAIN_")} == used - INTERNAL_VARIABLES.keys()
    assert {name for name in documented if not re.search(rf"\b{name}\b", code)} == set()


def test_index():
    """docs/README.md has a row for each page."""
    rows = re.findall(r"^\| \[(\S+\.md)\]\(\1\) \|", (DOCS / "README.md").read_text(), re.MULTILINE)
    assert sorted(rows) == sorted(
        ["../CONTRIBUTING.md", *(page.name for page in DOCS.glob("*.md") if page.name != "README.md")]
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page):
    """Each link leads to a file that exists, and to a heading that the file has."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text):
        file = page.parent / target if target else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)", file.read_text(), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings], anchor
