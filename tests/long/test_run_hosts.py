# SPDX-License-Identifier: Apache-2.0
"""`distributed-trainer run --hostfile` on hosts made of namespaces, and set-ups that are wrong on one of them."""

import json
import re
import sys
import time
from pathlib import Path

import pytest
import torch
from host_shell import SECONDS, Shell
from hosts import Hosts, require
from ranks import is_openmpi
from sshd import sshd

import distributed_trainer
from distributed_trainer.launch.host_facts import num_cores

PACKAGE = Path(distributed_trainer.__file__).parent


@pytest.fixture(scope="module")
def hosts():
    require()
    with Hosts(2) as made:
        yield made


@pytest.fixture
def shell(hosts, tmp_path):
    return Shell(hosts, tmp_path)


@pytest.fixture
def bind(shell):
    """Mount a file or folder in the place of another, on the second host alone."""
    done = []

    def mount(source, target):
        assert shell.on(1, f"mount --bind '{source}' '{target}'").returncode == 0
        done.append(target)

    yield mount
    for target in reversed(done):
        assert shell.on(1, f"umount '{target}'").returncode == 0


def test_ranks_of_both_hosts(shell):
    result = shell.run("-x FLAVOUR=sweet train.py")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("host host0, node 0, sum 3, sweet\n") == 2
    assert result.stdout.count("host host1, node 1, sum 3, sweet\n") == 1


def test_hosts_without_slots(shell):
    """Each host gets the same number of ranks: half of `-np`; without `-np`, one for each core."""
    shell.write_hostfile("{}\n{}\n")
    for options, each in ("-np 2", 1), ("", num_cores()):
        result = shell.run(f"{options} where.py")
        assert result.returncode == 0, result.stderr
        assert sorted(result.stdout.split()) == sorted(shell.hosts.names * each)


def test_more_ranks_than_slots(shell):
    assert "is more than the 3 slots of host0-" in shell.refusal("-np 4 train.py")
    result = shell.run("-np 4 --oversubscribe where.py")
    assert result.returncode == 0, result.stderr
    assert sorted(result.stdout.split()) == [shell.hosts.names[0]] * 3 + [shell.hosts.names[1]]


def test_host_that_does_not_answer(shell):
    """The real ssh gets no answer, from an address without a host and from a host without an ssh server."""
    shell.environment |= {"PRTE_MCA_plm_ssh_agent": "ssh", "HYDRA_LAUNCHER_EXEC": "ssh"}
    shell.write_hostfile("{}:1\n10.77.0.99:1\n{}:1\n")
    text = shell.refusal()
    assert re.search(r"10.77.0.99 does not answer( within 5 s. Is it up\?| \(ssh: connect to host)", text)
    assert re.search(r"host1-\d+ runs no ssh server \(ssh: .* Connection refused\). Install one there", text)


def test_real_ssh_and_what_it_refuses(shell):
    """Real ssh first refuses nothing, then the user's key, then the host's key."""
    require("sshd", "ssh-keygen")
    shell.environment |= {"PRTE_MCA_plm_ssh_agent": "ssh", "HYDRA_LAUNCHER_EXEC": "ssh"}
    name = shell.hosts.names[1]
    with sshd(shell.hosts) as folder:
        result = shell.run("where.py")
        assert result.returncode == 0, result.stderr
        assert sorted(result.stdout.split()) == [*[shell.hosts.names[0]] * 2, name]
        key = (folder / "authorized_keys").read_text()
        (folder / "authorized_keys").write_text("")
        cause = r"refuses this user's key \(.*Permission denied \(publickey[^)]*\)\)"
        denied = rf"{name} {cause}\. Let it in: `ssh-copy-id {name}`"
        assert re.search(denied, shell.refusal())
        (folder / "known_hosts").write_text(f"{name} {key}")
        text = shell.refusal()
        assert f"{name} has a new or changed host key (Host key verification failed)" in text


def test_script_is_missing(shell, bind, tmp_path):
    (tmp_path / "empty").mkdir()
    bind(tmp_path / "empty", tmp_path)
    text = shell.refusal()
    assert re.search(
        rf"host1-\d+ lacks {tmp_path}/train.py. Copy it there, to the same path, or share the folder", text
    )
    assert re.search(r"host1-\d+ lacks module train. Copy it there", shell.refusal("-m train"))


def test_folder_is_missing(shell, bind, tmp_path):
    (tmp_path / "empty").mkdir()
    bind(tmp_path / "empty", tmp_path.parent)
    assert re.search(rf"host1-\d+ lacks {tmp_path}, {tmp_path}/train.py\. ", shell.refusal())


def test_another_torch(shell, bind, tmp_path):
    path = Path(torch.__file__).parent / "version.py"
    (tmp_path / "version.py").write_text(re.sub("__version__ = .*", "__version__ = '2.12.0'", path.read_text()))
    bind(tmp_path / "version.py", path)
    own = re.escape(torch.__version__.partition("+")[0])
    pattern = rf"torch differs: host0-\d+ has {own} \(.*\), host1-\d+ has 2.12.0 .*pip install torch"
    assert re.search(pattern, shell.refusal())


