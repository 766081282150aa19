# SPDX-License-Identifier: Apache-2.0
"""`distributed-trainer run` on this machine, as a user's shell calls it. test_run_hosts.py tests several hosts."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ranks import is_openmpi, mpirun_path
from scripts import is_alive, shell_environment

from distributed_trainer.cli import run
from distributed_trainer.cli.main import main
from distributed_trainer.launch import host_facts

pytestmark = pytest.mark.each_mpi

RANK = "OMPI_COMM_WORLD_RANK" if is_openmpi() else "PMI_RANK"
SCRIPT = f"""
import os, sys
values = os.environ["{RANK}"], sys.argv[1:], len(os.sched_getaffinity(0)), os.environ.get("FLAVOUR")
sys.stdout.write(f"rank %s got %s on %s cpus, %s\\n" % values)
"""
NUM_CPUS = len(os.sched_getaffinity(0))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "train.py").write_text(SCRIPT)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(*arguments, **extra):
    command = [sys.executable, "-m", "distributed_trainer", "run", *arguments]
    return subprocess.run(
        command, env=shell_environment(**extra), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60
    )


def lines(rank, arguments=(), flavour=None):
    return f"rank {rank} got {list(arguments)} on {NUM_CPUS} cpus, {flavour}"


def test_arguments_after_the_script_are_its_own(folder):
    """Arguments after the script go to the script; there are more ranks than cores, unbound, also as root."""
    arguments = ["--lr", "0.1", "-np", "7", "--dry-run", "-x", "a b", "", "*", "$HOME", "'", "--", "-m"]
    result = call("-np", "3", "train.py", *arguments)
    assert result.returncode == 0, result.stderr
    assert sorted(result.stdout.splitlines()) == [lines(rank, arguments) for rank in range(3)]
    assert result.stderr == ""


@pytest.mark.parametrize("options", [(), ("--tag-output",), ("--log-dir", "a b")])
def test_dry_run_prints_a_line_for_the_shell(folder, options):
    arguments = ["-np", "2", *options, "-x", "FLAVOUR=it's $HOME", "train.py", "a b", "*"]
    printed = call("--dry-run", *arguments)
    assert printed.returncode == 0, printed.stderr
    assert len(printed.stdout.splitlines()) == 1
    assert printed.stderr == ""
    assert not Path("a b").exists()
    pasted = subprocess.run(
        ["sh", "-c", printed.stdout], env=shell_environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    started = call(*arguments)
    assert pasted.returncode == started.returncode == 0, pasted.stderr
    assert sorted(pasted.stdout.splitlines()) == sorted(started.stdout.splitlines())
    text = started.stdout + "".join(file.read_text() for file in Path("a b").glob("*"))
    for rank in range(2):
        assert lines(rank, ["a b", "*"], "it's $HOME") in text


def test_output_with_the_rank(folder):
    start = r"\[1,%d\]<stdout>: ?" if is_openmpi() else r"\[%d\] "
    found = call("-np", "2", "--tag-output", "train.py").stdout
    for rank in range(2):
        assert re.search(start % rank + re.escape(lines(rank)), found), found


def test_a_file_for_each_rank(folder):
    """Each rank's file has its stdout and stderr, up to the last line of a rank that dies."""
    Path("train.py").write_text(
        "import os, sys, time\nprint('out')\nprint('err', file=sys.stderr)\n"
        f"time.sleep(1)\nos.kill(os.getpid(), 9) if os.environ['{RANK}'] == '1' else time.sleep(60)\n"
    )
    result = call("-np", "2", "--log-dir", "logs/first", "train.py")
    assert result.returncode != 0
    for rank in range(2):
        assert Path(f"logs/first/rank-{rank}.log").read_text() == "out\nerr\n"
    assert "out\n" not in result.stdout


def test_module(folder):
    Path("package").mkdir()
    Path("package/__init__.py").touch()
    Path("train.py").rename("package/train.py")
    result = call("-np", "1", "-m", "package.train", "x", "-m")
    assert result.stdout == lines(0, ["x", "-m"]) + "\n"


def test_number_of_ranks(folder):
    """By default there are as many ranks as cores."""
    result = call("train.py")
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) == host_facts.num_cores()


def test_exit_code(folder):
    Path("train.py").write_text("import sys; sys.exit(3)")
    result = call("-np", "2", "train.py")
    assert result.returncode == 3
    assert ("Exit code:    3" in result.stderr) == is_openmpi()  # MPICH prints nothing


