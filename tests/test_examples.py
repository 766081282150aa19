# SPDX-License-Identifier: Apache-2.0
"""Each example runs shortly, and learns; test_install.py tests the first one, `make demo`."""

import re
import subprocess
from pathlib import Path

import forked
import pytest
from ranks import JobSpec, job_environment, mpirun_path

pytestmark = pytest.mark.long

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name, num_ranks, *arguments):
    command = [mpirun_path(), "-np", str(num_ranks), *forked.python(), str(EXAMPLES / name), *arguments]
    environment = job_environment(JobSpec(num_ranks))
    result = subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_digits():
    output = run("train_digits.py", 2, "--epochs", "2")
    accuracies = [float(percent) for percent in re.findall(r"epoch +\d+: .*accuracy ([\d.]+)%", output)]
    assert len(accuracies) == 2
    assert accuracies[-1] > 70


def test_digits_apart(tmp_path):
    """The losses of every epoch and the weights of two runs are compared."""
    results = str(tmp_path / "results.pt")
    run("train_digits.py", 2, "--epochs", "2", "--results", results)
    output = run("train_digits.py", 1, "--epochs", "2", "--compare", results)
    assert re.search(r"ranks +seconds +test accuracy\n +1 .*%\n +2 .*%\n", output)
    apart = re.search(r"losses of all 24 steps differ by at most (\S+) of .* final weights by at most (\S+) of", output)
    losses, weights = map(float, apart.groups())
    assert losses < 1e-4
    assert weights < 0.05  # most of it is rounding, in biases and statistics near 0


def test_characters():
    output = run("train_characters.py", 2, "--epochs", "2", "--text-length", "60000", "--batch-size", "32")
    losses = [float(loss) for loss in re.findall(r"epoch \d: test loss ([\d.]+)", output)]
    assert len(losses) == 2
    assert losses[1] < losses[0] < 4.16  # log(64) is the loss of guessing


def test_gan():
    output = run("train_gan.py", 2, "--steps", "600", "--batch-size", "101")
    distances = [float(distance) for distance in re.findall(r"([\d.]+) from the circle", output)]
    assert len(distances) == 2
    assert distances[-1] < 0.5  # the distance is 1 at the start, and if all points are in the middle


def test_own_loader():
    output = run("train_own_loader.py", 3, "--epochs", "3")
    accuracies = [float(percent) for percent in re.findall(r"accuracy ([\d.]+)%", output)]
    assert len(accuracies) == 3
    assert accuracies[-1] > 80


def test_from_ddp():
    output = run("from_ddp.py", 3)
    ddp, ours = (float(number) for number in re.findall(r" ([\d.]+e-?\d+)", output))
    assert ddp > 1e-3
    assert ours < 1e-12


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_short(path):
    assert len(path.read_text().splitlines()) < 120
    assert f"def test_{path.stem.removeprefix('train_')}()" in Path(__file__).read_text()
