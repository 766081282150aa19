# SPDX-License-Identifier: Apache-2.0
"""Bare Debian machines in folders, to test installations that can use nothing of this machine.

A machine is a stack of layers, mounted over each other; a layer is a folder with the changes of one set-up.
The mounts live in the mount namespace of one command, so none is left behind, whatever happens to the test.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

# $1: the layers below, top first. $2: the folder of the layer that changes. $3: folders to share. Then the
# variables and the command.
ENTER = """
rm -rf $2/work
mkdir -p $2/work $2/upper $2/root
mount -t overlay overlay -o volatile,lowerdir=$1,upperdir=$2/upper,workdir=$2/work $2/root  # volatile: no fsync
mount -t proc proc $2/root/proc
mount --rbind -o ro /sys $2/root/sys
mount --rbind /dev $2/root/dev
mount -t tmpfs tmpfs $2/root/dev/shm
for folder in $3; do mkdir -p $2/root$folder; mount --bind -o ro $folder $2/root$folder; done
cp /etc/resolv.conf $2/root/etc/resolv.conf
cd $2/root
shift 3
exec chroot . /usr/bin/env -i "$@"
"""


class Machine:
    """Machine with its own layer over the layers of other machines, which it does not change."""

    def __init__(self, folder: Path, *below: Machine) -> None:
        self.folder = folder
        self.below = below

    @property
    def layer(self) -> Path:
        """Folder with the changes of this machine."""
        return self.folder / "upper"

    def run(self, command: str, timeout_seconds: float = 600, **variables: str) -> str:
        """Run a shell command on the machine; return its output, errors included."""
        settings, folders = _pip_settings()
        variables = {
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": "/root",
            "LC_ALL": "C.UTF-8",
            "DEBIAN_FRONTEND": "noninteractive",
            **{name: value for name, value in os.environ.items() if name.lower().endswith("_proxy")},
            **settings,
            **variables,
        }
        lower = ":".join(str(machine.layer) for machine in self.below)
        namespaces = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--propagation", "private"]
        enter = ["sh", "-euc", ENTER, "sh", lower, str(self.folder), " ".join(folders)]
        print(f"$ {command}", flush=True)
        result = subprocess.run(
            [*namespaces, *enter, *map("=".join, variables.items()), "/bin/bash", "-euc", command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_seconds,
        )
        print(result.stdout, flush=True)
        assert result.returncode == 0, f"{command!r} ended with {result.returncode}"
        return result.stdout

    def install(self, *packages: str) -> None:
        """Install Debian packages, without the packages that they recommend."""
        self.run(f"apt-get update -q; apt-get install -y -q --no-install-recommends {' '.join(packages)}")

    def copy(self, source: Path, target: str) -> None:
        """Copy a file from the machine that runs the tests to path `target` of this one."""
        destination = self.layer / target.lstrip("/")
        destination.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, destination)


def install_debian(folder: Path, *packages: str) -> Machine:
    """Install the Debian release of the machine that runs the tests: its smallest variant, and `packages`."""
    machine = Machine(folder)
    release = Path("/etc/os-release").read_text()
    codename = re.search(r"^VERSION_CODENAME=(\w+)", release, re.MULTILINE)[1]
    targets = ["apt-get", "indextargets", "--format=$(SITE)", "Created-By: Packages", f"Codename: {codename}"]
    mirror = subprocess.run(targets, capture_output=True, text=True, check=True).stdout.split()[0]
    options = ["--variant=minbase", f"--include={','.join(packages)}"]
    command = ["debootstrap", *options, codename, str(machine.layer), mirror]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return machine


def _pip_settings() -> tuple[dict[str, str], list[str]]:
    """Return pip's settings on the machine that runs the tests, as variables, and the folders that they name."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    settings = dict(re.findall(r"^[^.]*\.([\w-]+)='(.*)'$", listing, re.MULTILINE))
    paths = [Path(word.removeprefix("file://")) for value in settings.values() for word in value.split()]
    # The parent folders, since the packages of a local index lie beside its pages.
    folders = {str(path.parent) for path in paths if path.is_absolute() and path.exists()}
    variables = {f"PIP_{name.replace('-', '_').upper()}": value for name, value in settings.items()}
    return variables, sorted(folders)
