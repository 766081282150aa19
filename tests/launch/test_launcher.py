# SPDX-License-Identifier: Apache-2.0
"""Launchers, the restart under mpirun and the end of a failing job, with the mpirun of this environment.

The scripts import the files of launch/ without the rest of the package, so without torch, which takes seconds.
"""

import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from ranks import is_openmpi

import distributed_trainer
from distributed_trainer import LaunchError
from distributed_trainer.launch.failure import install_excepthook
from distributed_trainer.launch.launcher import Launcher, cpus_of_launcher, find_launcher, in_data_worker, mark_rank
from distributed_trainer.launch.mpi_library import MPILibrary
from distributed_trainer.launch.mpirun import mpirun_environment
from distributed_trainer.launch.relaunch import check_world_size, restart_under_mpirun

pytestmark = pytest.mark.each_mpi

MPIRUN = str(Path(sys.prefix) / "bin" / "mpirun")
PACKAGE = Path(distributed_trainer.__file__).parent
PRELUDE = f"""
import os, sys, types
package = sys.modules["distributed_trainer"] = types.ModuleType("distributed_trainer")
package.__path__ = [{str(PACKAGE)!r}]
from mpi4py import rc
rc.initialize, rc.finalize = False, True
from mpi4py import MPI
from distributed_trainer.launch import mpi_library
from distributed_trainer.launch.failure import install_excepthook
from distributed_trainer.launch.launcher import cpus_of_launcher, find_launcher, find_launcher_process
from distributed_trainer.launch.launcher import in_data_worker, mark_rank
from distributed_trainer.launch.relaunch import check_world_size, restart_under_mpirun
mpi = mpi_library.loaded_mpi()
launcher = find_launcher(os.environ)
"""
OPENMPI = MPILibrary("/opt/openmpi/lib/libmpi.so.40", "openmpi")
MPICH = MPILibrary("/opt/mpich/lib/libmpi.so.12", "mpich")


@pytest.fixture(autouse=True)
def shell(monkeypatch):
    """Give the test the environment of a shell, even if a launcher or `make` has started the tests."""
    for name in list(os.environ):
        if re.match("OMPI_|PRTE_|PMIX?_|MPI_|SLURM_|DTRAIN_|PYTHONUNBUFFERED", name):
            monkeypatch.delenv(name)


def run(*command, environ=None, standard_input="", cwd=None):
    return subprocess.run(
        [str(part) for part in command],
        env={**os.environ, **(environ or {})},
        input=standard_input,
        capture_output=True,
        text=True,
        timeout=60,
        cwd=cwd,
    )


def mpirun(num_ranks, *command, **environ):
    environ = mpirun_environment(num_ranks) | environ
    return run(MPIRUN, "-np", num_ranks, *command, environ=environ)


@pytest.fixture
def script(tmp_path):
    """Function that writes a script with the functions of launch/, `launcher`, `mpi` and mpi4py's `MPI`.

    In the script MPI is not initialized.
    """

    def write(body, name="train.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(PRELUDE + textwrap.dedent(body))
        return path

    return write


OPENMPI_RANK = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_RANK": "3",
}
HYDRA_RANK = {"PMI_RANK": "3", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
SBATCH = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
SRUN_TASK = SBATCH | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}
SRUN_SHELL = SBATCH | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"}
SALLOC_SHELL = SBATCH | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "8"}
TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none",
    "RANK": "3",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
}


