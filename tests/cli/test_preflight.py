# SPDX-License-Identifier: Apache-2.0
"""The questions to hosts before mpirun, through a script instead of ssh, and the problems found in their answers.

test_run_hosts.py tests real hosts.
"""

import contextlib
import json
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from distributed_trainer import LaunchError
from distributed_trainer.backend import version_check
from distributed_trainer.cli import preflight
from distributed_trainer.launch.host_facts import host_facts
from distributed_trainer.launch.mpi_library import load_engine, loaded_mpi

# Script that replaces ssh: it takes options and a host, and does what the host's name says.
AGENT = """#!/bin/sh
while [ "${1#-}" != "$1" ]; do shift; done
case $1 in
  good) shift; echo "Welcome to $USER@good!"; exec "$@" ;;
  kept) shift; sleep 60 & echo $! >"$0.pid"; exec "$@" ;;
  silent) sleep 60 ;;
  barred) echo "root@barred: Permission denied (publickey)." >&2; exit 255 ;;
  unknown) echo "ssh: Could not resolve hostname unknown: Name or service not known" >&2; exit 255 ;;
  odd) echo "something else" >&2; exit 1 ;;
  mute) exit 1 ;;
esac
"""


@pytest.fixture
def agent(tmp_path):
    path = tmp_path / "agent"
    path.write_text(AGENT)
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def wanted(tmp_path):
    load_engine()
    mpi = loaded_mpi()
    return preflight.Request(sys.executable, mpi.path, mpi.family, str(tmp_path), [], None, {})


def test_facts(agent, wanted, tmp_path):
    """A host reports the facts that this process finds about itself, despite the lines of a login script."""
    (tmp_path / "my module.py").touch()
    missing = [str(tmp_path), f"{tmp_path}/no such file"]
    asked = replace(wanted, files=missing, module="nosuchmodule.x", environment={"CUDA_VISIBLE_DEVICES": "it's $1"})
    expected = host_facts(wanted.mpi_path, wanted.mpi_family, missing, "nosuchmodule.x")
    expected.pop("free_shared_memory")  # other processes change it
    for name in ("good", "localhost"):
        [(host, facts)] = preflight.ask_hosts([name], [agent, "-x"], asked).items()
        assert facts.pop("free_shared_memory") > 0
        assert (host, facts) == (name, expected)
    assert expected["missing"] == [f"{tmp_path}/no such file", "module nosuchmodule.x"]
    assert json.loads(json.dumps(expected)) == expected
    for key in ("torch", "mpi"):
        assert expected[key], key


def test_it_compares_what_ranks_compare_at_their_start():
    """The check refuses exactly what ranks would refuse at their start; two builds of one source are accepted."""
    engine = load_engine()
    mpi = loaded_mpi()
    facts = host_facts(mpi.path, mpi.family, [], None)
    told = json.loads(version_check.describe(engine))
    assert facts["engine"] == told["its engine"]
    assert facts["package"] == told["distributed_trainer"]
    assert facts["mpi"] == told["MPI"]
    assert facts["python"] == told["Python"]
    assert facts["torch"].partition("+")[0] == told["torch"]


def test_environment_and_folder_of_the_ranks(agent, wanted, tmp_path):
    (tmp_path / "here.py").touch()
    [facts] = preflight.ask_hosts(["good"], [agent], replace(wanted, module="here")).values()
    assert facts["missing"] == []
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").touch()
    (tmp_path / "torch" / "version.py").write_text('__version__ = "it\'s 1"')
    environment = {"PYTHONPATH": str(tmp_path)}
    [facts] = preflight.ask_hosts(["good"], [agent], replace(wanted, environment=environment)).values()
    assert facts["torch"] == "it's 1"


