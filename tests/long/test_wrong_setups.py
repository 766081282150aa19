# SPDX-License-Identifier: Apache-2.0
"""Set-ups that are wrong, or look wrong, under plain mpirun: each works, or a message says why not and what to do."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hosts import Hosts, require
from ranks import JobSpec, end, is_openmpi, job_environment, mpirun_path

import distributed_trainer

SMOKE = str(Path(__file__).parents[1] / "support" / "smoke.py")
PACKAGE = Path(distributed_trainer.__file__).parent
FAMILY = "openmpi" if is_openmpi() else "mpich"

# Trains on ranks that share memory and compares with one process. A small /dev/shm could not hold the gradients.
SHARING = """
import sys, torch
from torch import nn
from distributed_trainer import create_distributed_trainer
from distributed_trainer.backend import job as jobs

torch.manual_seed(0)
model = nn.Linear(4096, 6000, bias=False)
x, y = torch.randn(4, 4096), torch.randint(6000, (4,))
expected = nn.functional.cross_entropy(model(x), y).detach()
trainer = create_distributed_trainer(model)
job = jobs.start(None, None)
assert job.node_of_rank == [0] * job.engine.size, job.node_of_rank
group = job.create_group()
for _ in range(2):
    loss = trainer.train_step(x, y, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.1))
    if expected is not None:
        torch.testing.assert_close(loss, expected)
    expected = None
message = torch.full((1 << 20,), 7.0)  # goes through MPI itself, from rank to rank
if job.rank == 0:
    group.send([message], 1, 0).wait()
elif job.rank == 1:
    group.recv([torch.zeros(1 << 20)], 0, 0).wait()
group.barrier().wait()
print("trained", flush=True)
"""


def run(command, **variables):
    """Run a command for at most 100 s; return its exit code and its output, errors included."""
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=100,
        env=job_environment(JobSpec(2), **variables),
    )
    return done.returncode, done.stdout


def require_namespaces(*options):
    done = subprocess.run(["unshare", *options, "true"], capture_output=True, text=True)
    if done.returncode != 0:
        assert "CI" not in os.environ, done.stderr
        pytest.skip(f"no namespaces for this user: {done.stderr}")


def test_other_versions_on_a_host(tmp_path):
    """One host has another package, engine, torch and Python: every rank raises the same error, and one prints it."""
    require()
    (engine,) = PACKAGE.glob(f"_engine_{FAMILY}.*.so")
    tell = "from distributed_trainer.launch import mpi_library; print(mpi_library.load_engine().engine_version)"
    version = subprocess.run([sys.executable, "-c", tell], capture_output=True, text=True, check=True).stdout.strip()
    other = {
        PACKAGE / "data" / "batch.py": (b"# SPDX", b"# Other\n# SPDX"),
        engine: (version.encode(), b"f" * len(version)),
        Path(torch.__file__).with_name("version.py"): (torch.__version__.encode(), b"2.99.1"),
    }
    script = tmp_path / "train.py"
    script.write_text(
        "import os, sys, torch._dynamo, uuid\nfrom distributed_trainer import create_distributed_trainer\n"
        "if os.uname().nodename.startswith('host1'): sys.version_info = (3, 99)\n"
        "try:\n    create_distributed_trainer(torch.nn.Linear(2, 2))\n"
        f"except Exception as error:\n    open(f'{tmp_path}/{{uuid.uuid4()}}.raised', 'w').write(str(error))\n"
        "    raise\n"
    )
    with Hosts(2) as hosts:
        for number, (file, (old, new)) in enumerate(other.items()):
            assert old in file.read_bytes()
            (tmp_path / f"{number}").write_bytes(file.read_bytes().replace(old, new))
            hosts.shell(1, f"mount --bind {tmp_path}/{number} {file}")
        start = time.monotonic()
        # Without the variable, Python would write bytecode of the other files into the folders of the first host.
        process = hosts.mpirun((2, 1), [sys.executable, str(script)], capture=True, PYTHONDONTWRITEBYTECODE="1")
        output = process.communicate(timeout=60)[0].decode()
        assert time.monotonic() - start < 30  # most of this time is the start of three ranks
    assert process.returncode != 0
    raised = [file.read_text() for file in tmp_path.glob("*.raised")]
    assert len(raised) == 3 and len(set(raised)) == 1, output
    text = raised[0]
    names = hosts.names
    assert f"its engine: {version} on {names[0]}; {'f' * len(version)} on {names[1]}\n" in text
    assert f"torch: {torch.__version__.partition('+')[0]} on {names[0]}; 2.99.1 on {names[1]}\n" in text
    assert f"Python: {sys.version_info[0]}.{sys.version_info[1]} on {names[0]}; 3.99 on {names[1]}\n" in text
    assert "distributed_trainer: " in text and "MPI: " not in text
    assert output.count("MismatchError: the machines of this job run different software") == 1


@pytest.fixture
def other_mpirun():
    """Path of the mpirun of the other MPI."""
    other = {".venv": ".venv-mpich", ".venv-mpich": ".venv"}.get(Path(sys.prefix).name, "none")
    mpirun = Path(sys.prefix).with_name(other) / "bin" / "mpirun"
    if not mpirun.exists():
        assert "CI" not in os.environ
        pytest.skip(f"no {mpirun}")
    return str(mpirun)


@pytest.mark.each_mpi
def test_mpirun_of_another_mpi(other_mpirun):
    """PATH may lead to the mpirun of another MPI: ranks then load that launcher's library, which has an engine too."""
    code, output = run([other_mpirun, "-np", "2", sys.executable, SMOKE, "2"])
    assert code == 0, output
    assert ("MPICH" if is_openmpi() else "Open MPI") in output
    assert "smoke test passed on 2 ranks" in output


