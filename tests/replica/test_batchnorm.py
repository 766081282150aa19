# SPDX-License-Identifier: Apache-2.0
"""Global BatchNorm on 2 and 3 gloo processes, compared with plain torch on the whole batch.

All cases of one world size share a launch: this file, run as a script, is one rank of the launch, and writes its
results to a file.
"""

import copy
import faulthandler
import logging
import os
import pickle
import subprocess
import sys
from pathlib import Path

import forked
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from distributed_trainer.replica.batchnorm import GlobalBatchNorm

TIMEOUT_SECONDS = 100
NUM_SAMPLES = 8
COUNTS = {2: [5, 3], 3: [5, 3, 0]}  # number of samples on each rank; 0 is a dummy
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
MIXED = {"params": F32, "buffer_tolerance": 1e-5}


class OwnForward(nn.BatchNorm1d):
    """Subclass whose forward calls F.batch_norm, as most subclasses do."""

    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training).relu()


class Unseen(nn.BatchNorm1d):
    """Subclass that computes its statistics without F.batch_norm."""

    def forward(self, x):
        return (x - x.mean(0)) * self.weight + self.bias


class Net(nn.Module):
    """Two layers with statistics, one of them used twice, between layers without statistics."""

    def __init__(self):
        super().__init__()
        # Before a BatchNorm, a bias would have a gradient of rounding errors only.
        self.conv = nn.Conv2d(2, 4, 3, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.linear = nn.Linear(16, 5, bias=False)
        self.norm1 = nn.BatchNorm1d(5, momentum=None)

    def forward(self, x):
        x = self.norm(self.norm(self.conv(x)).relu() ** 2)
        return self.norm1(self.linear(x.flatten(1)))


class Checkpointed(nn.Module):
    """Run forward again in backward."""

    def __init__(self):
        super().__init__()
        self.net = Net()

    def forward(self, x):
        return checkpoint(self.net, x, use_reentrant=False)


def parts(*modules):
    return nn.Sequential(*modules)


def with_frozen_weight(module):
    module.weight.requires_grad_(False)
    return module


def without_bias(module):
    module.bias = None  # the effect of bias=False, an argument that torch 2.11's BatchNorm does not have
    return module


# Cases by name: (function that makes the module, shape of a sample, options).
CASES = {
    "1d": (lambda: nn.BatchNorm1d(3), (3,), {}),
    "1d_length": (lambda: nn.BatchNorm1d(3), (3, 7), {}),
    "2d": (lambda: nn.BatchNorm2d(3), (3, 4, 5), {}),
    "2d_channels_last": (lambda: nn.BatchNorm2d(3), (3, 4, 5), {"memory_format": torch.channels_last}),
    "3d": (lambda: nn.BatchNorm3d(2), (2, 2, 3, 2), {}),
    "sync": (lambda: nn.SyncBatchNorm(3), (3, 4, 5), {}),
    "cumulative": (lambda: nn.BatchNorm1d(3, momentum=None), (3, 2), {}),
    "no_running": (lambda: nn.BatchNorm1d(3, track_running_stats=False), (3, 2), {}),
    "no_affine": (lambda: nn.BatchNorm1d(3, affine=False), (3, 2), {}),
    "no_bias": (lambda: without_bias(nn.BatchNorm1d(3)), (3, 2), {}),
    "frozen_weight": (lambda: with_frozen_weight(nn.BatchNorm1d(3)), (3, 2), {}),
    "input_without_gradient": (lambda: nn.BatchNorm1d(3), (3, 2), {"input_grad": False}),
    "eval": (lambda: nn.BatchNorm1d(3).eval(), (3, 2), {}),
    "eval_no_running": (lambda: nn.BatchNorm1d(3, track_running_stats=False).eval(), (3, 2), {}),
    "far_from_zero": (lambda: nn.BatchNorm1d(3), (3, 2), {"mean": 1000.0, "tolerance": 1e-9}),
    "constant_channel": (lambda: nn.BatchNorm1d(3), (3, 2), {"spread": 0.0, "mean": 2.0}),
    "own_forward": (lambda: OwnForward(3), (3,), {}),
    "net": (Net, (2, 4, 4), {}),
    "checkpointed": (Checkpointed, (2, 4, 4), {}),
    "float32": (Net, (2, 4, 4), {"dtype": F32, "tolerance": 1e-5}),
    "bfloat16": (lambda: nn.BatchNorm2d(3), (3, 4, 5), {"dtype": BF16, "tolerance": 2e-2}),
    "bfloat16_no_affine": (
        lambda: nn.BatchNorm2d(3, affine=False),
        (3, 4, 5),
        {"dtype": BF16, "tolerance": 2e-2},
    ),
    "bfloat16_mixed": (
        lambda: nn.BatchNorm2d(3),
        (3, 4, 5),
        {**MIXED, "dtype": BF16, "tolerance": 2e-2},
    ),
    "float16_mixed": (lambda: nn.BatchNorm2d(3), (3, 4, 5), {**MIXED, "dtype": F16, "tolerance": 2e-3}),
}


def make(name):
    factory, shape, options = CASES[name]
    torch.manual_seed(7)
    module = factory()
    for parameter in module.parameters():
        parameter.data = torch.randn_like(parameter)
    dtype = options.get("dtype", F64)
    spread, mean = options.get("spread", 2.0), options.get("mean", 0.5)
    samples = (torch.randn(3, NUM_SAMPLES, *shape, dtype=F64) * spread + mean).to(dtype)
    return module.to(options.get("params", dtype)), samples, options


def train(module, batches, options, part, num_steps=3, statistics=None, is_dummy=False):
    """Run forward and backward three times; return the results on which one process and several must agree."""
    result = {"outputs": [], "input_grads": []}
    for step in range(num_steps):
        x = batches[step][:1] * float("nan") if is_dummy else batches[step][part]
        if "memory_format" in options:
            x = x.to(memory_format=options["memory_format"])
        x = x.detach().requires_grad_(options.get("input_grad", True))
        context = statistics.active(is_dummy=is_dummy) if statistics else torch.enable_grad()
        with context:
            y = module(x)
            if "memory_format" in options:
                assert y.is_contiguous(memory_format=options["memory_format"])
            if y.requires_grad:
                weights = torch.randn(NUM_SAMPLES, *y.shape[1:], generator=torch.Generator().manual_seed(step))
                y.backward((weights[:1] if is_dummy else weights[part]).to(y.dtype))
        if not is_dummy:
            result["outputs"].append(y.detach())
            result["input_grads"].append(x.grad)
    result["parameter_grads"] = {} if is_dummy else {name: p.grad for name, p in module.named_parameters()}
    result["buffers"] = dict(module.named_buffers())
    return result


def edge_cases(group, rank, is_dummy):
    """Return results of cases that `CASES` does not cover, as values to compare."""
    seen = {}
    module = nn.BatchNorm1d(2)
    statistics = GlobalBatchNorm(module, group)
    with statistics.active(is_dummy=is_dummy or rank > 0):
        try:
            module(torch.ones(1, 2))
        except ValueError as error:
            seen["one_value"] = str(error)
    with statistics.active():  # a rank may have no samples and yet not be a dummy
        x = torch.arange(6.0).view(3, 2).sin() if rank == 0 else torch.ones(0, 2)
        y = module(x.requires_grad_())
        y.backward(torch.tensor([[1.0, 2.0], [0.0, 1.0], [3.0, 1.0]])[: len(y)])
        seen["empty"] = (y.detach(), x.grad, module.weight.grad)
    seen["classes"] = type(module) is nn.BatchNorm1d
    x = torch.full((2, 2), float(rank)).add_(torch.eye(2))
    seen["outside"] = torch.equal(module(x), copy.deepcopy(module)(x)) and bool(pickle.dumps(module))

    records = []
    logger = logging.getLogger("distributed_trainer")
    logger.addHandler(handler := logging.Handler())
    handler.emit = lambda record: records.append(record.getMessage())
    model = parts(nn.BatchNorm1d(2), Unseen(2), torch.jit.script(nn.BatchNorm1d(2)))
    statistics = GlobalBatchNorm(model, group)
    for _ in range(2):
        with statistics.active():
            model(x)
    seen["warnings"] = records
    return seen


def compiled(group, rank, is_dummy):
    """Return the largest differences between a compiled model and an eager copy, inside and outside of `active()`."""
    model = Net()
    model.compile(backend="eager")
    reference = copy.deepcopy(model)
    reference._compiled_call_impl = None
    statistics, plain = GlobalBatchNorm(model, group), GlobalBatchNorm(reference, group)
    x = torch.randn(4, 2, 4, 4, generator=torch.Generator().manual_seed(rank))
    differences = [(model(x) - reference(x)).abs().max()]  # first compiled for local statistics
    with statistics.active(is_dummy=is_dummy), plain.active(is_dummy=is_dummy):
        differences.append((model(x) - reference(x)).abs().max())
    differences.append((model(x) - reference(x)).abs().max())
    return float(max(differences)), dict(torch._dynamo.utils.counters["stats"])


def run_rank(rank, world_size, folder):
    faulthandler.dump_traceback_later(TIMEOUT_SECONDS - 10, exit=True)
    torch.set_num_threads(1)
    # A default process group exists, because SyncBatchNorm behaves differently with one.
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    group = dist.group.WORLD
    counts = COUNTS[world_size]
    start = sum(counts[:rank])
    is_dummy = counts[rank] == 0
    results = {}
    for name in CASES:
        module, batches, options = make(name)
        statistics = GlobalBatchNorm(module, group)
        part = slice(start, start + counts[rank])
        results[name] = train(module, batches, options, part, statistics=statistics, is_dummy=is_dummy)
    results["edges"] = edge_cases(group, rank, is_dummy)
    results["compiled"] = compiled(group, rank, is_dummy)
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=COUNTS, ids=lambda world_size: f"{world_size}-ranks")
def ranks(request, tmp_path_factory):
    """Results of each rank."""
    folder = tmp_path_factory.mktemp("batchnorm")
    command = [*forked.python(), __file__]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    processes = [
        subprocess.Popen([*command, str(rank), str(request.param), str(folder)], env=environment)
        for rank in range(request.param)
    ]
    try:
        assert [process.wait(timeout=TIMEOUT_SECONDS) for process in processes] == [0] * request.param
    finally:
        for process in processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