@pytest.mark.parametrize(
    ("environ", "launcher"),
    [
        ({}, None),
        (OPENMPI_RANK, Launcher("mpirun of Open MPI", 3, 8, 1, 2)),
        (HYDRA_RANK, Launcher("mpiexec of MPICH", 3, 8, 1, 2)),
        (SRUN_TASK, Launcher("srun", 3, 8, 1, None)),
        (SRUN_TASK | {"PMI_RANK": "3", "PMI_SIZE": "8"}, Launcher("srun", 3, 8, 1, None)),  # --mpi=pmi2
        (SRUN_TASK | {"PMIX_RANK": "3"}, Launcher("srun", 3, 8, 1, None)),  # --mpi=pmix
        (SBATCH, None),
        (SRUN_SHELL, None),
        (SRUN_SHELL | {"PMIX_RANK": "0"}, None),
        (SALLOC_SHELL, None),
        (SBATCH | OPENMPI_RANK, Launcher("mpirun of Open MPI", 3, 8, 1, 2)),
        (SRUN_SHELL | HYDRA_RANK, Launcher("mpiexec of MPICH", 3, 8, 1, 2)),
        (SRUN_TASK | OPENMPI_RANK, Launcher("mpirun of Open MPI", 3, 8, 1, 2)),  # Open MPI's daemons are srun's tasks
        (SRUN_TASK | TORCHRUN, Launcher("torchrun", 3, 8, 1, 2)),
        (
            {"PALS_RANKID": "3", "PALS_LOCAL_RANKID": "1", "PALS_LOCAL_SIZE": "2"},
            Launcher("PALS", 3, None, 1, 2),
        ),
        ({"PMI_RANK": "3", "PMI_SIZE": "8"}, Launcher("a PMI launcher", 3, 8, None, None)),
        ({"PMIX_RANK": "3"}, Launcher("a PMIx launcher", 3, None, None, None)),
    ],
)
def test_launcher(environ, launcher):
    assert find_launcher(environ) == launcher


@pytest.mark.parametrize(
    ("name", "mpi", "remedy"),
    [
        ("srun", OPENMPI, "`srun --mpi=pmix`"),
        ("srun", MPICH, "`srun --mpi=pmi2`"),
        ("torchrun", OPENMPI, "`mpirun -np 4 python train.py`"),
        ("mpirun of Open MPI", OPENMPI, "DTRAIN_LIBMPI"),
        ("mpiexec of MPICH", MPICH, "`mpirun -np 4 python train.py`"),
    ],
)
def test_processes_that_are_each_rank_0_of_1(name, mpi, remedy, monkeypatch):
    monkeypatch.setattr("distributed_trainer.launch.relaunch.find_mpirun", lambda mpi: "mpirun")
    with pytest.raises(LaunchError) as caught:
        check_world_size(Launcher(name, 0, 4, 0, 4), 1, mpi)
    for part in (
        f"{name} started 4 processes",
        "rank 0 of 1",
        "no MPI job" if name == "torchrun" else mpi.path,
        remedy,
    ):
        assert part in str(caught.value)


def test_launcher_that_tells_only_the_local_size():
    with pytest.raises(LaunchError, match="PALS started at least 2 processes"):
        check_world_size(Launcher("PALS", 0, None, 0, 2), 1, MPICH)


@pytest.mark.parametrize(
    ("launcher", "world_size"),
    [
        (None, 1),
        (None, 4),
        (Launcher("mpirun of Open MPI", 0, 1, 0, 1), 1),
        (Launcher("mpirun of Open MPI", 0, 4, 0, 4), 4),
        (Launcher("srun", 0, 4, 0, None), 2),
        (Launcher("a PMIx launcher", 0, None, None, None), 1),
    ],
)
def test_a_good_launch(launcher, world_size):
    check_world_size(launcher, world_size, OPENMPI)


@pytest.mark.slow
def test_only_rank_0_speaks_and_all_fail(script):
    """Only rank 0 prints the error and all ranks fail; rank 0 raises last, and its message is not lost."""
    path = script("import time; time.sleep(0 if launcher.rank else 0.5); check_world_size(launcher, 1, mpi)")
    result = mpirun(4, sys.executable, path)
    assert result.returncode != 0
    assert result.stderr.count("started 4 processes, but MPI made each of them rank 0 of 1") == 1
    assert len(result.stderr.splitlines()) < 40
    rank_1 = run(sys.executable, path, environ={"PMI_RANK": "1", "PMI_SIZE": "4"})
    assert (rank_1.returncode, rank_1.stderr) == (1, "")


