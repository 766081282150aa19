# SPDX-License-Identifier: Apache-2.0
"""Training in Slurm on two hosts made of namespaces, with the MPI of this environment."""

import re
import sys
import time
from pathlib import Path

import pytest
from hosts import Hosts, require
from on_hosts import OWN, run_tests
from ranks import is_openmpi, mpirun_path
from scripts import HEAD, resuming
from slurm import PROGRAMS, slurm

from distributed_trainer.launch.mpirun import mpirun_environment

SMOKE = Path(__file__).parents[1] / "support" / "smoke.py"
LAYOUT = ["--nodes=2", "--ntasks-per-node=2"]
EXACT = ["tests/trainer/test_exactness.py::test_fifty_steps[4-ranks-adam]"]


@pytest.fixture(scope="module")
def cluster():
    require(*PROGRAMS)
    with Hosts(2) as hosts, slurm(hosts) as cluster:
        yield cluster


def own_mpirun():
    """Return mpirun's command without a hostfile: mpirun asks Slurm for the hosts.

    Open MPI must not bind ranks: it would take the CPUs that a node has by Slurm's configuration for cores.
    """
    return [mpirun_path(), *(["--bind-to", "none"] if is_openmpi() else [])]


@pytest.mark.each_mpi
def test_srun(cluster, tmp_path):
    """srun uses a process manager that MPI understands. PMIx prints nothing about authentication methods it lacks."""
    manager = "pmix" if is_openmpi() else "pmi2"
    command = ["srun", f"--mpi={manager}", *LAYOUT]
    output = run_tests(
        lambda ranks, **variables: cluster.start([*command, *ranks], **variables), (2, 2), [*OWN, *EXACT], tmp_path
    )
    said = output + "".join(file.read_text() for file in tmp_path.glob("rank-*.log"))
    assert "not found" not in said


@pytest.mark.each_mpi
def test_mpirun_in_an_allocation(cluster, tmp_path):
    command = ["salloc", "--quiet", *LAYOUT, *own_mpirun()]
    variables = mpirun_environment(4)
    run_tests(
        lambda ranks, **more: cluster.start([*command, *ranks], **variables, **more), (2, 2), [*OWN, *EXACT], tmp_path
    )


def test_batch_script(cluster, tmp_path):
    """A batch script starts training by mpirun, as users write it."""
    (tmp_path / "job.sh").write_text(
        f"#!/bin/bash\n#SBATCH --nodes=2 --ntasks-per-node=1\n"
        f"{' '.join(own_mpirun())} {sys.executable} {SMOKE} 2\n"
        f"touch {tmp_path}/end\n"
    )
    code, said = cluster.run(["sbatch", f"--output={tmp_path}/out", f"{tmp_path}/job.sh"], **mpirun_environment(2))
    assert code == 0, said
    deadline = time.monotonic() + 100
    while not (tmp_path / "end").exists() and time.monotonic() < deadline:  # sbatch --wait would look only every 32 s
        time.sleep(0.1)
    output = (tmp_path / "out").read_text()
    assert "2 ranks on 2 machines" in output
    assert "smoke test passed on 2 ranks" in output


def test_plain_srun(cluster):
    """Plain srun starts processes that do not know each other. One of them prints what to type."""
    code, output = cluster.run(["srun", "--nodes=2", "--ntasks=2", sys.executable, str(SMOKE), "2"])
    assert code != 0
    assert output.count("LaunchError: srun started 2 processes, but MPI made each of them rank 0 of 1") == 1
    manager = "pmix" if is_openmpi() else "pmi2"
    assert re.search(rf"Type `srun --mpi={manager}` \(`srun --mpi=list` shows what this Slurm has\)", output)
    assert "passed" not in output


def test_one_task(cluster):
    """One task of srun trains alone: it is no part of a larger job."""
    code, output = cluster.run(["srun", "--ntasks=1", sys.executable, str(SMOKE), "1"])
    assert code == 0, output
    assert "smoke test passed on 1 ranks" in output


# The job script of docs/reliability.md, with a time limit of one minute. Slurm checks the time every 30 s and sends the
# signal at the first check.
JOB = """#!/bin/bash
#SBATCH --nodes=2 --ntasks-per-node=1
#SBATCH --time=1 --signal=USR1@59
#SBATCH --requeue --open-mode=append
srun --mpi={manager} {python} train.py
echo "ended with $?"
test -e finished || scontrol requeue $SLURM_JOB_ID
"""


def test_time_is_over(cluster, tmp_path):
    """The ranks save at Slurm's signal; the job puts itself back into the queue, and continues where it was."""
    # A job that continues ends after the epoch that follows the interrupted one.
    epochs = "2 + int(max(os.listdir('checkpoints'))[5:]) // 5 if os.path.exists('checkpoints') else 100_000"
    (tmp_path / "train.py").write_text(HEAD + resuming(epochs, "0.05", "open('finished', 'w').close()"))
    (tmp_path / "job.sh").write_text(JOB.format(manager="pmix" if is_openmpi() else "pmi2", python=sys.executable))
    options = [f"--chdir={tmp_path}", f"--output={tmp_path}/out"]
    code, said = cluster.run(["sbatch", *options, f"{tmp_path}/job.sh"])
    assert code == 0, said
    deadline = time.monotonic() + 110
    while not (tmp_path / "finished").exists():
        state = cluster.run(["squeue", "--noheader", "--format=%T %r"])[1]
        assert time.monotonic() < deadline, f"{state}{(tmp_path / 'out').read_text()}"
        time.sleep(0.5)
    output = (tmp_path / "out").read_text()
    (step,) = re.findall(r"SIGUSR1: saved step (\d+) in \S+checkpoints, ending", output)
    assert output.count("from None") == output.count(f"from {step}") == output.count(f"epoch {int(step) // 5}\n") == 2
    while output.count("ended with 0") < 2:
        assert time.monotonic() < deadline, output
        time.sleep(0.1)
        output = (tmp_path / "out").read_text()