def assert_close(actual, expected, tolerance):
    actual, expected = actual.double(), expected.double()
    assert torch.isfinite(expected).all()
    # The gradients of a constant channel are zero except for rounding.
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1e-3)


@pytest.mark.parametrize("name", CASES)
def test_equals_one_process(ranks, name):
    """Compare outputs and input gradients of the parts, the sum of parameter gradients, and running statistics."""
    module, batches, options = make(name)
    expected = train(module if name != "sync" else plain_copy(module), batches, options, slice(None))
    results = [rank[name] for rank in ranks]
    tolerance = options.get("tolerance", 1e-12)
    for key in ("outputs", "input_grads"):
        for step, tensor in enumerate(expected[key]):
            pieces = [result[key][step] for result in results if result[key]]
            if tensor is None:
                assert pieces == [None] * len(pieces)
            else:
                assert_close(torch.cat(pieces), tensor, tolerance)
                assert all(piece.dtype == tensor.dtype for piece in pieces)
    for parameter, gradient in expected["parameter_grads"].items():
        pieces = [r["parameter_grads"][parameter] for r in results if r["parameter_grads"]]
        if gradient is None:
            assert pieces == [None] * len(pieces)
        else:
            assert_close(sum(piece.double() for piece in pieces), gradient, tolerance)
    for buffer, value in expected["buffers"].items():
        for result in results:
            assert_close(result["buffers"][buffer], value, options.get("buffer_tolerance", tolerance))
            assert torch.equal(result["buffers"][buffer], results[0]["buffers"][buffer])