@pytest.mark.slow
def test_hosts_that_do_not_answer(agent, wanted, monkeypatch):
    """Several hosts that do not answer take the time of one, and none of their processes is left."""
    monkeypatch.setattr(preflight, "LIMIT_SECONDS", 2.0)
    names = ["silent", "barred", "unknown", "odd", "mute", "good"]
    start = time.monotonic()
    answers = preflight.ask_hosts(names, [agent], wanted)
    assert time.monotonic() - start < 4
    assert list(answers) == names
    assert answers["silent"].startswith("does not answer within ")
    assert answers["silent"].endswith(f"See `{agent} silent true`")
    denied = "refuses this user's key (root@barred: Permission denied (publickey)). Let it in: `ssh-copy-id barred`"
    assert answers["barred"] == denied
    assert answers["unknown"].startswith("has an unknown name (ssh: Could not resolve")
    assert answers["odd"] == f"could not be asked (something else). See `{agent} odd true`"
    assert answers["mute"] == f"could not be asked (exit code 1). See `{agent} mute true`"
    assert isinstance(answers["good"], dict)
    while any(agent.encode() in words for words in commands()):
        assert time.monotonic() - start < 6
        time.sleep(0.05)


def commands():
    """Return the command lines of all processes."""
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            yield file.read_bytes()


def test_connection_that_is_kept_open(agent, wanted):
    """A connection that is kept open, as by ssh's ControlPersist, does not block: its process keeps our descriptors."""
    start = time.monotonic()
    [facts] = preflight.ask_hosts(["kept"], [agent], wanted).values()
    assert time.monotonic() - start < 4
    assert isinstance(facts, dict)
    with open(f"{agent}.pid") as file:
        os.kill(int(file.read()), signal.SIGKILL)


def test_no_python_and_no_ssh(agent, wanted):
    [answer] = preflight.ask_hosts(["good"], [agent], replace(wanted, python="/no/python")).values()
    assert answer.startswith("has no /no/python. The same Python environment must lie at the same path on every host")
    [answer] = preflight.ask_hosts(["good"], ["/no/ssh"], wanted).values()
    assert answer.startswith("could not be asked ([Errno 2] No such file or directory: '/no/ssh'). Install ssh")


@pytest.mark.parametrize("facts", ["{", "[]", "{}", "[" * 100_000, json.dumps({"missing": 3})])
def test_damaged_answer(wanted, facts):
    answer = preflight.read_answer(f"Welcome\n{preflight.MARK}{facts}\n".encode(), wanted)
    assert answer.startswith("gave a damaged answer (")
    assert len(answer) < 200
    assert preflight.find_problems({"node1": answer}, wanted) == [f"node1 {answer}"]


def test_this_machine():
    assert preflight.is_this_machine("localhost")
    assert preflight.is_this_machine(os.uname().nodename)
    assert preflight.is_this_machine("127.0.0.1")
    assert not preflight.is_this_machine("192.0.2.1")  # an address reserved for documentation
    assert not preflight.is_this_machine("no-such-host.invalid")


BATCH = ["-o", "BatchMode=yes", "-o", "ConnectTimeout=4"]


@pytest.mark.parametrize(
    ("family", "environ", "command"),
    [
        ("openmpi", {}, ["ssh", *BATCH]),
        ("openmpi", {"PRTE_MCA_plm_ssh_args": "-i 'my key'"}, ["ssh", "-i", "my key", *BATCH]),
        ("openmpi", {"PRTE_MCA_plm_ssh_agent": "/opt/agent -x"}, ["/opt/agent", "-x"]),
        ("openmpi", {"PRTE_MCA_plm_ssh_agent": "nosuchprogram : sh -x"}, ["sh", "-x"]),
        ("openmpi", {"OMPI_MCA_plm_rsh_agent": "/opt/agent"}, ["/opt/agent"]),
        ("openmpi", {"HYDRA_LAUNCHER_EXEC": "/opt/agent"}, ["ssh", *BATCH]),
        ("mpich", {}, ["ssh", *BATCH]),
        (
            "mpich",
            {"HYDRA_LAUNCHER_EXEC": "/opt/ssh", "HYDRA_LAUNCHER_EXTRA_ARGS": "-p 7"},
            ["/opt/ssh", "-p", "7", *BATCH],
        ),
    ],
)
def test_the_mpis_own_way(family, environ, command):
    assert preflight.remote_shell(family, environ) == command


