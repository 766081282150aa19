# SPDX-License-Identifier: Apache-2.0
"""Hosts made of Linux namespaces on one machine, behind a switch whose links have a rate, to run real MPI between them.

Each host has its own network, UTS, mount and IPC namespaces, and its own /dev/shm and /run. So its ranks share
files, but no memory, with the ranks of other hosts. A process that reads a pipe of this process holds the
namespaces: when this process ends, however it ends, the namespaces and links end too. None of them has a name outside.
mpirun runs in the first host and reaches the others through a script that enters their namespaces, in the place of ssh;
sshd.py has real ssh, slurm.py a real Slurm.

Needs root, and `ip` and `tc` of iproute2.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import pytest
from ranks import is_openmpi, mpirun_path

from distributed_trainer.launch.mpirun import mpirun_environment

_NETWORK = "10.77.0"


def why_not(*programs: str) -> str | None:
    """Return what this machine lacks for pretended hosts, and for daemons on them; None if it lacks nothing."""
    missing = [tool for tool in ("ip", "tc", "nsenter", "unshare", *programs) if _tool(tool) is None]
    if missing:
        return f"no {', '.join(missing)}: install what .ci/run installs"
    if os.geteuid() != 0:
        return "not root, so network namespaces can't be made: run it as root"
    made = subprocess.run([_tool("unshare"), "--net", "--uts", "--mount", "--ipc", "true"], capture_output=True)
    return None if made.returncode == 0 else f"namespaces can't be made here: {made.stderr.decode().strip()}"


def require(*programs: str) -> None:
    """Skip a test if this machine can't make hosts or run the daemons on them. In CI, fail instead."""
    if reason := why_not(*programs):
        assert "CI" not in os.environ, reason  # a skipped test would not be noticed there
        pytest.skip(reason)


