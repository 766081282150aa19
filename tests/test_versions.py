# SPDX-License-Identifier: Apache-2.0
"""Versions that ranks tell each other of at the start; tests/test_wrong_setups_long.py has them differ for real."""

import json
import types

import pytest
import torch

from distributed_trainer import MismatchError, versions

MODULE = types.SimpleNamespace(engine_version="0123456789ab", library_version=lambda: "Open MPI v5.0.11, package: x")


def of_host(name, **other):
    facts = json.loads(versions.introduce(MODULE)) | {"host": name} | other
    return json.dumps(facts)


def test_alike():
    versions.check_alike([of_host("one"), of_host("one"), of_host("two")])


def test_what_is_told():
    facts = json.loads(versions.introduce(MODULE))
    assert facts["MPI"] == "Open MPI v5.0.11"
    assert torch.__version__.startswith(facts["torch"])
    assert "+" not in facts["torch"]  # +cpu and +cu130 are one version
    assert len(versions.introduce(MODULE)) <= 1024  # introduction_bytes of the engine


def test_long_names_fit():
    module = types.SimpleNamespace(engine_version="0123456789ab", library_version=lambda: "M" * 5000)
    assert len(versions.introduce(module)) <= 1024


@pytest.mark.parametrize("text", ["", "{", "[1]", "[" * 100_000, '{"torch": "2"'])
def test_what_is_no_introduction(text):
    with pytest.raises(MismatchError, match=r"rank 1 says of itself .* does not understand"):
        versions.check_alike([of_host("one"), text])


def test_introduction_without_a_host():
    with pytest.raises(MismatchError, match=r"torch: .*9 on an unknown host"):
        versions.check_alike([of_host("one"), '{"torch": 9}'])


@pytest.mark.parametrize("name", ["distributed_trainer", "its engine", "MPI", "Python", "torch"])
def test_each_difference(name):
    own = json.loads(of_host("one"))[name]
    introductions = [of_host("one"), of_host("two"), of_host("two", **{name: "9.9"}), of_host("three", **{name: "9.9"})]
    with pytest.raises(MismatchError) as error:
        versions.check_alike(introductions)
    lines = str(error.value).splitlines()
    assert f"  {name}: {own} on one, two; 9.9 on two, three" in lines
    assert len(lines) == 3  # nothing of what is alike
    assert "Install the same on all" in lines[-1]


def test_many_hosts():
    introductions = [of_host("first"), *(of_host(f"host{number}", torch="9.9") for number in range(20))]
    with pytest.raises(MismatchError, match=r"9\.9 on host0, host1, host2 and 17 more"):
        versions.check_alike(introductions)


def test_version_that_tells_less_or_more():
    """Of another release: it is named, not stumbled over."""
    with pytest.raises(MismatchError, match=r"torch: .* on one; unknown on two\n  cudnn: unknown on one; 9 on two"):
        facts = json.loads(of_host("two", cudnn="9"))
        del facts["torch"]
        versions.check_alike([of_host("one"), json.dumps(facts)])
