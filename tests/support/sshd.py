# SPDX-License-Identifier: Apache-2.0
"""Real ssh between the hosts of hosts.py: an sshd on each host, and keys where the system's ssh finds them by itself.

All hosts have a temporary folder as /etc/ssh, so the settings and keys of this machine are neither used nor changed.
Needs Debian's openssh-server and openssh-client.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from hosts import Hosts

SERVER = """
HostKey /etc/ssh/host_key
AuthorizedKeysFile /etc/ssh/authorized_keys
PasswordAuthentication no
UsePAM no
PidFile none
MaxStartups 100
"""
CLIENT = """
IdentityFile /etc/ssh/user_key
StrictHostKeyChecking accept-new
UserKnownHostsFile /etc/ssh/known_hosts
LogLevel ERROR
"""


@contextlib.contextmanager
def sshd(hosts: Hosts) -> Iterator[Path]:
    """Make `ssh NAME` work between the hosts while the context lasts. The context gives the folder of /etc/ssh."""
    folder = hosts.folder / "ssh"
    folder.mkdir()
    (folder / "sshd_config").write_text(SERVER)
    (folder / "ssh_config").write_text(CLIENT)
    for name in ("host_key", "user_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    (folder / "user_key.pub").rename(folder / "authorized_keys")
    daemons = []
    try:
        for number, name in enumerate(hosts.names):
            hosts.shell(number, f"mkdir -p /run/sshd; mount --bind {folder} /etc/ssh")
            log = (hosts.folder / f"sshd-{name}.log").open("wb")
            daemons.append(
                subprocess.Popen(
                    hosts.inside(number, ["/usr/sbin/sshd", "-D", "-e"]), stdin=subprocess.DEVNULL, stderr=log
                )
            )
            log.close()
        for name in hosts.names:
            _wait_for(hosts, name)
        yield folder
    finally:
        for daemon in daemons:
            daemon.terminate()
            daemon.wait()
        for number in range(len(hosts.names)):
            hosts.shell(number, "umount /etc/ssh")


def _wait_for(hosts: Hosts, name: str) -> None:
    deadline = time.monotonic() + 20
    while True:
        command = hosts.inside(0, ["ssh", "-o", "ConnectTimeout=5", name, "hostname"])
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=dict(os.environ))
        if done.stdout == f"{name}\n":
            return
        assert time.monotonic() < deadline, f"no ssh to {name}: {done.stderr}"
        time.sleep(0.1)
