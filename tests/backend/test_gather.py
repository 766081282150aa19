# SPDX-License-Identifier: Apache-2.0
"""The exchange of small values, and of one rank's error, which is then raised on all ranks."""

import json
import os

import pytest
from ranks import on_ranks

from distributed_trainer.backend.gather import call_on_rank_0, call_together, gather_json, raise_together
from distributed_trainer.errors import CheckpointError, DistributedTrainerError, MismatchError

several = on_ranks(2, 3)


@on_ranks(1, 3)
def test_no_error(world):
    group = world.group()
    assert call_together(group, lambda: world.rank + 1) == world.rank + 1
    called = []
    call_on_rank_0(group, lambda: called.append(1))
    assert len(called) == (world.rank == 0)
    raise_together(group, None)
    assert gather_json(group, [world.rank, "ä" * world.rank]) == [[rank, "ä" * rank] for rank in range(world.size)]


@several
@pytest.mark.parametrize(
    ("error", "otherwise", "expected"),
    [
        (ValueError("bad"), CheckpointError, ValueError("bad")),
        (UnicodeDecodeError("ascii", b"\xff", 0, 1, "why"), CheckpointError, ValueError("'ascii' codec can't")),
        (CheckpointError("gone"), CheckpointError, CheckpointError("gone")),
        (MismatchError("differs"), DistributedTrainerError, MismatchError("differs")),
        (MismatchError("differs"), CheckpointError, CheckpointError("MismatchError: differs")),
        (FileNotFoundError(2, "none", "a"), CheckpointError, CheckpointError("FileNotFoundError: [Errno 2] none: 'a'")),
        (KeyError("k"), DistributedTrainerError, DistributedTrainerError("KeyError: 'k'")),
    ],
    ids=lambda value: repr(value) if isinstance(value, Exception) else value.__name__,
)
def test_error_of_one_rank(world, error, otherwise, expected):
    def call():
        if world.rank == world.size - 1:
            raise error

    with pytest.raises(type(expected)) as caught:
        call_together(world.group(), call, otherwise)
    assert type(caught.value) is type(expected)
    assert str(caught.value).startswith(str(expected))
    # The rank that raised the error keeps its traceback.
    assert (error in (caught.value, caught.value.__cause__)) == (world.rank == world.size - 1)


@several
def test_lowest_rank_speaks(world):
    own = None if world.rank == 0 else CheckpointError(f"rank {world.rank}")
    with pytest.raises(CheckpointError, match=r"^rank 1$"):
        raise_together(world.group(), own, CheckpointError)


@several
def test_operating_systems_errors_stay_what_they_are(world, tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        call_on_rank_0(world.group(), lambda: (tmp_path / "none").read_text(), keep=(OSError,))
    assert os.path.basename(caught.value.filename) == "none"
    assert caught.value.errno == 2
    with pytest.raises(OSError, match=r"^as it is$") as caught:
        raise_together(world.group(), OSError("as it is"), keep=(OSError,))
    assert caught.value.errno is None


@several
def test_json_error_is_a_value_error(world):
    with pytest.raises(ValueError, match="Expecting value"):
        call_together(world.group(), lambda: json.loads(""))