RESTART = """
if launcher is None:
    print("not flushed")
    restart_under_mpirun(3, mpi)
MPI.Init()
world = MPI.COMM_WORLD
facts = world.gather((sys.argv[1:], sys.flags.optimize, sys.flags.dev_mode, os.getcwd(), __name__))
if world.rank == 0:
    print(world.size, all(fact == facts[0] for fact in facts), *facts[0], sep="|")
"""


def check_restart(result, arguments, optimize, dev_mode, folder):
    assert result.returncode == 0, result.stderr
    first, second = result.stdout.splitlines()
    assert first == "not flushed"
    assert second == f"3|True|{arguments}|{optimize}|{dev_mode}|{folder}|__main__"
    [line] = [line for line in result.stderr.splitlines() if "num_gpus=3" in line]
    assert f"running {MPIRUN} -np 3 {sys.executable}" in line


def test_restart_keeps_interpreter_options_and_arguments(script, tmp_path):
    script(RESTART)
    arguments = ["-np", "7", "a b", "", "*", "$HOME", "'", "--", "--mca", "é", "-c"]
    result = run(sys.executable, "-O", "-X", "dev", "-W", "ignore", "train.py", *arguments, cwd=tmp_path)
    check_restart(result, arguments, 1, True, tmp_path)


def test_restart_of_a_module(script, tmp_path):
    script(RESTART, "package/train.py")
    result = run(sys.executable, "-m", "package.train", "x", cwd=tmp_path)
    check_restart(result, ["x"], 0, False, tmp_path)


def test_restart_begins_where_the_script_began(script, tmp_path):
    script("if launcher is None: os.chdir('/')\n" + RESTART)
    check_restart(run(sys.executable, "train.py", cwd=tmp_path), [], 0, False, tmp_path)


def test_restart_passes_on_the_exit_code(script, tmp_path):
    path = script("launcher or restart_under_mpirun(2, mpi)\nMPI.Init()\nMPI.COMM_WORLD.Abort(7)")
    assert run(sys.executable, path).returncode == 7


def test_restart_cannot_loop(script, tmp_path):
    """A script does not restart itself again and again if mpirun starts no MPI job."""
    fake = tmp_path / "bin" / "mpirun"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\n[ "$1" = --version ] && echo open-mpi.org HYDRA && exit\nshift 2\nexec "$@"\n')
    fake.chmod(0o755)
    path = script(f"restart_under_mpirun(2, mpi_library.MPILibrary('{tmp_path}/lib/libmpi.so', mpi.family))")
    result = run(sys.executable, path)
    assert result.returncode == 1
    assert result.stderr.count("running") == 1
    assert f"made this script run again as `{fake} -np 2 {sys.executable} {path}`" in result.stderr
    assert f"Type `{fake} -np 2 python train.py`" in result.stderr


@pytest.mark.parametrize("how", ["-c", "stdin", "-", "-i", "spawned", "':'"])
def test_what_cannot_be_restarted(script, how):
    path = script("if __name__ == '__main__': restart_under_mpirun(3, mpi)")
    code = path.read_text()
    if how == "spawned":
        path.write_text(
            code.replace(
                ": restart",
                ": import multiprocessing as mp; mp.set_start_method('spawn'); p = mp.Process(target=restart",
            ).replace("mpirun(3, mpi)", "mpirun, args=(3, mpi)); p.start(); p.join(); sys.exit(p.exitcode)")
        )
    command, standard_input = {
        "-c": (["-c", code], ""),
        "stdin": ([], code),
        "-": (["-", "x"], code),
        "-i": (["-i", path], ""),
        "spawned": ([path], ""),
        "':'": ([path, "a", ":", "b"], ""),
    }[how]
    result = run(sys.executable, *command, standard_input=standard_input)
    assert result.returncode == (0 if how == "-i" else 1)
    assert "num_gpus=3 needs 3 processes, and " in result.stderr and "cannot be run again" in result.stderr
    assert re.search(r"type `\S*mpirun -np 3 python train.py`", result.stderr)