class Hosts:
    """Context manager that makes hosts, and at its end removes them with every process in them.

    Args:
        num_hosts: Number of hosts, at most 200.
    """

    def __init__(self, num_hosts: int = 2) -> None:
        self.names = [f"host{number}-{os.getpid()}" for number in range(num_hosts)]
        self._holders: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Hosts:
        self.folder = Path(tempfile.mkdtemp(prefix="hosts-"))
        try:
            self._make()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        self._remove()

    def set_rate(self, gbit_per_second: float | None) -> None:
        """Limit each host's rate of sending, and of receiving, by a token bucket; None removes the limit."""
        for number in range(len(self.names)):
            for holder, link in [(number, "eth0"), (-1, f"port{number}")]:
                has_limit = b"tbf" in self._run(holder, "tc", "qdisc", "show", "dev", link)
                if gbit_per_second is not None:
                    # Bytes of half a millisecond: with fewer, a busy machine that serves the bucket late stays below
                    # the rate.
                    burst = max(256 << 10, round(gbit_per_second * 1e9 / 8 / 2000))
                    limit = ["rate", f"{round(gbit_per_second * 1000)}mbit", "burst", str(burst), "latency", "50ms"]
                    self._run(holder, "tc", "qdisc", "replace", "dev", link, "root", "tbf", *limit)
                elif has_limit:
                    self._run(holder, "tc", "qdisc", "del", "dev", link, "root")

    def cut(self, number: int) -> None:
        """Cut a host's link at the switch, as if its cable were pulled there."""
        self._run(-1, "ip", "link", "set", f"port{number}", "down")

    def bytes_sent(self) -> list[int]:
        """Return the number of bytes that each host has sent over its link, headers included."""
        shown = [
            self._run(number, "ip", "-json", "-s", "link", "show", "dev", "eth0") for number in range(len(self.names))
        ]
        return [json.loads(text)[0]["stats64"]["tx"]["bytes"] for text in shown]

    def address(self, number: int) -> str:
        """Return the IP address of a host."""
        return f"{_NETWORK}.{10 + number}"

    def inside(self, number: int, command: Sequence[str]) -> list[str]:
        """Return the command that runs `command` in a host, in this process's folder."""
        return [*self._enter(number, mounts=True), "env", "-C", os.getcwd(), *command]

    def shell(self, number: int, script: str) -> None:
        """Run a shell script in a host, such as one that mounts something."""
        done = subprocess.run(self.inside(number, ["sh", "-euc", script]), capture_output=True, text=True)
        assert done.returncode == 0, f"{script}: {done.stderr}"

    def mpirun(
        self,
        ranks_of_host: Sequence[int],
        command: Sequence[str],
        options: Sequence[str] = (),
        capture: bool = False,
        by_ssh: bool = False,
        hostfile: bool = True,
        **environment: str,
    ) -> subprocess.Popen[bytes]:
        """Start `command` with a number of ranks on each host, by the mpirun of this Python environment.

        The caller waits for the process, or leaves it to the end of the context.

        Args:
            ranks_of_host: Number of ranks on each host; 0 leaves a host out.
            command: Command that each rank runs.
            options: More options of mpirun.
            capture: Whether mpirun's output, errors included, goes to a pipe.
            by_ssh: Whether mpirun reaches the hosts by real ssh (sshd.py), not by the script that stands for it.
            hostfile: Whether a hostfile names the hosts; otherwise mpirun has to learn them from `environment`.
            environment: Variables for the ranks, besides those of this process.
        """
        ranks = sum(ranks_of_host)
        words = [mpirun_path()]
        if is_openmpi():
            passed = [*environment, *(["PYTHONPATH"] if "PYTHONPATH" in os.environ else [])]  # MPICH passes all
            words += ["--bind-to", "none", "--map-by", "slot", "--wdir", os.getcwd()]
            words += [word for name in passed for word in ("-x", name)]
        if not by_ssh:
            agent = str(self.folder / "agent")
            words += ["--prtemca", "plm_ssh_agent", agent] if is_openmpi() else ["-launcher-exec", agent]
        if hostfile:
            words += ["--hostfile" if is_openmpi() else "-f", str(self._write_hostfile(ranks_of_host))]
        return subprocess.Popen(
            self.inside(0, [*words, *options, "-np", str(ranks), *command]),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if capture else None,
            stderr=subprocess.STDOUT if capture else None,
            env={**os.environ, **mpirun_environment(ranks), **environment},
            start_new_session=True,
        )

    def _write_hostfile(self, ranks_of_host: Sequence[int]) -> Path:
        line = "{} slots={}\n" if is_openmpi() else "{}:{}\n"
        slots = zip(self.names, ranks_of_host, strict=True)
        file = self.folder / "hostfile"
        file.write_text("".join(line.format(name, count) for name, count in slots if count))
        return file

    def _make(self) -> None:
        self.folder.chmod(0o755)
        (self.folder / "hosts").write_text(
            "127.0.0.1 localhost\n" + "".join(f"{self.address(n)} {name}\n" for n, name in enumerate(self.names))
        )
        for name in self.names:
            script = (
                f"hostname {name} && mount -t tmpfs tmpfs /dev/shm && mount -t tmpfs -o mode=755 tmpfs /run && "
                f"mount --bind {self.folder}/hosts /etc/hosts"
            )
            self._hold(["--net", "--uts", "--mount", "--ipc"], script)
            (self.folder / f"{name}.pid").write_text(str(self._holders[-1].pid))
        self._hold(["--net"], "true")  # the switch, last
        self._run(-1, "ip", "link", "add", "bridge", "type", "bridge")
        self._run(-1, "ip", "link", "set", "bridge", "up")
        for number in range(len(self.names)):
            port, host = f"port{number}", str(self._holders[number].pid)
            self._run(-1, "ip", "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", host)
            self._run(-1, "ip", "link", "set", port, "master", "bridge", "up")
            self._run(number, "ip", "addr", "add", f"{self.address(number)}/24", "dev", "eth0", "noprefixroute")
            self._run(number, "ip", "link", "set", "eth0", "up")
            self._run(number, "ip", "link", "set", "lo", "up")
            # cubic is Linux's default; this machine may have another, which would change measured times.
            self._run(number, "ip", "route", "add", f"{_NETWORK}.0/24", "dev", "eth0", "congctl", "cubic")
        agent = self.folder / "agent"
        # Like ssh, the script passes no variables on.
        agent.write_text(
            '#!/bin/sh\nwhile [ "${1#-}" != "$1" ]; do shift; done  # options of ssh\nhost=$1; shift\n'
            f"exec nsenter -t $(cat {self.folder}/$host.pid) -n -u -m -i -- "
            'env -i HOME="$HOME" PATH=/usr/local/bin:/usr/bin:/bin /bin/sh -c "$*"\n'
        )
        agent.chmod(0o700)

    def _hold(self, namespaces: list[str], script: str) -> None:
        holder = subprocess.Popen(
            [_tool("unshare"), *namespaces, "sh", "-c", f"{script} && echo ready && exec cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._holders.append(holder)
        if holder.stdout.readline() != b"ready\n":
            raise RuntimeError(f"a host's namespaces could not be set up: {script}")

    def _run(self, holder: int, *command: str) -> bytes:
        command = (_tool(command[0]) or command[0], *command[1:])
        done = subprocess.run([*self._enter(holder), *command], capture_output=True)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.decode().strip()}")
        return done.stdout

    def _enter(self, holder: int, mounts: bool = False) -> list[str]:
        namespaces = ["-n", "-u", "-m", "-i"] if mounts else ["-n"]
        return [_tool("nsenter"), "-t", str(self._holders[holder].pid), *namespaces, "--"]

    def _remove(self) -> None:
        # A second Ctrl-C waits until everything is removed.
        previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        networks = set()
        for holder in self._holders:
            with contextlib.suppress(OSError):
                networks.add(os.readlink(f"/proc/{holder.pid}/ns/net"))
        networks.discard(os.readlink("/proc/self/ns/net"))
        for sign in (signal.SIGTERM, signal.SIGKILL):
            for process in Path("/proc").glob("[0-9]*"):
                with contextlib.suppress(OSError):
                    if os.readlink(process / "ns/net") in networks:
                        os.kill(int(process.name), sign)
            time.sleep(0.2)
        for holder in self._holders:
            holder.stdin.close()
            holder.stdout.close()
            holder.wait()
        self._holders.clear()
        shutil.rmtree(self.folder)
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def _tool(name: str) -> str | None:
    return shutil.which(name, path=os.pathsep.join([*os.get_exec_path(), "/usr/sbin", "/sbin"]))
