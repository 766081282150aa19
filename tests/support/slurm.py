# SPDX-License-Identifier: Apache-2.0
"""Real Slurm on the hosts of hosts.py: munged and slurmd on each, slurmctld on the first; they end with the hosts.

Needs Debian's slurm-wlm, munge and, for `srun --mpi=pmix`, libpmix-dev: Slurm loads libpmix.so by that name.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from hosts import Hosts

PROGRAMS = ("slurmctld", "slurmd", "munged", "srun", "salloc", "sbatch")  # for hosts.require
START_SECONDS = 30
STOP_SECONDS = 5
# TmpFS: the slurmds of all hosts see one /tmp, where their PMIx plugins would use the same folder.
# cred_expire: seconds that a job waits after it was put back into the queue; Slurm's default is 120.
CONFIGURATION = """
ClusterName=test
SlurmctldHost={controller}({controller_address})
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
TmpFS={folder}/tmp-%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=1
SlurmdParameters=config_overrides
ReturnToService=2
AuthInfo=cred_expire=10
{nodes}
PartitionName=all Nodes=ALL Default=YES State=UP
"""


class Slurm:
    """Commands that a user of the cluster types on its first host. Made by `slurm`."""

    def __init__(self, hosts: Hosts, environment: dict[str, str]) -> None:
        self._hosts = hosts
        self.environment = environment

    def start(self, command: Sequence[str], **variables: str) -> subprocess.Popen[bytes]:
        """Start a command with its output, errors included, in a pipe."""
        return subprocess.Popen(
            self._hosts.inside(0, command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**self.environment, **variables},
            start_new_session=True,
        )

    def run(self, command: Sequence[str], timeout_seconds: float = 60, **variables: str) -> tuple[int, str]:
        """Run a command; return its exit code and its output, errors included."""
        process = self.start(command, **variables)
        try:
            output = process.communicate(timeout=timeout_seconds)[0]
        finally:
            process.kill()
        return process.returncode, output.decode()


@contextlib.contextmanager
def slurm(hosts: Hosts) -> Iterator[Slurm]:
    """Run a cluster of all hosts while the context lasts; by its configuration each host has four CPUs."""
    folder = hosts.folder / "slurm"
    for name in ("", "state", *(f"tmp-{host}" for host in hosts.names)):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(64))
    configuration = folder / "slurm.conf"
    nodes = [f"NodeName={name} NodeAddr={hosts.address(n)} CPUs=4" for n, name in enumerate(hosts.names)]
    configuration.write_text(
        CONFIGURATION.format(
            controller=hosts.names[0], controller_address=hosts.address(0), folder=folder, nodes="\n".join(nodes)
        )
    )
    cluster = Slurm(hosts, {**os.environ, "SLURM_CONF": str(configuration)})
    daemons = []

    def start(number: int, name: str, *arguments: str) -> None:
        with (folder / f"{name}-{number}.log").open("wb") as log:
            command = hosts.inside(number, [f"/usr/sbin/{name}", *arguments])
            daemons.append(
                subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=cluster.environment)
            )

    try:
        for number in range(len(hosts.names)):
            hosts.shell(number, "mkdir -p /run/munge")
            files = [f"--key-file={key}", f"--log-file={folder}/munge-{number}", f"--seed-file={folder}/seed-{number}"]
            start(number, "munged", "--foreground", "--force", *files)
        start(0, "slurmctld", "-D", "-i")
        for number, name in enumerate(hosts.names):
            start(number, "slurmd", "-D", "-N", name)
        _wait_for_nodes(cluster, len(hosts.names), folder)
        yield cluster
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            try:
                daemon.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:  # slurmctld may wait for a node that has ended already
                daemon.kill()
                daemon.wait()


def _wait_for_nodes(cluster: Slurm, number: int, folder: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while (state := cluster.run(["sinfo", "-h", "-o", "%t %D"])[1]) != f"idle {number}\n":
        if time.monotonic() > deadline:
            logs = [f"---- {file.name}\n{file.read_text()[-2000:]}" for file in folder.glob("*.log")]
            raise RuntimeError(f"Slurm does not start: {state}\n" + "\n".join(logs))
        time.sleep(0.1)