def test_no_restart_inside_a_test():
    with pytest.raises(LaunchError, match="pytest"):
        restart_under_mpirun(2, OPENMPI)


def test_environment_starts_unbound_ranks_beyond_the_cores(script):
    cpus = os.sched_getaffinity(0)
    path = script("print(sorted(os.sched_getaffinity(0)))")
    bound = {"PRTE_MCA_rmaps_default_mapping_policy": "slot"}  # with it Open MPI binds each of two ranks to a core
    for num_ranks, environ in (len(cpus) + 1, {}), (min(len(cpus), 2), bound):
        result = mpirun(num_ranks, sys.executable, path, **environ)
        assert result.returncode == 0, result.stderr
        assert result.stdout.count(str(sorted(cpus))) == num_ranks


def test_launcher_process(script):
    """The launcher's process is found, also behind a wrapper shell, and so are its CPUs."""
    path = script("""
        pid = find_launcher_process(launcher)
        print(open(f"/proc/{pid}/comm").read().strip(), pid == os.getppid(), len(cpus_of_launcher(launcher)))
    """)
    name = "prterun" if is_openmpi() else "hydra_pmi_proxy"
    num_cpus = len(os.sched_getaffinity(0))
    assert mpirun(1, sys.executable, path).stdout == f"{name} True {num_cpus}\n"
    wrapper = f"{sys.executable} {path}; true"
    assert mpirun(1, "bash", "-c", wrapper).stdout == f"{name} False {num_cpus}\n"


def test_cpus_of_a_daemon_of_the_system_say_nothing(monkeypatch):
    monkeypatch.setattr("distributed_trainer.launch.launcher.find_launcher_process", lambda launcher: os.getpid())
    assert cpus_of_launcher(Launcher("srun", 0, 2, 0, None)) == set()


def test_no_launcher_process_without_a_launcher(script):
    """A run without a launcher survives the program that started it, even if an mpirun is among its ancestors."""
    path = script("print(find_launcher_process(None), cpus_of_launcher(None))")
    assert mpirun(1, sys.executable, path).stdout == "None set()\n"


def test_process_that_a_rank_starts(script):
    """A child of a rank is refused, unless another mpirun starts it."""
    child = script("MPI.Init()\nprint(launcher.rank, launcher.size, MPI.COMM_WORLD.size)", "child.py")
    path = script(f"""
        import subprocess
        MPI.Init()
        mark_rank()
        find_launcher(os.environ)  # the rank itself may ask again
        if launcher.rank == 0:
            result = subprocess.run([sys.executable, "{child}"], capture_output=True, text=True)
            print(result.returncode, result.stderr.splitlines()[-1])
            print(subprocess.run(["{MPIRUN}", "-np", "1", sys.executable, "{child}"], capture_output=True, text=True))
        MPI.COMM_WORLD.Barrier()
    """)
    result = mpirun(2, sys.executable, path)
    assert result.returncode == 0, result.stderr
    refused, nested = result.stdout.splitlines()
    assert re.match(r"1 distributed_trainer.errors.LaunchError: Process \d+ was started by .*rank 0 of a job", refused)
    assert "returncode=0, stdout='0 1 1\\n'" in nested


def test_restarted_rank_lets_its_scripts_restart(monkeypatch):
    monkeypatch.setenv("DTRAIN_RESTARTED", "mpirun")
    monkeypatch.setenv("DTRAIN_RANK_PID", "")
    monkeypatch.setattr("distributed_trainer.launch.launcher._rank_pid", None)
    mark_rank()
    assert "DTRAIN_RESTARTED" not in os.environ
    assert os.environ["DTRAIN_RANK_PID"] == str(os.getpid())