def test_another_package(shell, bind, tmp_path):
    (tmp_path / "errors.py").write_text((PACKAGE / "errors.py").read_text() + "# changed\n")
    bind(tmp_path / "errors.py", PACKAGE / "errors.py")
    [engine] = PACKAGE.glob(f"_engine_{'openmpi' if is_openmpi() else 'mpich'}.*")
    version = re.search(rb"distributed_trainer engine \w+", engine.read_bytes())[0]
    (tmp_path / "engine").write_bytes(engine.read_bytes().replace(version, version[:-12] + b"0" * 12))
    bind(tmp_path / "engine", engine)
    text = shell.refusal()
    assert "\n  distributed_trainer differs: host0-" in text
    assert re.search(r"\n  the engine of distributed_trainer differs: host0-\d+ has [0-9a-f]{12} .* has 0{12} ", text)


def test_another_build_of_the_same_engine(shell, bind, tmp_path):
    [engine] = PACKAGE.glob(f"_engine_{'openmpi' if is_openmpi() else 'mpich'}.*")
    (tmp_path / "engine").write_bytes(engine.read_bytes() + b" ")
    bind(tmp_path / "engine", engine)
    result = shell.run()
    assert result.returncode == 0, result.stderr


def test_another_python(shell, bind, tmp_path):
    """A program at the same path on the second host says that it is Python 3.9."""
    binary = Path(sys.executable).resolve()
    Path(tmp_path / "python").write_bytes(binary.read_bytes())
    fake = tmp_path / "fake"
    code = "import sys; sys.version_info = (3, 9, 0); exec(sys.stdin.read())"
    fake.write_text(f'#!/bin/sh\nPYTHONHOME={sys.base_prefix} exec {tmp_path}/python -c "{code}"\n')
    for path in (fake, tmp_path / "python"):
        path.chmod(0o755)
    bind(fake, binary)
    text = shell.refusal()
    assert re.search(
        rf"Python differs: host0-\d+ has 3\.{sys.version_info[1]} \({sys.executable}\), host1-\d+ has 3.9", text
    )


def test_no_python(shell, bind, tmp_path):
    (tmp_path / "empty").mkdir()
    bind(tmp_path / "empty", sys.prefix)
    assert re.search(rf"host1-\d+ has no {sys.executable}. The same Python environment must lie", shell.refusal())


def test_another_mpi(shell, bind, tmp_path):
    """The second host has another file in the place of the MPI library. Any will do, so the test takes an empty one."""
    library = next(path for path in Path(sys.prefix, "lib").glob("libmpi.so.*") if not path.is_symlink())
    (tmp_path / "nothing").write_bytes(b"")
    bind(tmp_path / "nothing", library.resolve())
    assert re.search(r"host1-\d+ has no /\S+/libmpi\S+ that loads. Install the same MPI there", shell.refusal())


def test_equal_host_names(shell):
    """Two hosts have the same name: refused with Open MPI, which would hang; MPICH trains."""
    try:
        for host in range(2):
            assert shell.on(host, "hostname same").returncode == 0
        if is_openmpi():
            assert "all have the host name same (`uname -n`). Open MPI would take them for one" in shell.refusal()
        else:
            result = shell.run()
            assert result.returncode == 0, result.stderr
            assert result.stdout.count("sum 3") == 3
    finally:
        for host, name in enumerate(shell.hosts.names):
            shell.on(host, f"hostname {name}")


def test_one_host_under_two_names(shell):
    shell.write_hostfile("{0}:1\n10.77.0.10:1\n{1}:1\n")
    assert re.search(r"host0-\d+, 10.77.0.10 are names of one machine. Write one", shell.refusal())


def test_log_files(shell):
    """Each rank's log file is on the rank's host; here both hosts see the same folder."""
    result = shell.run("-x FLAVOUR=sour --log-dir logs train.py")
    assert result.returncode == 0, result.stderr
    for rank, host in enumerate(["host0, node 0", "host0, node 0", "host1, node 1"]):
        assert f"host {host}, sum 3, sour" in (shell.folder / "logs" / f"rank-{rank}.log").read_text()


def check(shell, arguments=""):
    result = shell.on(0, f"cd {shell.folder} && {sys.executable} -m distributed_trainer check --json {arguments}")
    return result, json.loads(result.stdout)


def test_check(shell):
    """The report names both hosts and the link between them, and says that they are one machine here."""
    before = shell.hosts.bytes_sent()
    result, report = check(shell, "--hostfile hosts.txt")
    assert result.returncode == 0, result.stdout + result.stderr
    names = [(host["name"], host["ranks"], host["shares_memory"]) for host in report["hosts"]]
    assert names == [(shell.hosts.names[0], [0, 1], True), (shell.hosts.names[1], [2], True)]
    between = report["all_reduce"]["between"]
    assert between["interfaces"] == ["eth0"]
    assert between["seconds"] > 0
    assert between["wire_seconds"] > 0
    for sent, earlier in zip(shell.hosts.bytes_sent(), before, strict=True):
        assert sent - earlier > 5 * between["bytes"]
    assert any("have separate networks, so they share no memory" in item["text"] for item in report["problems"])


def test_check_of_hosts_that_are_not_ready(shell):
    shell.write_hostfile("{}:1\n10.77.0.99:1\n")
    start = time.monotonic()
    result, report = check(shell, "--hostfile hosts.txt")
    assert time.monotonic() - start < SECONDS
    assert result.returncode == 1
    [problem] = report["problems"]
    assert problem["is_fatal"]
    assert problem["text"].startswith("10.77.0.99 ")


def test_check_on_a_slow_link(shell):
    """The reported rate of the wire is that of the link."""
    shell.hosts.set_rate(0.2)
    try:
        _, report = check(shell, "--hostfile hosts.txt")
    finally:
        shell.hosts.set_rate(None)
    assert 0.6 * 25e6 < report["all_reduce"]["between"]["wire_bytes_per_second"] < 1.1 * 25e6