GOOD = {
    "missing": [],
    "python": "3.11",
    "torch": "2.13.0",
    "package": "0.1.0+x (sources aaa)",
    "engine": "bbb",
    "mpi": "Open MPI v5.0.11",
    "has_home": True,
    "paths": {"python": "/venv/bin/python", "torch": "/venv/torch", "package": "/venv/dt", "mpi": "/venv/libmpi.so.40"},
}


def problems(request, *changes, names=None):
    answers = {
        f"node{number}": GOOD | {"name": f"node{number}", "machine": [str(number)]} | change
        for number, change in enumerate(changes)
    }
    return preflight.find_problems(answers, replace(request, python="/venv/bin/python"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"missing": ["/x/train.py"]},
            "node1 lacks /x/train.py. Copy it there, to the same path, or share the folder.",
        ),
        (
            {"torch": None},
            "node1 has no torch for /venv/bin/python. Install it there: `/venv/bin/python -m pip install",
        ),
        ({"package": None, "engine": None}, "node1 has no distributed_trainer for /venv/bin/python."),
        ({"mpi": None}, "that loads. Install the same MPI there."),
        (
            {"torch": "2.12.0"},
            "torch differs: node0, node2 have 2.13.0 (/venv/torch), node1 has 2.12.0 (/venv/torch). Install one "
            "version on all, such as `/venv/bin/python -m pip install torch==2.13.0`.",
        ),
        ({"python": "3.12"}, "Python differs: node0, node2 have 3.11 (/venv/bin/python), node1 has 3.12"),
        (
            {"package": "0.1.0+x (sources ccc)"},
            "distributed_trainer differs: node0, node2 have 0.1.0+x (sources aaa) (/venv/dt), node1 has 0.1.0+x (sou",
        ),
        ({"engine": "ccc"}, "the engine of distributed_trainer differs: "),
        ({"mpi": "MPICH Version: 5.0.2"}, "the MPI library differs: node0, node2 have Open MPI v5.0.11"),
        ({"machine": ["0"]}, "node0, node1 are names of one machine. Write one of them, with the sum of the slots."),
    ],
)
def test_one_problem(wanted, change, message):
    assert problems(wanted, {}, {}, {}) == []
    [problem] = problems(wanted, {}, change, {})
    assert message in problem


def test_no_home(wanted):
    """A host without HOME is a problem only for Open MPI, and not on this machine, where `run` sets it."""
    openmpi, mpich = (replace(wanted, mpi_family=family) for family in ("openmpi", "mpich"))
    [problem] = problems(openmpi, {}, {"has_home": False})
    assert problem.startswith("node1 has no HOME, without which Open MPI's daemon crashes. ")
    assert problems(mpich, {}, {"has_home": False}) == []
    local = GOOD | {"name": "here", "machine": ["here"], "has_home": False}
    assert preflight.find_problems({"localhost": local}, openmpi) == []


def test_equal_names(wanted):
    """Equal host names are a problem only for Open MPI."""
    changes = [{"name": "box"}, {"name": "box"}]
    [problem] = problems(replace(wanted, mpi_family="openmpi"), *changes)
    assert problem.startswith("node0, node1 all have the host name box (`uname -n`). Open MPI would take them for one")
    assert "`hostnamectl set-hostname NAME`" in problem
    assert problems(replace(wanted, mpi_family="mpich"), *changes) == []


def test_one_screen(wanted, monkeypatch):
    """The error fits on one screen with any number of hosts."""
    names = [f"node{number}" for number in range(500)]
    monkeypatch.setattr(preflight, "ask_hosts", lambda names, *_: {name: "does not answer" for name in names})
    with pytest.raises(LaunchError) as caught:
        preflight.check_hosts("hosts.txt", names, wanted)
    lines = str(caught.value).splitlines()
    assert lines[0] == "the hosts of hosts.txt are not ready, so mpirun was not started:"
    assert (lines[1], lines[-1]) == ("  node0 does not answer", "  ... and 488 more")
    assert len(lines) < 20
    assert len(problems(wanted, {}, *[{"torch": "1"}] * 400)[0]) < 300
