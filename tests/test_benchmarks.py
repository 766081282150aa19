# SPDX-License-Identifier: Apache-2.0
"""Each benchmark runs shortly, and prints every row of its tables, with a number in every column.

The rows and columns are written here, so that a test fails if a contender is missing in a benchmark.
"""

import re
import subprocess
import sys
from pathlib import Path

import forked
import hosts
import pytest
from ranks import JobSpec, job_environment, mpirun_path

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
MODELS = ["MLP", "transformer"]
STEPS = ["plain", "ours", "ours, sharded", "DDP on shmpi", "DDP on gloo", "one process"]
OPERATIONS = ["all_reduce", "broadcast", "all_gather", "reduce_scatter", "all_to_all", "send and recv"]
BOTH = ["exact", "rank 4"]

ALL_REDUCE = {
    "all_reduce": (["bucket", "any tensor", "MPI_Allreduce", "gloo", "floor"], ["8 B", "64 KiB", "1 MiB"]),
}
COLLECTIVES = {
    "Operations": (
        ["shmpi", "gloo"],
        [*(f"{name}, 8 B" for name in [*OPERATIONS, "barrier"]), *(f"{name}, 64 KiB" for name in OPERATIONS)],
    ),
    "Largest time over gloo's": (["ratio"], [*OPERATIONS, "barrier"]),
}
KINDS = ["shuffled", "sampler", "batch_sampler", "stream", "sharded stream"]
LOADING = {
    "An epoch": (["whole batches", "trainer.loader", "nothing read"], ["epoch"]),
    "Loaders": (["torch", "trainer.loader"], [*KINDS, *(f"{kind}, 2 workers" for kind in KINDS)]),
}
MEMORY = {"Memory": (["plain", "ours", "ours, sharded"], ["MLP"])}


def training_step(models):
    return {
        "A training step": (STEPS, models),
        "The exchange": (["exchange", "copy and floor"], models),
        "Phases of a step": (
            ["agreement", "forward", "backward", "exchange", "optimizer"],
            [f"{model}, {step}" for model in models for step in STEPS],
        ),
    }


AGREEMENT = {"The comparison": (["step", "agreement"], ["demo"])}

# Cells without a number: title, row, column.
EMPTY = {("all_reduce", "8 B", "floor")} | {
    ("Phases of a step", f"{model}, {step}", phase)
    for model in MODELS
    for step in STEPS
    if not step.startswith("ours")
    for phase in ("agreement", "exchange")
}


def tables_of(output):
    """Return each table of a benchmark's output: (title, heads, rows of cells)."""
    return [
        (title, cells(heads), [cells(row) for row in rows.splitlines()])
        for title, heads, rows in re.findall(r"^(\S.*)\n\n(\|.*)\n\|[-|]+\n((?:\|.*\n)*)", output, re.MULTILINE)
    ]


def cells(line):
    return [cell.strip() for cell in line.strip("|\n").split("|")]


def check(output, *expected):
    """Check that the tables are those expected: for each the begin of its title, its columns and its rows."""
    found = tables_of(output)
    wanted = [(title, *table) for one in expected for title, table in one.items()]
    assert len(found) == len(wanted), output
    for (title, heads, rows), (start, columns, names) in zip(found, wanted, strict=True):
        assert title.startswith(start), output
        assert heads[1:] == columns, title
        assert [row[0] for row in rows] == names, title
        for name, *values in rows:
            for column, value in zip(columns, values, strict=True):
                pattern = "" if (start, name, column) in EMPTY else r"-?[\d.,]+(e[-+]\d+)?( \(-?[\d.]+\))?"
                assert re.fullmatch(pattern, value), f"{title}: {name}, {column} is {value!r}"