class InDataWorker(torch.utils.data.Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        return in_data_worker()


def test_data_worker():
    assert not in_data_worker()
    assert next(iter(torch.utils.data.DataLoader(InDataWorker(), num_workers=1))).item() is True


def test_forked_child_of_a_rank(script):
    path = script("""
        def in_child():
            read, write = os.pipe()
            if os.fork() == 0:
                os.write(write, str(in_data_worker()).encode())
                os._exit(0)
            return os.read(read, 10).decode()
        print(in_data_worker(), in_child())
        mark_rank()
        print(in_data_worker(), in_child())
    """)
    assert run(sys.executable, path).stdout == "False False\nFalse True\n"


FAILING = """
def earlier_hook(kind, error, trace):
    print("earlier hook", file=sys.stderr)
    sys.__excepthook__(kind, error, trace)
sys.excepthook = earlier_hook
MPI.Init()
world = MPI.COMM_WORLD
install_excepthook(world.Abort, world.rank, world.size)
print("last words")
"""


def check_failure(result, exit_code, rank):
    assert result.returncode == exit_code
    first = f"rank {rank} of 3 on {os.uname().nodename} failed:\nearlier hook\nTraceback (most recent call last):\n"
    assert result.stderr.startswith(first), result.stderr
    assert result.stderr.count("ValueError: bad\n") == 1
    assert "last words" in result.stdout


def test_exception_in_one_rank_ends_the_job(script):
    path = script(FAILING + "if world.rank == 1: raise ValueError('bad')\nworld.Barrier()")
    check_failure(mpirun(3, sys.executable, path), 1, 1)


def test_exception_in_all_ranks_is_printed_once(script):
    path = script(FAILING + "raise ValueError('bad')")
    check_failure(mpirun(3, sys.executable, path), 1, 0)


def test_abort_that_fails(script):
    """If abort fails, the process still ends, without its exit handlers, which would wait for the other ranks."""
    path = script("""
        import atexit
        atexit.register(print, "exit handler")
        install_excepthook(lambda code: 1 / 0, 0, 3)
        raise ValueError("bad")
    """)
    result = run(sys.executable, path)
    assert (result.returncode, result.stdout) == (1, "")
    assert "ValueError: bad" in result.stderr


def test_interrupt(script):
    """An interrupted rank of a module started with -m flushes its output and says that it was interrupted."""
    path = script(FAILING + "if world.rank == 1: os.kill(os.getpid(), 2)\nworld.Barrier()")
    result = mpirun(3, sys.executable, "-m", path.stem, PYTHONPATH=str(path.parent))
    assert result.returncode == 130
    assert f"rank 1 of 3 on {os.uname().nodename} was interrupted" in result.stderr.splitlines()
    assert "Traceback" not in result.stderr
    assert "last words" in result.stdout


def test_no_hook_for_one_rank():
    hook = sys.excepthook
    install_excepthook(os.abort, 0, 1)
    assert sys.excepthook is hook


def test_ctrl_c_on_a_restarted_script(script):
    """Ctrl-C in the shell reaches mpirun alone, which has the script's process number, and ends the job."""
    path = script("""
        launcher or restart_under_mpirun(2, mpi)
        MPI.Init()
        install_excepthook(MPI.COMM_WORLD.Abort, MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size)
        print("ready", flush=True)
        MPI.COMM_WORLD.Barrier() if MPI.COMM_WORLD.rank else __import__("time").sleep(60)
    """)
    with subprocess.Popen([sys.executable, path], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as job:
        for _ in range(2):
            assert job.stdout.readline().strip() == b"ready"
        job.send_signal(signal.SIGINT)
        job.communicate(timeout=30)
    assert job.returncode != 0
