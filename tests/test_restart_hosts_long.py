# SPDX-License-Identifier: Apache-2.0
"""`distributed-trainer run --restarts`, or `--elastic`, where a host is lost: the job goes on on what is left."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hosts import Hosts, require
from scripts import HEAD
from test_run_hosts_long import Shell

pytestmark = pytest.mark.long

SCRIPT = """
trainer = create_distributed_trainer(model)
open(f"ranks-{trainer.world_size}", "w").close()
for _ in range(100 if trainer.world_size == 3 else 2):
    step(trainer)
    time.sleep(0.2)
print("end", trainer.rank, trainer.world_size, flush=True)
"""


def processes_of(host):
    """Of a pretended host, but for the one that holds it."""
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
        (hosts.folder / f"{hosts.names[1]}.pid").unlink()  # what stands for ssh finds it no more
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