def run(name, *words, num_ranks=None, timeout_seconds=110):
    """Run a benchmark on ranks, or as one process, which may start ranks itself; return its output."""
    mpirun = [mpirun_path(), "--bind-to", "none", "-np", str(num_ranks), *forked.python()]
    command = [*(mpirun if num_ranks else [sys.executable]), str(BENCHMARKS / name), "--quick", *words]
    environment = job_environment(JobSpec(num_ranks or 1))
    result = subprocess.run(command, capture_output=True, text=True, timeout=timeout_seconds, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.slow
def test_all_reduce():
    check(run("all_reduce.py", num_ranks=2), ALL_REDUCE)


def test_balance():
    output = run("balance.py", num_ranks=2)
    columns = ["equal parts", "by speed"]
    check(output, {"A training step": (columns, ["step"]), "Samples of rank 0": (columns, ["256"])})


def test_checkpoint(tmp_path):
    output = run("checkpoint.py", str(tmp_path), num_ranks=2)
    check(output, {"A checkpoint": (["step", "pause", "training", "waiting"], ["MLP"])})
    assert not list(tmp_path.iterdir())


def test_collectives():
    check(run("collectives.py", num_ranks=2), COLLECTIVES)


@pytest.mark.slow
def test_compression():
    sent = [f"{what}, {name}" for what in ("bytes", "calls") for name in BOTH]
    held_back = [f"{what}, {name}" for what in ("loss", "accuracy") for name in BOTH]
    output = run("compression.py", num_ranks=2)
    expected = {
        "A training step": (BOTH, MODELS),
        "What a rank gives to all_reduce": (sent, MODELS),
        "Test accuracy on digits": (BOTH, ["1 epoch"]),
        "Characters held back": (held_back, ["10 steps"]),
    }
    check(output, expected)
    counts = [[int(cell.replace(",", "")) for cell in row[1:]] for row in tables_of(output)[1][2]]
    for exact_bytes, few_bytes, exact_calls, few_calls in counts:
        assert 0 < few_bytes < exact_bytes / 5
        assert 0 < exact_calls < few_calls


def test_data_parallel():
    rows = [f"{model}, {wrapper}" for model in MODELS for wrapper in ("DDP", "FSDP2")]
    check(run("data_parallel.py", num_ranks=2), {"A training step": (["shmpi", "gloo"], rows)})


def test_loading():
    check(run("loading.py", num_ranks=2), LOADING)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_reproducible(num_ranks):
    output = run("reproducible.py", num_ranks=num_ranks)
    check(output, {"A training step": (["ordinary", "reproducible"], MODELS)})


@pytest.mark.slow
def test_training_step():
    check(run("training_step.py", num_ranks=2), training_step(MODELS), AGREEMENT)


@pytest.mark.long
def test_memory():
    check(run("memory.py"), MEMORY)


@pytest.mark.long
@pytest.mark.timeout(310)
def test_elastic():
    recovery = ["median", "max"], ["from 3 to 1", "from 4 to 1"]
    steps = ["run", "run --elastic"], ["small", "batchnorm"]
    check(run("elastic.py", timeout_seconds=300), {"Recovery": recovery, "A training step": steps})


@pytest.mark.long
def test_two_hosts():
    hosts.require()
    columns = ["wire", "bucket", "any tensor", "MPI_Allreduce", "gloo", "step", "step, bfloat16"]
    rows = [f"10 Gbit/s, {ranks}, 1 MiB" for ranks in (1, 2)]
    check(run("two_hosts.py"), {"all_reduce and steps over two hosts": (columns, rows)})


@pytest.mark.long
def test_collectives_on_two_hosts():
    hosts.require()
    check(run("collectives.py", "--hosts", "2"), COLLECTIVES)


@pytest.mark.long
@pytest.mark.timeout(610)
def test_bench(tmp_path):
    """`make bench` first prints how long it takes, then all tables of its launches, then their medians."""
    output = run("run.py", str(tmp_path), timeout_seconds=600)
    assert re.match(r"1 round of \d+ launches: this takes ", output)
    launches, medians = output.split("==== Medians of 1 round\n")
    expected = [ALL_REDUCE, training_step(MODELS), AGREEMENT, training_step(MODELS), AGREEMENT]
    expected += [training_step(["MLP"]), LOADING, MEMORY]
    check(launches, *expected)
    check(medians, *expected)
    files = {file.name for file in tmp_path.iterdir()}
    assert files == {"figures.json", "tables.md", "all_reduce.png", "training_step.png"}


@pytest.mark.parametrize("path", sorted(BENCHMARKS.glob("*.py")), ids=lambda path: path.stem)
def test_public_names_only(path):
    """Benchmarks use only names that the package exports."""
    text = path.read_text()
    imports = re.findall(r"^ *from distributed_trainer(\S*) import (.*)$", text, re.MULTILINE)
    names = {(module, name) for module, names in imports for name in names.split(", ")}
    public = {("", "DistributedTrainer"), ("", "create_distributed_trainer"), ("", "PowerSGD")}
    assert names <= public
    assert not re.search(r"(trainer|sharded|group|model)\._[a-z]", text)