# Rank 1 ends as this package ends a rank in which an exception was not caught.
FAILING = f"""
import os, sys, time, traceback
from mpi4py import MPI
if os.environ["{RANK}"] == "0":
    time.sleep(60)
try:
    1 / 0
except ZeroDivisionError:
    traceback.print_exc()
    time.sleep(0.3)
    MPI.COMM_WORLD.Abort(1)
"""


# One rank prints in each, since the lines of two that fail at once may be mixed.
@pytest.mark.parametrize(
    ("script", "num_ranks"), [("1 / 0", 1), ("1 /", 1), (FAILING, 2)], ids=["exception", "syntax", "abort"]
)
@pytest.mark.parametrize("option", [(), ("--tag-output",)], ids=["plain", "tagged"])
def test_an_exception_is_the_last_line(folder, script, num_ranks, option):
    Path("train.py").write_text(script)
    result = call("-np", str(num_ranks), *option, "train.py")
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert re.fullmatch(r"(\[.*\]\S* ?)?(ZeroDivisionError: division by zero|SyntaxError: invalid syntax)", last), last


def test_verbose(folder):
    """--verbose shows the command, and mpirun's words about an exception."""
    Path("train.py").write_text(FAILING)
    result = call("-np", "2", "--verbose", "train.py")
    assert f"running {mpirun_path()} " in result.stderr
    assert re.search("MPI_ABORT was invoked|application called MPI_Abort", result.stderr)