@pytest.mark.each_mpi
def test_mpirun_of_another_mpi_than_is_loaded(other_mpirun):
    """mpi4py has loaded this environment's MPI, which can't join a job of the other MPI."""
    script = f"import mpi4py; mpi4py.rc.initialize = False; from mpi4py import MPI; exec(open({SMOKE!r}).read())"
    code, output = run([other_mpirun, "-np", "2", sys.executable, "-c", script, "2"])
    assert code != 0
    assert output.count("MPINotFoundError: The launcher of this process is that of ") == 1
    assert "Start it with the mpirun of that library" in output


def test_ranks_on_one_core(tmp_path):
    """The ranks of the second host are bound to one core: the job works, and one message reports it."""
    require()
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("this machine has one core")
    script = tmp_path / "bound.sh"
    script.write_text('case $(hostname) in host1*) exec taskset -c 0 "$@";; esac; exec "$@"\n')
    with Hosts(2) as hosts:
        command = ["sh", str(script), sys.executable, SMOKE, "3"]
        process = hosts.mpirun((1, 2), command, capture=True)
        output = process.communicate(timeout=60)[0].decode()
    assert process.returncode == 0, output
    assert output.count("the launcher binds") == 1
    assert f"the launcher binds the 2 rank(s) on {hosts.names[1]} to 1 of its " in output
    assert "(several to one core); mpirun --bind-to none lets them use all" in output


@pytest.mark.each_mpi
def test_dockers_bridge():
    """Both hosts have a bridge with the same address, as Docker makes it: Open MPI by itself would wait forever."""
    require()
    with Hosts(2) as hosts:
        for number in range(2):
            hosts.shell(number, "PATH=$PATH:/usr/sbin:/sbin; ip link add docker0 type bridge; ip link set docker0 up")
            hosts.shell(number, "PATH=$PATH:/usr/sbin:/sbin; ip addr add 172.17.0.1/16 dev docker0")
        process = hosts.mpirun((1, 1), [sys.executable, SMOKE, "2"], capture=True)
        try:
            output = process.communicate(timeout=60)[0].decode()
        finally:
            end(process)
    assert process.returncode == 0, output
    assert "smoke test passed on 2 ranks" in output
    assert "WARNING" not in output


@pytest.mark.each_mpi
def test_small_shared_memory():
    """/dev/shm has 64 MB, as in a Docker container: training works, since buckets are not in /dev/shm."""
    require_namespaces("--mount")
    script = 'mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "$@"'
    command = ["unshare", "--mount", "sh", "-c", script, "sh", mpirun_path(), "-np", "2", sys.executable, "-c", SHARING]
    code, output = run(command)
    assert code == 0, output
    assert output.count("trained") == 2


@pytest.mark.each_mpi
def test_a_container_for_all_ranks():
    """One rootless container holds mpirun and all ranks."""
    options = ["--user", "--map-root-user", "--mount-proc", "--mount", "--ipc", "--uts", "--pid", "--fork"]
    require_namespaces(*options)
    script = 'mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "$@"'
    launch = [mpirun_path(), "-np", "2", sys.executable, "-c", SHARING]
    code, output = run(["unshare", *options, "sh", "-c", script, "sh", *launch])
    assert code == 0, output
    assert output.count("trained") == 2
    assert not [line for line in output.splitlines() if "trained" not in line and "distributed_trainer: " not in line]


CONTAINERS = {
    "user": ["--user", "--map-root-user"],
    "process": ["--pid", "--fork"],
    "all": ["--user", "--map-root-user", "--pid", "--fork", "--mount-proc", "--mount", "--ipc", "--uts"],
}


@pytest.mark.each_mpi
@pytest.mark.parametrize("container", CONTAINERS)
def test_a_container_for_each_rank(container):
    """Each rank has its own namespaces except the network's: ranks share memory; MPI works and prints no warning."""
    options = CONTAINERS[container]
    require_namespaces(*options)
    enter = 'mount -t tmpfs tmpfs /dev/shm && exec "$@"' if "--mount" in options else 'exec "$@"'
    command = ["unshare", *options, "sh", "-c", enter, "sh", sys.executable, "-c", SHARING]
    code, output = run([mpirun_path(), "-np", "2", *command])
    assert code == 0, output
    assert output.count("trained") == 2
    assert not [line for line in output.splitlines() if "trained" not in line and "distributed_trainer: " not in line]
