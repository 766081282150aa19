# SPDX-License-Identifier: Apache-2.0
"""A trainer's options: wrong ones are refused, and ranks that pass different ones get an error."""

import dataclasses
import gc
import inspect
import re
import types
import typing

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from torch import nn

from distributed_trainer import MismatchError, PowerSGD, create_distributed_trainer
from distributed_trainer.options import TrainerOptions


def linear():
    torch.manual_seed(0)
    return nn.Linear(3, 2)


@pytest.mark.parametrize(
    ("option", "values", "known"),
    [
        ("compression", ["int8", "PowerSGD"], '"bfloat16", "float16", PowerSGD(rank=4) or None'),
        ("compression", [4, True, torch.bfloat16, PowerSGD], '"bfloat16", "float16", PowerSGD(rank=4) or None'),
        ("shard", ["optimiser", True], '"optimizer" or None'),
        ("precision", ["half", torch.float16, 16, True], '"bfloat16", "float16" or None'),
        ("nonfinite_gradients", ["warn", "Skip", None, True, ["skip"]], '"ignore", "skip" or "raise"'),
        ("split_batches", ["no", 1, None], "True or False"),
        ("sync_batchnorm", [0], "True or False"),
        ("balance_speed", ["speed"], "True or False"),
        ("reproducible", [0, -1, 1.5, "8", True], "a number of shards or None"),
    ],
)
def test_unknown_values(option, values, known):
    """The error for an unknown value lists the known ones, and is raised before any communication: without ranks."""
    for value in values:
        with pytest.raises((TypeError, ValueError)) as error:
            create_distributed_trainer(linear(), **{option: value})
        assert str(error.value) == f"{option} must be {known}, not {value!r}"


def test_power_sgd():
    for rank in (0, -1):
        with pytest.raises(ValueError, match=f"at least 1, not {rank}"):
            PowerSGD(rank=rank)
    for rank in (1.5, "4", True, None):
        with pytest.raises(TypeError, match=f"must be an int, not {type(rank).__name__}"):
            PowerSGD(rank=rank)
    for dtype in ("int8", torch.bfloat16):
        with pytest.raises((TypeError, ValueError)) as error:
            PowerSGD(dtype=dtype)
        assert str(error.value) == f'PowerSGD: dtype must be "bfloat16", "float16" or None, not {dtype!r}'
    assert PowerSGD() == PowerSGD(rank=4) == PowerSGD(rank=4, dtype=None)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"shard": "optimizer", "compression": "bfloat16"}, "pass compression or shard"),
        ({"shard": "optimizer", "compression": PowerSGD()}, "pass compression or shard"),
        ({"reproducible": 8, "shard": "optimizer"}, "pass shard or reproducible"),
        ({"reproducible": 8, "compression": "bfloat16"}, "pass compression or reproducible"),
        ({"reproducible": 8, "balance_speed": True}, "pass balance_speed or reproducible"),
        ({"reproducible": 8, "split_batches": False}, "without split_batches=False"),
        ({"balance_speed": True, "split_batches": False}, "without split_batches=False"),
    ],
)
def test_what_does_not_go_together(options, text):
    with pytest.raises(ValueError, match=text):
        create_distributed_trainer(linear(), **options)


def test_never_by_position():
    for call in (lambda: TrainerOptions(True), lambda: PowerSGD(4)):
        with pytest.raises(TypeError, match="positional argument"):
            call()
    with pytest.raises(TypeError, match="positional argument"):
        create_distributed_trainer(linear(), 1, None)


def test_options_do_not_change():
    for options in (TrainerOptions(), PowerSGD()):
        name = dataclasses.fields(options)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(options, name, 1)
        assert not hasattr(options, "__dict__")


@pytest.mark.parametrize("kind", [TrainerOptions, PowerSGD])
def test_each_field_is_described(kind):
    """Each field has a default, and a docstring below it."""
    source = inspect.getsource(kind)
    for field in dataclasses.fields(kind):
        assert field.default is not dataclasses.MISSING
        assert re.search(rf'^    {field.name}: .* = .*\n    """\w', source, re.MULTILINE), field.name


def test_defaults_and_types_are_those_of_create():
    parameters = inspect.signature(create_distributed_trainer).parameters
    fields = {field.name: field for field in dataclasses.fields(TrainerOptions)}
    assert list(parameters) == ["model", "num_gpus", "group", *fields]
    hints = typing.get_type_hints(TrainerOptions)
    only_for_checkers = {"MPI": types.SimpleNamespace(Comm=object)}
    argument_hints = typing.get_type_hints(create_distributed_trainer, localns=only_for_checkers)
    for name, field in fields.items():
        assert (parameters[name].default, argument_hints[name]) == (field.default, hints[name])
    assert hints["nonfinite_gradients"] == typing.Literal["ignore", "skip", "raise"]


