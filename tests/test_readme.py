# SPDX-License-Identifier: Apache-2.0
"""The README's code runs, its commands exist, and its links lead somewhere."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import forked
import pytest
from ranks import JobSpec, job_environment, mpirun_path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
CODE = [text for language, text in BLOCKS if language == "python"]
LINES = [line.split("#")[0].strip() for language, text in BLOCKS if language != "python" for line in text.splitlines()]
COMMANDS = list(filter(None, LINES))

# Code that the README's example assumes before it, and code that prints the number of ranks after it.
BEFORE = """
import os
import torch
num_epochs = 2
torch.manual_seed(0)
class YourModel(torch.nn.Linear):
    def __init__(self):
        super().__init__(3, 2)
dataset = torch.utils.data.TensorDataset(torch.randn(10, 3), torch.arange(10) % 2)
dataloader = torch.utils.data.DataLoader(dataset, batch_size=4, shuffle=True)
"""
AFTER = "\nprint('trained on', trainer.world_size)\n"
# Each way to start the example. mpirun starts it in processes that have imported torch already.
STARTS = [
    pytest.param(command, marks=[] if command.startswith("mpirun") else pytest.mark.slow)
    for command in COMMANDS
    if command.endswith(" train.py")
]


def run_script(tmp_path, code, command):
    (tmp_path / "train.py").write_text(BEFORE + code + AFTER)
    (tmp_path / "hosts.txt").write_text("localhost slots=4\n" if "slots" in command else "localhost\n")
    words = shlex.split(command)
    if words[0] == "distributed-trainer":
        words[:1] = [sys.executable, "-m", "distributed_trainer"]
    else:
        words[:1] = [mpirun_path()] if words[0] == "mpirun" else [sys.executable]
    words = [other for word in words for other in (forked.python() if word == "python" else [word])]
    return subprocess.run(
        words, cwd=tmp_path, env=job_environment(JobSpec(4)), capture_output=True, text=True, timeout=100
    )


@pytest.mark.parametrize("command", STARTS or [None])
def test_example(tmp_path, command):
    """Each way to start the example trains; every rank prints the same losses."""
    assert command, "the README names no way to start the script"
    assert len(CODE) == 1
    num_ranks = 4 if command.startswith("mpirun -np 4") else 2  # 4 ranks only once, because they take seconds to start
    result = run_script(tmp_path, CODE[0], command.replace("-np 4", f"-np {num_ranks}"))
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count(f"trained on {num_ranks}") == num_ranks
    losses = re.findall(r"Loss: ([\d.]+)", result.stdout)
    assert len(losses) == num_ranks * 2 * 3
    assert all(losses.count(loss) % num_ranks == 0 for loss in losses)
    assert "optimizer's state" not in result.stderr.replace("the state of the last one", "optimizer's state")


def test_training_document(tmp_path):
    """The code of docs/training.md runs, from its first block to its last."""
    document = (ROOT / "docs" / "training.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", document, re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 6
    support = ROOT / "tests" / "support"
    stand_in = f"import sys\nsys.path.append({str(support)!r})\nimport small_graphs\n"
    stand_in += "sys.modules['torch_geometric.data'] = small_graphs\n"  # torch_geometric need not be installed
    result = run_script(tmp_path, stand_in + "\n".join(blocks), "mpirun -np 2 python train.py")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("trained on 2") == 2
    assert len(set(re.findall(r"accuracy ([\d.]+)%", result.stdout))) == 1
    assert "WARNING" not in result.stderr


@pytest.mark.slow
def test_example_with_a_new_optimizer_each_step(tmp_path):
    """A new optimizer in each step, as beginners write it, works and gives one warning."""
    code = CODE[0].replace("optimizer = torch.optim.Adam(model.parameters())\n", "")
    code = code.replace("optimizer=optimizer", "optimizer=torch.optim.Adam(model.parameters())")
    result = run_script(tmp_path, code, "python train.py")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("trained on 2") == 2
    assert result.stderr.count("Make the optimizer once, before the loop.") == 1


def test_commands_exist():
    """Targets of make, extras of the package, and scripts that the README names exist."""
    targets = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))
    project = (ROOT / "pyproject.toml").read_text()
    known = ("make ", "pip install", "python setup.py", "python train.py", "mpirun ", "distributed-trainer run")
    for command in COMMANDS:
        assert command.startswith(known), f"{command!r}: say here how to test it"
        if command.startswith("make "):
            assert command.split()[1] in targets
        for extra in re.findall(r"\.\[(\w+)\]", command):
            assert re.search(rf"^{extra} = \[", project, re.MULTILINE)


def test_links():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target
