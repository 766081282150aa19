# SPDX-License-Identifier: Apache-2.0
"""Shell of a user on one of the hosts of hosts.py, where tests type `distributed-trainer run`."""

import os
import subprocess
import sys
import time

from scripts import shell_environment

SECONDS = 10  # 5 s that `run` waits for a host, and Python's start on a busy machine
SCRIPT = (
    f"NUM_CPUS = {len(os.sched_getaffinity(0))}"
    + """
import os, torch
assert len(os.sched_getaffinity(0)) == NUM_CPUS, "this rank is bound"
from distributed_trainer.backend import job as jobs
from distributed_trainer.backend.gather import gather_objects
job = jobs.start(None, None)
tensor = torch.full((1000,), float(job.rank))
job.create_group().allreduce([tensor]).wait()
host, node = os.uname().nodename.partition("-")[0], job.node_of_rank[job.rank]
print("host %s, node %d, sum %d, %s" % (host, node, tensor[0], os.environ.get("FLAVOUR")), flush=True)
number = torch.get_num_threads()
assert f"{number} thread{'s' if number > 1 else ''} per rank ({len(job.local_ranks)} on " in job.summary, job.summary
assert len(set(gather_objects(job.create_group(), job.summary))) == 1
"""
)


class Shell:
    """Shell of a user on the first host, in a folder that all hosts see, with a script in the place of ssh."""

    def __init__(self, hosts, folder):
        self.hosts, self.folder = hosts, folder
        # Like ssh, the script passes no variables on. (Open MPI's daemon crashes without HOME.)
        agent = folder / "agent"
        agent.write_text(f'#!/bin/sh\nexec env -i PATH=/usr/bin:/bin:/usr/sbin HOME=/ {hosts.folder}/agent "$@"\n')
        agent.chmod(0o700)
        self.environment = shell_environment(PRTE_MCA_plm_ssh_agent=str(agent), HYDRA_LAUNCHER_EXEC=str(agent))
        (folder / "train.py").write_text(SCRIPT)
        (folder / "where.py").write_text("import os; print(os.uname().nodename)")
        self.write_hostfile("{} slots=2\n{}:1\n")

    def write_hostfile(self, text):
        (self.folder / "hosts.txt").write_text(text.format(*self.hosts.names))

    def on(self, host, command):
        """Run a command line of the shell on a host, in its root folder."""
        return subprocess.run(
            [*self.hosts._enter(host, mounts=True), "sh", "-c", command],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def run(self, arguments="train.py"):
        command = f"{sys.executable} -m distributed_trainer run --verbose --hostfile hosts.txt {arguments}"
        return self.on(0, f"cd {self.folder} && {command}")

    def refusal(self, arguments="train.py"):
        """Return the error that `run` prints within 10 s, instead of starting mpirun."""
        start = time.monotonic()
        result = self.run(arguments)
        assert time.monotonic() - start < SECONDS
        assert result.returncode != 0
        assert "running" not in result.stderr
        assert len(result.stderr.splitlines()) < 20
        return result.stderr
