# SPDX-License-Identifier: Apache-2.0
"""The public names, frozen: whoever changes the list changes what users may rely on."""

import ast
import dataclasses
import inspect
import itertools
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import distributed_trainer
from distributed_trainer import DistributedTrainer, create_distributed_trainer
from distributed_trainer.data.loader import ShardedDataLoader
from distributed_trainer.metrics.step_clock import Summary
from distributed_trainer.options import TrainerOptions

NAMES = [
    "CheckpointError",
    "DistributedTrainer",
    "DistributedTrainerError",
    "LaunchError",
    "MPINotFoundError",
    "MeanLoss",
    "MismatchError",
    "PowerSGD",
    "RankLostError",
    "common_random",
    "create_distributed_trainer",
]
MEMBERS = [
    *(
        "any",
        "backward",
        "batches",
        "close",
        "epochs",
        "evaluate",
        "export",
        "forward",
        "gather",
        "gradient_norm",
        "is_main",
        "load",
        "loader",
        "local_rank",
        "log",
        "log_to",
        "no_sync",
    ),
    *("num_skipped_steps", "on_gradient", "profile", "progress", "rank", "reduce", "resume", "save", "split", "step"),
    *("summary", "train_step", "update_bn", "world_size"),
]
ATTRIBUTES = ["device", "model"]
RETURNED = [ShardedDataLoader, Summary]
"""Types of what public methods return."""
DATACLASSES = [distributed_trainer.PowerSGD, TrainerOptions]


def test_names():
    assert sorted(distributed_trainer.__all__) == NAMES
    modules = {name for name, value in vars(distributed_trainer).items() if inspect.ismodule(value)}
    assert sorted(name for name in vars(distributed_trainer) if name[0] != "_" and name not in modules) == NAMES


def test_members():
    methods = [name for name in dir(DistributedTrainer) if name[0] != "_"]
    assert sorted(methods) == MEMBERS
    assert all(f"{name}:" in DistributedTrainer.__doc__ for name in ATTRIBUTES)


def test_signatures():
    signature = inspect.signature(create_distributed_trainer)
    parameters = [(p.name, p.default, p.kind == p.KEYWORD_ONLY) for p in signature.parameters.values()]
    assert parameters == [
        ("model", inspect.Parameter.empty, False),
        ("num_gpus", None, False),
        ("group", None, True),
        ("split_batches", True, True),
        ("sync_batchnorm", True, True),
        ("compression", None, True),
        ("shard", None, True),
        ("nonfinite_gradients", "ignore", True),
        ("reproducible", None, True),
        ("balance_speed", False, True),
        ("split", None, True),
        ("batch_dim", 0, True),
        ("buffers", None, True),
        ("precision", None, True),
    ]
    step = inspect.signature(DistributedTrainer.train_step).parameters
    assert list(step) == [
        *("self", "inputs", "targets", "criterion", "optimizer"),
        *("microbatches", "weight", "clip_norm", "check_weight"),
    ]


def test_docstrings():
    """Each says more than its name."""
    documented = [getattr(distributed_trainer, name) for name in NAMES]
    documented += [getattr(DistributedTrainer, name) for name in MEMBERS]
    for thing in [distributed_trainer, *documented]:
        assert len(inspect.getdoc(thing).split()) >= 5, thing


def public_callables():
    """Yield (name, callable) of every public function, class and method."""
    for thing in [*(getattr(distributed_trainer, name) for name in NAMES), *RETURNED]:
        yield thing.__name__, thing
        for name, member in vars(thing).items() if inspect.isclass(thing) else ():
            if name[0] != "_" and callable(member):
                yield f"{thing.__name__}.{name}", member


CALLABLES = dict(public_callables())


def undocumented_parameters(thing):
    """Return the parameters that the docstring's Args section does not describe; for Summary, its Attributes."""
    if inspect.isclass(thing) and (re.search("makes it|Made by `", thing.__doc__) or issubclass(thing, Exception)):
        return []  # users call no constructor
    title = "Attributes" if thing is Summary else "Args"
    section = re.search(rf"^{title}:\n(.*?)(?:^\S|\Z)", inspect.getdoc(thing), re.MULTILINE | re.DOTALL)
    described = set(re.findall(r"^    (\w+): \S", section[1], re.MULTILINE)) if section else set()
    return [name for name in inspect.signature(thing).parameters if name != "self" and name not in described]


def undocumented_fields(kind):
    """Return the fields of a dataclass that have no docstring under them."""
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0].body
    documented = {
        statement.target.id
        for statement, text in itertools.pairwise(body)
        if isinstance(statement, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    }
    return [field.name for field in dataclasses.fields(kind) if field.name not in documented]


@pytest.mark.parametrize("name", CALLABLES)
def test_parameters_are_documented(name):
    missing = undocumented_parameters(CALLABLES[name])
    assert not missing, f"{name}: the section Args does not describe {', '.join(missing)}"


@pytest.mark.parametrize("kind", DATACLASSES, ids=lambda kind: kind.__name__)
def test_fields_are_documented(kind):
    missing = undocumented_fields(kind)
    assert not missing, f"{kind.__name__}: no docstring under {', '.join(missing)}"


def test_missing_documentation_is_found():
    """The two tests above would see what is not documented."""

    def function(first, second, *, third=1):
        """Do something.

        Args:
            first: An int. TypeError for others.
            second:

        Raises:
            third: Not a parameter.
        """

    assert undocumented_parameters(function) == ["second", "third"]
    assert undocumented_fields(UndocumentedField) == ["second"]


@dataclasses.dataclass
class UndocumentedField:
    first: int = 1
    """An int."""
    second: int = 2


def test_errors():
    assert issubclass(distributed_trainer.DistributedTrainerError, RuntimeError)
    for name in ("CheckpointError", "LaunchError", "MPINotFoundError", "MismatchError", "RankLostError"):
        assert issubclass(getattr(distributed_trainer, name), distributed_trainer.DistributedTrainerError)


@pytest.mark.slow
def test_import_does_nothing():
    """No MPI is loaded, no logging set up, no variable changed, no thread started."""
    code = """
import logging, os, sys, threading
import torch
before = dict(os.environ), logging.root.handlers[:], threading.active_count()
import distributed_trainer
assert (dict(os.environ), logging.root.handlers, threading.active_count()) == before
assert not logging.getLogger("distributed_trainer").handlers
assert "libmpi" not in open("/proc/self/maps").read()
assert not any("_engine" in name for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.slow
@pytest.mark.each_mpi
def test_stub():
    """The stub of the engine is what tools/write_stub.py writes for the module that was built."""
    tool = Path(__file__).parents[1] / "tools/write_stub.py"
    checked = subprocess.run([sys.executable, tool, "--check"], capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0, checked.stderr