def plain_copy(module):
    """Return a copy that plain torch can run: SyncBatchNorm refuses CPU tensors once a process group exists."""
    plain = nn.BatchNorm2d(module.num_features).to(module.weight.dtype)
    plain.load_state_dict(module.state_dict())
    return plain


def test_one_value_per_channel(ranks):
    """The number of values in the global batch counts; every rank raises the same error, with torch's text."""
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training") as error:
        nn.BatchNorm1d(2)(torch.ones(1, 2))
    assert [rank["edges"]["one_value"] for rank in ranks] == [str(error.value)] * len(ranks)


def test_empty_input(ranks):
    """A rank whose tensor has no rows takes part like any other rank."""
    module = nn.BatchNorm1d(2)
    x = torch.arange(6.0).view(3, 2).sin().requires_grad_()
    y = module(x)
    y.backward(torch.tensor([[1.0, 2.0], [0.0, 1.0], [3.0, 1.0]]))
    output, input_grad, weight_grad = ranks[0]["edges"]["empty"]
    assert_close(output, y, 1e-6)
    assert_close(input_grad, x.grad, 1e-5)
    assert_close(weight_grad, module.weight.grad, 1e-6)
    assert [len(tensor) for tensor in ranks[1]["edges"]["empty"]] == [0, 0, 2]


def test_untouched_outside(ranks):
    """Outside of active() modules have their original class, can be pickled, and use local statistics."""
    assert all(rank["edges"]["classes"] and rank["edges"]["outside"] for rank in ranks)


def test_modules_that_stay_local_are_named_once(ranks):
    """Rank 0 warns once for each module, in any number of steps."""
    local = "its statistics are those of each rank's part."
    assert ranks[0]["edges"]["warnings"] == [
        f"BatchNorm module '2' is a scripted module: {local}",
    ]
    assert ranks[1]["edges"]["warnings"] == []


def test_compiled_model(ranks):
    """A model compiled for local statistics uses global ones inside active(), and local ones again outside."""
    for rank in ranks:
        difference, stats = rank["compiled"]
        assert difference < 1e-5
        assert stats["unique_graphs"] >= 2


if __name__ == "__main__":
    run_rank(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
