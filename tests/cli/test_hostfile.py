# SPDX-License-Identifier: Apache-2.0
"""Hostfiles in both formats, and the number of ranks that each host gets."""

import re

import pytest

from distributed_trainer.cli.hostfile import Host, place_ranks, read_hostfile


def read(tmp_path, text):
    path = tmp_path / "hosts.txt"
    path.write_text(text)
    return [(host.name, host.slots) for host in read_hostfile(path)]


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("node1 slots=2\nnode2 slots=3\n", [("node1", 2), ("node2", 3)]),
        ("node1:2\nnode2:3", [("node1", 2), ("node2", 3)]),
        ("# ours\n\nnode1 slots = 2  # the old one\n  node2:1 \n", [("node1", 2), ("node2", 1)]),
        ("node1\nnode2.cluster.org\n", [("node1", None), ("node2.cluster.org", None)]),
        ("10.0.0.1:2\n10.0.0.2:2\n", [("10.0.0.1", 2), ("10.0.0.2", 2)]),
        ("node1:2\nnode2:1\nnode1:1\n", [("node1", 3), ("node2", 1)]),
        ("node1\nnode1\nnode2\n", [("node1", 2), ("node2", 1)]),  # a node file of PBS
    ],
)
def test_forms(tmp_path, text, hosts):
    assert read(tmp_path, text) == hosts


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("node1:2\nnode2 slot=2\n", r"hosts.txt, line 2: `node2 slot=2` is no host. A line is `node1 slots=2`"),
        ("node1:0\n", "line 1: `node1:0` is no host"),
        ("node1:00\n", "line 1: `node1:00` is no host"),
        ("node1:1000000000\n", "is no host"),
        ("-oNode\n", "line 1: `-oNode` is no host"),  # ssh would take it for an option
        ("node1 slots=2 max_slots=4\n", "call its mpirun"),
        ("anna@node1 slots=2\n", "~/.ssh/config"),
        ("# nobody\n", "names no host. Write a line `node1 slots=2` for each"),
        ("node1:2\nnode2\n", "says how many slots node1 has, but not node2. Give all hosts slots, or none"),
    ],
)
def test_what_is_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, text)


def test_what_is_not_there(tmp_path):
    message = f"there is no hostfile hosts.txt in {tmp_path}. Write one with a line for each host: `node1 slots=2`"
    with pytest.raises(FileNotFoundError, match=re.escape(message)):
        read_hostfile(tmp_path / "hosts.txt")


def test_what_is_no_text(tmp_path):
    (tmp_path / "hosts.txt").write_bytes(b"node1\nnode\xff:2\n")
    with pytest.raises(ValueError, match="line 2: `node\N{REPLACEMENT CHARACTER}:2` is no host"):
        read_hostfile(tmp_path / "hosts.txt")


def place(slots, num_ranks, oversubscribe=False):
    hosts = [Host(f"node{number}", count) for number, count in enumerate(slots)]
    placed = place_ranks(hosts, num_ranks, {"node0": 8, "node1": 4, "node2": 2}, oversubscribe)
    counts = {host.name: host.slots for host in placed}
    assert 0 not in counts.values()  # an MPI would fail, or take it for 1
    return [counts.get(host.name, 0) for host in hosts]


@pytest.mark.parametrize(
    ("slots", "num_ranks", "ranks"),
    [
        ((2, 2, 2), None, [2, 2, 2]),
        ((2, 2, 2), 3, [2, 1, 0]),
        ((None, None, None), 6, [2, 2, 2]),
        ((None, None, None), 5, [2, 2, 1]),
        ((None, None, None), 2, [1, 1, 0]),
        ((None, None, None), None, [8, 4, 2]),
    ],
)
def test_placing(slots, num_ranks, ranks):
    assert place(slots, num_ranks) == ranks


def test_more_ranks_than_slots():
    message = r"-np 6 is more than the 4 slots of node0 \(3\), node1 \(1\). Start at most 4, .* --oversubscribe"
    with pytest.raises(ValueError, match=message):
        place((3, 1), 6)
    assert place((3, 1), 6, oversubscribe=True) == [4, 2]
    assert place((3, 1), 7, oversubscribe=True) == [5, 2]
    assert place((3, 1), 4, oversubscribe=True) == [3, 1]
