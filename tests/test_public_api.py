# SPDX-License-Identifier: Apache-2.0
"""The public names, frozen: whoever changes the list changes what users may rely on."""

import inspect
import subprocess
import sys

import distributed_trainer
from distributed_trainer import DistributedTrainer, create_distributed_trainer

NAMES = [
    "CheckpointError",
    "DistributedTrainer",
    "DistributedTrainerError",
    "LaunchError",
    "MPINotFoundError",
    "MismatchError",
    "RankLostError",
    "create_distributed_trainer",
]
MEMBERS = [
    *(
        "backward",
        "batches",
        "close",
        "epochs",
        "evaluate",
        "forward",
        "gradient_norm",
        "load",
        "loader",
        "log",
        "log_to",
        "no_sync",
    ),
    *("num_skipped_steps", "profile", "progress", "resume", "save", "split", "step", "summary", "train_step"),
]
ATTRIBUTES = ["device", "local_rank", "model", "rank", "world_size"]


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
        ("comm", None, True),
        ("process_group", None, True),
        ("split_batches", True, True),
        ("sync_batchnorm", True, True),
        ("compression", None, True),
        ("shard_optimizer", False, True),
        ("wire_dtype", None, True),
        ("nonfinite_gradients", "ignore", True),
        ("reproducible", None, True),
        ("balance", None, True),
        ("stall_report_seconds", None, True),
        ("stall_timeout_seconds", None, True),
    ]
    step = inspect.signature(DistributedTrainer.train_step).parameters
    assert list(step) == [
        *("self", "inputs", "targets", "criterion", "optimizer"),
        *("microbatches", "weight", "clip_norm"),
    ]


def test_docstrings():
    """Each says more than its name."""
    documented = [getattr(distributed_trainer, name) for name in NAMES]
    documented += [getattr(DistributedTrainer, name) for name in MEMBERS]
    for thing in [distributed_trainer, *documented]:
        assert len(inspect.getdoc(thing).split()) >= 5, thing


def test_errors():
    assert issubclass(distributed_trainer.DistributedTrainerError, RuntimeError)
    for name in ("CheckpointError", "LaunchError", "MPINotFoundError", "MismatchError", "RankLostError"):
        assert issubclass(getattr(distributed_trainer, name), distributed_trainer.DistributedTrainerError)


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
