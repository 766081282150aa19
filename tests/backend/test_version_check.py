# SPDX-License-Identifier: Apache-2.0
"""Versions that ranks compare at the start; in tests/long/test_wrong_setups.py the installations really differ."""

import json
import types

import pytest
import torch

from distributed_trainer import MismatchError
from distributed_trainer.backend import version_check
from distributed_trainer.launch import host_facts

MODULE = types.SimpleNamespace(engine_version="0123456789ab", library_version=lambda: "Open MPI v5.0.11, package: x")


def of_host(name, **other):
    facts = json.loads(version_check.describe(MODULE)) | {"host": name} | other
    return json.dumps(facts)


def test_alike():
    version_check.check_alike([of_host("one"), of_host("one"), of_host("two")])


def test_what_is_told():
    facts = json.loads(version_check.describe(MODULE))
    assert facts["MPI"] == "Open MPI v5.0.11"
    assert torch.__version__.startswith(facts["torch"])
    assert "+" not in facts["torch"]  # +cpu and +cu130 count as one version
    assert len(version_check.describe(MODULE)) <= 1024  # the engine's version_text_bytes


def test_long_names_fit():
    module = types.SimpleNamespace(engine_version="0123456789ab", library_version=lambda: "M" * 5000)
    assert len(version_check.describe(module)) <= 1024


@pytest.mark.parametrize("text", ["", "{", "[1]", "[" * 100_000, '{"torch": "2"'])
def test_what_is_no_introduction(text):
    with pytest.raises(MismatchError, match=r"rank 1 describes itself as .* does not understand"):
        version_check.check_alike([of_host("one"), text])


def test_introduction_without_a_host():
    with pytest.raises(MismatchError, match=r"torch: .*9 on an unknown host"):
        version_check.check_alike([of_host("one"), '{"torch": 9}'])


@pytest.mark.parametrize("name", ["distributed_trainer", "its engine", "MPI", "Python", "torch"])
def test_each_difference(name):
    own = json.loads(of_host("one"))[name]
    descriptions = [of_host("one"), of_host("two"), of_host("two", **{name: "9.9"}), of_host("three", **{name: "9.9"})]
    with pytest.raises(MismatchError) as error:
        version_check.check_alike(descriptions)
    lines = str(error.value).splitlines()
    assert f"  {name}: {own} on one, two; 9.9 on two, three" in lines
    assert len(lines) == 3  # facts that are equal are not listed
    assert "Install the same on all" in lines[-1]


def test_many_hosts():
    descriptions = [of_host("first"), *(of_host(f"host{number}", torch="9.9") for number in range(20))]
    with pytest.raises(MismatchError, match=r"9\.9 on host0, host1, host2 and 17 more"):
        version_check.check_alike(descriptions)


def test_version_that_tells_less_or_more():
    """A description by another release, with fewer or more facts, is reported as a difference."""
    with pytest.raises(MismatchError, match=r"torch: .* on one; unknown on two\n  cudnn: unknown on one; 9 on two"):
        facts = json.loads(of_host("two", cudnn="9"))
        del facts["torch"]
        version_check.check_alike([of_host("one"), json.dumps(facts)])


@pytest.mark.parametrize("changed", ["__init__.py", "data/batch.py", "a/b/c.py"])
def test_fingerprint_covers_sub_packages(tmp_path, changed):
    before = []
    for text in ("x = 1\n", "x = 2\n"):
        for name in ("__init__.py", "data/batch.py", "a/b/c.py"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text if name == changed else "")
        before.append(host_facts.package_version(tmp_path))
    assert before[0] != before[1]
