# SPDX-License-Identifier: Apache-2.0
"""`distributed-trainer run --restarts`, with and without `--elastic`: when a host is lost, the job continues."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from host_shell import Shell
from hosts import Hosts, require
from scripts import HEAD

pytestmark = pytest.mark.each_mpi

SCRIPT = """
trainer = create_distributed_trainer(model)
open(f"ranks-{trainer.world_size}", "w").close()
for _ in range(100 if trainer.world_size == 3 else 2):
    step(trainer)
    time.sleep(0.2)
print("end", trainer.rank, trainer.world_size, flush=True)
"""


def processes_of(host):
    """Yield the processes of a pretended host, except the one that holds its namespaces."""
    network = os.readlink(f"/proc/{host.pid}/ns/net")
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(entry / "ns/net") == network and int(entry.name) != host.pid:
                yield int(entry.name)
        except OSError:
            continue


@pytest.mark.parametrize("option", ["--restarts 2", "--elastic --restarts 2"])
def test_lost_host(tmp_path, option):
    require()
    with Hosts(2) as hosts:
        shell = Shell(hosts, tmp_path)
        (tmp_path / "train.py").write_text(HEAD + SCRIPT)
        command = f"{sys.executable} -m distributed_trainer run {option} --hostfile hosts.txt train.py"
        job = subprocess.Popen(
            [*hosts._enter(0, mounts=True), "sh", "-c", f"cd {tmp_path} && {command}"],
            env=shell.environment,
            stdin=subprocess.DEVNULL,
            stdout=(tmp_path / "out").open("w"),
            stderr=(tmp_path / "err").open("w"),
        )
        deadline = time.monotonic() + 60
        while not (tmp_path / "ranks-3").exists():
            assert time.monotonic() < deadline and job.poll() is None, (tmp_path / "err").read_text()
            time.sleep(0.1)
        time.sleep(1)
        (hosts.folder / f"{hosts.names[1]}.pid").unlink()  # the script that stands for ssh no longer finds it
        for pid in list(processes_of(hosts._holders[1])):
            os.kill(pid, signal.SIGKILL)
        try:
            code = job.wait(60)
        except subprocess.TimeoutExpired:
            code = None
        text = (tmp_path / "err").read_text()
        assert code == 0, text
        assert sorted((tmp_path / "out").read_text().splitlines()[-2:]) == ["end 0 2", "end 1 2"]
        assert f"; {hosts.names[1]} is left out: " in text
        assert "; restart 1 of 2\n" in text
    assert not list(tmp_path.glob(".distributed-trainer*"))