def test_a_killed_rank_is_named(folder):
    Path("train.py").write_text(f"import os, time; os.kill(os.getpid(), 9 if os.environ['{RANK}'] == '1' else 0)")
    result = call("-np", "2", "train.py")
    assert result.returncode == (137 if is_openmpi() else 9)
    assert re.search(r"rank 1 .*\n?signal 9|Killed \(signal 9\)", result.stderr + result.stdout)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_rank_is_left(folder, number):
    """No rank is left after Ctrl-C, nor if the command is killed."""
    Path("train.py").write_text("import os, time; open(f'{os.getpid()}.pid', 'w').close(); time.sleep(60)")
    command = [sys.executable, "-m", "distributed_trainer", "run", "-np", "2", "train.py"]
    with subprocess.Popen(command, env=shell_environment(), stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 30
        while len(list(folder.glob("*.pid"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(number)
        assert process.wait(timeout=20) == (130 if number == signal.SIGINT else -number)
    pids = [int(path.stem) for path in folder.glob("*.pid")]
    assert len(pids) == 2
    while any(map(is_alive, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("words", [["-m", "distributed_trainer", "run", "-np", "1", "train.py"], ["train.py"]])
@pytest.mark.slow
def test_without_home(folder, words):
    """Ranks start without HOME, as in a service of systemd, where Open MPI by itself would fail."""
    create = "d.create_distributed_trainer(torch.nn.Linear(1, 1))"
    Path("train.py").write_text(f"import torch, distributed_trainer as d\n{create}\nprint('trains')")
    environ = shell_environment()
    del environ["HOME"]
    result = subprocess.run([sys.executable, *words], env=environ, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("trains\n")


def test_what_is_set_is_left(folder):
    name = "PRTE_MCA_rmaps_default_mapping_policy"
    line = call("--dry-run", "-np", "2", "train.py").stdout
    assert (f"{name}=:oversubscribe" in line) == is_openmpi()
    assert ("OMPI_MCA_hwloc_base_binding_policy=none" in line) == is_openmpi()  # for Open MPI 4; the one above is for 5
    assert name not in call("--dry-run", "-np", "2", "train.py", **{name: "package"}).stdout


def test_in_an_allocation(folder):
    """In an allocation nothing is set that would override the scheduler's hosts and slots."""
    line = call("--dry-run", "train.py", SLURM_JOB_NODELIST="node[1-2]", DTRAIN_MALLOC="default").stdout
    assert " -np " not in line
    assert "oversubscribe" not in line
    assert (" -x DTRAIN_MALLOC " in line) == is_openmpi()
    assert " -np 3 " in call("--dry-run", "-np", "3", "train.py", PBS_NODEFILE="nodes").stdout


def test_limits_on_waits(folder):
    """Limits on waits reach ranks of this machine by the environment, and ranks of other machines by -x."""
    limits = ["--stall-report", "0.5", "--stall-timeout", "30"]
    names = "DTRAIN_STALL_REPORT", "DTRAIN_STALL_TIMEOUT"
    Path("train.py").write_text(f"import os; print(*map(os.environ.get, {names}))")
    assert call("-np", "2", *limits, "train.py", DTRAIN_STALL_REPORT="7").stdout == "0.5 30\n" * 2
    assert call("-np", "1", "train.py", DTRAIN_STALL_REPORT="7").stdout == "7 None\n"
    line = call("--dry-run", *limits, "train.py", SLURM_JOB_NODELIST="node[1-2]").stdout
    assert "DTRAIN_STALL_REPORT=0.5 " in line
    assert all((f" -x {name} " in line) == is_openmpi() for name in names)


def test_more_options_for_mpirun(folder):
    line = call("--dry-run", "--mpirun-options=-bind-to core -v", "-np", "1", "train.py").stdout
    assert re.search(r"/mpirun -bind-to core -v -np 1 ", line)


@pytest.mark.parametrize(
    ("arguments", "exit_code", "message"),
    [
        (["-np", "2", "python", "train.py"], 2, "leave out `python`: the script is run by"),
        (["-np", "2", "python3.11", "train.py"], 2, "leave out `python3.11`"),
        (["-np", "2", "tarin.py"], 2, "there is no tarin.py in /"),
        (["-np", "2", "train.py", "a", ":", "b"], 2, "can't get an argument ':'"),
        (["-np", "two", "train.py"], 2, "-np/-n: the number of ranks must be a whole number of at least 1, not 'two'"),
        (["-np", "0", "train.py"], 2, "the number of ranks must be a whole number of at least 1, not '0'"),
        (["-np", "-1", "train.py"], 2, "the number of ranks must be a whole number of at least 1, not '-1'"),
        (["--restarts", "0", "train.py"], 2, "the number of restarts must be a whole number of at least 1, not '0'"),
        (["--np", "2", "train.py"], 2, "unknown argument --np: the usage above shows what is allowed"),
        (["-np", "2"], 2, "required: SCRIPT\n"),
        (
            ["--stall-report", "0", "train.py"],
            2,
            "argument --stall-report: it must be a number of seconds above 0, not '0'",
        ),
        (["--stall-timeout", "5s", "train.py"], 2, "a number of seconds above 0, not '5s'"),
        (["-x", "FLAVOUR", "train.py"], 2, "-x FLAVOUR: no such variable is set. Set it, or write -x FLAVOUR=VALUE."),
        (["--hostfile", "hosts.txt", "train.py"], 2, "there is no hostfile hosts.txt in /"),
        (["--hostfile", "", "train.py"], 2, "--hostfile is followed by an empty name"),
    ],
)
def test_what_is_refused(folder, arguments, exit_code, message):
    result = call(*arguments)
    assert result.returncode == exit_code
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert re.match("usage: distributed-trainer run |distributed-trainer: ", result.stderr)


def test_under_mpirun(folder):
    environ = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    command = [mpirun_path(), "-np", "1", sys.executable, "-m", "distributed_trainer", "run", "train.py"]
    result = subprocess.run(command, env=shell_environment(**environ), capture_output=True, text=True, timeout=60)
    assert result.returncode != 0
    assert re.search("run` starts mpirun itself, but mpi.* has started this command. Use only one", result.stderr)


def test_no_mpi(folder):
    result = call("-np", "2", "train.py", DTRAIN_LIBMPI="/no/libmpi.so")
    assert result.returncode == 1
    assert result.stderr.startswith("distributed-trainer: DTRAIN_LIBMPI=/no/libmpi.so does not load: ")


def test_it_does_not_wait_for_torch(folder):
    command = [sys.executable, "-X", "importtime", "-m", "distributed_trainer", "run", "--dry-run", "train.py"]
    result = subprocess.run(command, env=shell_environment(), capture_output=True, text=True, timeout=60)
    assert result.returncode == 0
    assert "distributed_trainer.cli.run" in result.stderr
    assert not re.search(r"\| +(torch|numpy)$", result.stderr, re.MULTILINE)


@pytest.mark.slow
def test_a_script_of_another_name_gets_all_of_the_package(folder):
    """A script gets the whole package, also if words of its command line are those of the console command."""
    Path("train.py").write_text("import distributed_trainer as d; print(d.create_distributed_trainer.__name__)")
    for command in (["-m", "train", "-m", "distributed_trainer"], ["train.py", "distributed-trainer"]):
        result = subprocess.run([sys.executable, *command], env=shell_environment(), capture_output=True, text=True)
        assert result.stdout == "create_distributed_trainer\n", result.stderr


def test_help(capsys):
    for arguments in (["--help"], ["run", "--help"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 0
        assert "script" in capsys.readouterr().out


def test_variables_for_other_hosts():
    environ = {
        "DTRAIN_MALLOC": "default",
        "DTRAIN_RANK_PID": "7",
        "OMP_NUM_THREADS": "2",
        "PYTHONPATH": "/src",
        "CUDA_VISIBLE_DEVICES": "",
        "HOME": "/root",
        "WANDB_MODE": "offline",
        "WANDB_PROJECT": "x",
        "BASH_FUNC_which%%": "() { }",
    }
    usual = ["CUDA_VISIBLE_DEVICES", "DTRAIN_MALLOC", "OMP_NUM_THREADS", "PYTHONPATH"]
    assert list(run.select_variables(environ, [])) == usual
    assert list(run.select_variables(environ, ["WANDB_*"])) == [*usual, "WANDB_MODE", "WANDB_PROJECT"]
    assert "BASH_FUNC_which%%" not in run.select_variables(environ, ["*"])
    with pytest.raises(ValueError, match="-x WANDB_KEY"):
        run.select_variables(environ, ["WANDB_KEY"])


def fake_torch(folder, cuda, hip):
    (folder / "torch").mkdir()
    (folder / "torch" / "__init__.py").touch()
    (folder / "torch" / "version.py").write_text(f"__version__ = '2.13.0'\ncuda = {cuda!r}\nhip = {hip!r}\n")
    return folder / "torch"


@pytest.mark.parametrize(
    ("cuda", "hip", "environ", "count"),
    [
        (None, None, {}, 0),  # a CPU build on a machine with GPUs
        ("12.6", None, {}, 4),
        (None, "6.3", {}, 2),
        ("12.6", None, {"CUDA_VISIBLE_DEVICES": ""}, 0),
        ("12.6", None, {"CUDA_VISIBLE_DEVICES": "-1"}, 0),
        ("12.6", None, {"CUDA_VISIBLE_DEVICES": "2,3"}, 2),
        (None, "6.3", {"ROCR_VISIBLE_DEVICES": "1"}, 1),
    ],
)
def test_number_of_gpus(tmp_path, monkeypatch, cuda, hip, environ, count):
    folder = fake_torch(tmp_path, cuda, hip)
    monkeypatch.setattr(host_facts, "_folder_of", lambda package: folder)
    files = {"/dev/nvidia[0-9]*": ["a", "b", "c", "d"], "/dev/dri/renderD*": ["a", "b"]}
    monkeypatch.setattr(host_facts.glob, "glob", files.__getitem__)
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert host_facts.num_gpus() == count


@pytest.mark.parametrize(("limit", "cores"), [(None, 4), (64, 4), (2, 2), (1.5, 2), (0.5, 1)])
def test_number_of_cores(monkeypatch, limit, cores):
    """Hyperthreads of a core count once, and a container's limit on CPU time counts."""
    siblings = {
        f"/sys/devices/system/cpu/cpu{n}/topology/thread_siblings_list": f"{n % 4},{n % 4 + 4}" for n in range(8)
    }
    monkeypatch.setattr(host_facts, "_read", siblings.__getitem__)
    monkeypatch.setattr(host_facts, "cpu_limit", lambda: limit and (7, limit))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert host_facts.num_cores() == cores


@pytest.mark.parametrize(
    ("groups", "files", "group", "cpus"),
    [
        ("0::/\n", {}, "", None),
        ("0::/\n", {"cpu.max": "max 100000"}, "", None),
        ("0::/\n", {"cpu.max": "200000 100000"}, "", 2),  # a container
        ("\n0:/\n3\n0::x\n0:://\n", {"cpu.max": "200000 100000"}, "", 2),  # with invalid lines
        ("0::/a/b\n", {"a/cpu.max": "150000 100000", "a/b/cpu.max": "max 100000"}, "a", 1.5),  # Slurm, systemd
        ("0::/a/b\n", {"a/cpu.max": "800000 100000", "a/b/cpu.max": "20000 10000"}, "a/b", 2),
        ("0::/elsewhere/a:b\n", {"cpu.max": "300000 100000"}, "", 3),  # a container that sees the host's path
        (
            "4:memory:/m\n3:cpu,cpuacct:/a\n0::/\n",  # control groups of version 1
            {"cpu/a/cpu.cfs_quota_us": "50000", "cpu/a/cpu.cfs_period_us": "100000", "cpu.max": "max 100000"},
            "cpu/a",
            0.5,
        ),
        ("1:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, "cpu", None),
        ("2:cpuset:/a\n", {"cpu/a/cpu.cfs_quota_us": "50000", "cpu/a/cpu.cfs_period_us": "100000"}, "cpu/a", None),
    ],
)
def test_limit_of_control_groups(tmp_path, groups, files, group, cpus):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    (tmp_path / "groups").write_text(groups)
    expected = cpus and (os.stat(tmp_path / group).st_ino, cpus)
    assert host_facts.cpu_limit(str(tmp_path / "groups"), str(tmp_path)) == expected