def test_what_follows_from_compression():
    for compression, wire_dtype, power_sgd in [
        (None, None, None),
        ("float16", "float16", None),
        (PowerSGD(rank=2), None, PowerSGD(rank=2)),
        (PowerSGD(rank=2, dtype="bfloat16"), "bfloat16", PowerSGD(rank=2, dtype="bfloat16")),
    ]:
        options = TrainerOptions(compression=compression)
        assert (options.wire_dtype, options.power_sgd) == (wire_dtype, power_sgd)


# ---- on ranks


DIFFERENCES = [
    ({}, {"compression": "bfloat16"}, "compression differs: rank 0 has None, {others} 'bfloat16'. "),
    (
        {"compression": PowerSGD(rank=2)},
        {"compression": PowerSGD(rank=2, dtype="float16")},
        "compression differs: rank 0 has PowerSGD(rank=2, dtype=None), {others} PowerSGD(rank=2, dtype='float16'). ",
    ),
    (
        {"nonfinite_gradients": "skip"},
        {"split_batches": False},
        "split_batches differs: rank 0 has True, {others} False. "
        "nonfinite_gradients differs: rank 0 has 'skip', {others} 'ignore'. ",
    ),
    ({"shard": "optimizer"}, {}, "shard differs: rank 0 has 'optimizer', {others} None. "),
    ({"reproducible": 4}, {"reproducible": 8}, "reproducible differs: rank 0 has 4, {others} 8. "),
    ({"precision": "float16"}, {}, "precision differs: rank 0 has 'float16', {others} None. "),
    ({}, {"balance_speed": True}, "balance_speed differs: rank 0 has False, {others} True. "),
]


def check_differences(world, differences, **group):
    for first, others, expected in differences:
        with pytest.raises(MismatchError) as error:
            create_distributed_trainer(linear(), **(others if world.rank else first), **group)
        who = "rank 1 has" if world.size == 2 else "ranks 1 and 2 have"
        text = expected.format(others=who) + "Pass the same options to create_distributed_trainer on every rank."
        assert str(error.value).startswith(text)
        assert len(set(world.gather(str(error.value)))) == 1
    with create_distributed_trainer(linear(), **group) as trainer:
        assert trainer.world_size == world.size


@on_ranks(2, 3, (3, 2))
def test_ranks_pass_different_options(world):
    """If options differ, every rank gets the same error at creation, and can make a trainer afterwards."""
    check_differences(world, DIFFERENCES)


@on_ranks(2, 3)
def test_ranks_pass_different_options_over_gloo(world, shared_folder):
    store = dist.FileStore(str(shared_folder / "store"), world.size)
    dist.init_process_group("gloo", store=store, rank=world.rank, world_size=world.size)
    try:
        only_ours = ("compression", "shard")
        check_differences(
            world,
            [row for row in DIFFERENCES if not any(name in options for options in row[:2] for name in only_ours)],
            group=dist.group.WORLD,
        )
    finally:
        dist.destroy_process_group()
        gc.collect()


@on_ranks((2, 1))
def test_ranks_pass_different_options_over_shmpi(world):
    """Options that differ are also refused if they would make separate groups for gradients."""
    dist.init_process_group("shmpi")
    try:
        check_differences(world, DIFFERENCES, group=dist.group.WORLD)
    finally:
        dist.destroy_process_group()


@on_ranks(2)
def test_kinds_of_groups(world, shared_folder):
    """The group may be a communicator of mpi4py or a group of torch; the error for anything else names both."""
    store = dist.FileStore(str(shared_folder / "store"), world.size)
    dist.init_process_group("gloo", store=store, rank=world.rank, world_size=world.size)
    try:
        alone = world.comm.Split(world.rank)
        own = [dist.new_group([rank]) for rank in range(world.size)][world.rank]
        for group, size in [(world.comm, 2), (alone, 1), (dist.group.WORLD, 2), (own, 1)]:
            with create_distributed_trainer(linear(), group=group) as trainer:
                assert trainer.world_size == size
                assert trainer.is_main == (world.rank == 0 or size == 1)
        for group in (3, "world", dist.GroupMember.NON_GROUP_MEMBER, world.comm.group, [0, 1]):
            check_refused(group)
        own = trainer = None
    finally:
        dist.destroy_process_group()
        gc.collect()


def check_refused(group):
    kinds = r"an mpi4py communicator \(mpi4py\.MPI\.Comm\) or a group of torch\.distributed .*ProcessGroup\)"
    with pytest.raises(TypeError, match=f"group must be {kinds}, not {type(group).__name__}"):
        create_distributed_trainer(linear(), group=group)


def test_no_group_without_ranks():
    """A wrong group is refused without ranks, also if mpi4py was not imported."""
    check_refused(3)
