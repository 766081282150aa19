# SPDX-License-Identifier: Apache-2.0
"""torch's DistributedDataParallel over shmpi, against one process.

Models differ between ranks at first, because DDP's start replaces them by rank 0's. Each rank trains on an equal part,
so the mean of the ranks' gradients is the gradient of the whole batch.
"""

import contextlib
import functools

import pytest
import torch
import torch.distributed as dist
from one_process import assert_same
from ranks import on_ranks
from small_models import mlp, sgd
from torch._inductor.compile_fx import compile_fx
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.distributed.algorithms.join import Join
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.checkpoint import checkpoint
from torch_groups import batches, loss_of, part, parts, train, trained_alone

pytestmark = pytest.mark.usefixtures("default_group")
some_ranks = on_ranks(1, 2, 4, (4, 2))
several = on_ranks(2, 4)
SIZES = (12, 24, 24, 6)
BATCH = 8


def wrap(world, model_of=None, **options):
    """Return the model of rank 0 in DDP, and the same model without DDP; `model_of(seed)` makes it."""
    model_of = model_of or (lambda seed: mlp(*SIZES, seed=seed))
    return DDP(model_of(world.rank), **options), model_of(0)


@some_ranks
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bucket_cap_mb": 0.002},  # several buckets, whose order changes after the first step
        {"gradient_as_bucket_view": True},
        {"static_graph": True},
        {"find_unused_parameters": True},
    ],
    ids=lambda options: next(iter(options), "plain"),
)
def test_options(world, options):
    model, alone = wrap(world, **options)
    data = batches(4, BATCH, 12, 6)
    train(model, parts(world, data))
    assert_same(model.module, trained_alone(alone, data))


@some_ranks
def test_no_sync(world):
    """With no_sync, gradients of microbatches are added locally and exchanged once."""
    model, alone = wrap(world)
    data = batches(6, BATCH, 12, 6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for start in range(0, 6, 3):
        optimizer.zero_grad()
        for number, batch in enumerate(parts(world, data[start : start + 3])):
            with model.no_sync() if number < 2 else contextlib.nullcontext():
                loss_of(model, batch).backward()
        optimizer.step()

    reference = torch.optim.SGD(alone.parameters(), lr=0.1)
    for start in range(0, 6, 3):
        reference.zero_grad()
        sum(loss_of(alone, batch) for batch in data[start : start + 3]).backward()
        reference.step()
    assert_same(model.module, alone)


def uneven(world):
    """Return the batches of all ranks; rank r has r + 2 batches."""
    data = batches(world.size * (world.size + 1), 4, 12, 6)
    return [data[rank * (world.size + 1) :][: rank + 2] for rank in range(world.size)]


@some_ranks
@pytest.mark.parametrize("by_initial", [True, False], ids=["initial_size", "size_left"])
def test_join(world, by_initial):
    """In join, ranks with less data repeat the others' collectives, and end with the same weights."""
    model, alone = wrap(world, bucket_cap_mb=0.002)
    data = uneven(world)
    with model.join(divide_by_initial_world_size=by_initial):
        train(model, data[world.rank])

    optimizer = sgd(alone)
    for step in range(world.size + 1):
        left = [of_rank[step] for of_rank in data if step < len(of_rank)]
        optimizer.zero_grad()
        (sum(loss_of(alone, batch) for batch in left) / (world.size if by_initial else len(left))).backward()
        optimizer.step()
    assert_same(model.module, alone)


@several
def test_join_ends_early(world):
    """With throw_on_early_termination, all ranks stop when the first has no more data."""
    model, _ = wrap(world)
    steps = 0
    with (
        pytest.raises(RuntimeError, match=r"exhausted (all )?inputs"),
        Join([model], throw_on_early_termination=True),
    ):
        for batch in uneven(world)[world.rank]:
            loss_of(model, batch).backward()
            steps += 1
    assert steps == 2


class Branches(torch.nn.Module):
    """Several branches, of which each input uses one; the last branch is never used."""

    def __init__(self, seed):
        super().__init__()
        self.start = mlp(12, 8, seed=seed)
        self.branches = torch.nn.ModuleList(mlp(8, 6, seed=seed + 10 * number) for number in range(4))

    def forward(self, inputs, branch):
        return self.branches[branch](self.start(inputs))


@some_ranks
def test_find_unused_parameters(world):
    """Ranks use different branches in each step; a parameter that no rank uses has no gradient."""
    model, alone = wrap(world, Branches, find_unused_parameters=True)
    data = batches(5, BATCH, 12, 6)

    def loss_of_part(model, batch, step, rank):
        inputs, targets = batch
        return torch.nn.functional.mse_loss(model(inputs, (step + rank) % 3), targets)

    optimizer, reference = (torch.optim.SGD(each.parameters(), lr=0.1) for each in (model, alone))
    for step, batch in enumerate(data):
        optimizer.zero_grad()
        loss_of_part(model, [part(world, tensor) for tensor in batch], step, world.rank).backward()
        optimizer.step()
        reference.zero_grad()
        chunks = zip(*(tensor.chunk(world.size) for tensor in batch), strict=True)
        losses = [loss_of_part(alone, chunk, step, rank) for rank, chunk in enumerate(chunks)]
        (sum(losses) / world.size).backward()
        reference.step()
    assert model.module.branches[3][0].weight.grad is None
    assert_same(model.module, alone)


class Checkpointed(torch.nn.Module):
    """A layer that is used twice and recomputed in backward both times, and a layer that is not used."""

    def __init__(self, seed):
        super().__init__()
        self.start, self.layer, self.end, self.unused = (
            mlp(*sizes, seed=seed) for sizes in [(12, 8, 8), (8, 8), (8, 6), (3, 3)]
        )

    def forward(self, inputs):
        hidden = self.start(inputs)
        for _ in range(2):
            hidden = checkpoint(self.layer, hidden, use_reentrant=False)
        return self.end(hidden)


@some_ranks
@pytest.mark.parametrize("option", ["static_graph", "find_unused_parameters"])
def test_activation_checkpointing(world, option):
    model, alone = wrap(world, Checkpointed, **{option: True})
    data = batches(4, BATCH, 12, 6)
    train(model, parts(world, data))
    assert_same(model.module, trained_alone(alone, data))


def gradients_of_ranks(model, world, batch):
    """Return the gradients of each rank's part of the batch, by parameter."""
    result = []
    for chunk in zip(*(tensor.chunk(world.size) for tensor in batch), strict=True):
        result.append(torch.autograd.grad(loss_of(model, chunk), list(model.parameters())))
    return list(zip(*result, strict=True))


@some_ranks
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_hooks(world, dtype):
    """Gradients through 16-bit hooks differ by at most (ranks + 1) roundings of at most the sum.

    Each rank's gradient is rounded and divided, and then the sum is rounded. DDP accepts a hook with the name
    bf16_compress_hook only if it finds NCCL or XCCL, hence the wrapper.
    """
    model, alone = wrap(world)
    hook = default_hooks.fp16_compress_hook if dtype == torch.float16 else default_hooks.bf16_compress_hook

    def wrapper(state: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        return hook(state, bucket)

    model.register_comm_hook(None, wrapper)
    (batch,) = batches(1, BATCH, 12, 6)
    (own,) = parts(world, [batch])
    loss_of(model, own).backward()
    for parameter, of_ranks in zip(model.parameters(), gradients_of_ranks(alone, world, batch), strict=True):
        assert parameter.grad.dtype == torch.float64
        rounded = [gradient.to(dtype) / world.size for gradient in of_ranks]
        bound = torch.finfo(dtype).eps * sum(gradient.double().abs() for gradient in rounded) + torch.finfo(dtype).tiny
        assert ((parameter.grad - sum(gradient.double() for gradient in rounded)).abs() <= bound * world.size).all()
        assert torch.equal(parameter.grad, parameter.grad.to(dtype).double())  # shows that it was exchanged in 16 bits


@some_ranks
def test_powersgd(world):
    """PowerSGD is exact if the gradients' rank is no higher than the approximation's: one sample on each of 4 ranks.

    Matrices are multiplied by an orthogonal basis and its transpose, which loses some digits more than a sum.
    """
    model, alone = wrap(world, lambda seed: mlp(24, 24, 24, seed=seed))
    state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=4, start_powerSGD_iter=2)
    model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    data = batches(5, world.size, 24, 24)
    train(model, parts(world, data))
    assert state.compression_stats()[1] > state.compression_stats()[2]
    assert_same(model.module, trained_alone(alone, data), rtol=1e-9)


@some_ranks
def test_two_models(world):
    """Two models can take turns with their steps, and one loss can use both."""
    models = [wrap(world, lambda seed, number=number: mlp(12, 12, seed=2 * seed + number)) for number in range(2)]
    (first, first_alone), (second, second_alone) = models
    data = batches(4, BATCH, 12, 12)

    def run(first, second, data):
        optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (first, second)]
        for inputs, targets in data:
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss_of(lambda inputs: second(first(inputs)), (inputs, targets)).backward()
            for optimizer in optimizers:
                optimizer.step()
            train(second, [(inputs, targets)], optimizers[1])

    run(first, second, parts(world, data))
    run(first_alone, second_alone, data)
    assert_same(first.module, first_alone)
    assert_same(second.module, second_alone)


def with_batchnorm(seed):
    torch.manual_seed(seed)
    layers = [torch.nn.Linear(12, 8), torch.nn.BatchNorm1d(8), torch.nn.Tanh(), torch.nn.Linear(8, 6)]
    return torch.nn.Sequential(*layers).double()


@some_ranks
def test_buffers(world):
    """BatchNorm normalizes each rank's part separately; before each forward all ranks take rank 0's buffers."""
    model, alone = wrap(world, with_batchnorm)
    data = batches(4, BATCH, 12, 6)
    train(model, parts(world, data))
    with torch.no_grad():
        model(data[0][0])  # makes all ranks take rank 0's buffers; the input is the same on every rank

    def loss_of_parts(alone, batch):
        first, *others = zip(*(tensor.chunk(world.size) for tensor in batch), strict=True)
        losses = []
        for chunk in others:
            buffers = {name: buffer.clone() for name, buffer in alone.named_buffers()}
            losses.append(loss_of(functools.partial(functional_call, alone, buffers), chunk))
        return (loss_of(alone, first) + sum(losses)) / world.size

    reference = trained_alone(alone, data, loss_of=loss_of_parts)
    reference(data[0][0])
    assert_same(model.module, reference)


@on_ranks(4, (4, 2))
def test_subgroups(world):
    """Each half of the ranks trains its own model; one half's group has a different order of ranks."""
    halves = [[3, 1], [0, 2]]
    groups = [dist.new_group(ranks, use_local_synchronization=False) for ranks in halves]
    mine = next(number for number, ranks in enumerate(halves) if world.rank in ranks)
    place = dist.get_group_rank(groups[mine], world.rank)
    data = batches(4, BATCH, 12, 6, seed=mine)
    model = DDP(mlp(*SIZES, seed=world.rank), process_group=groups[mine])
    train(model, [tuple(tensor.chunk(2)[place] for tensor in batch) for batch in data])
    first = dist.get_global_rank(groups[mine], 0)
    assert_same(model.module, trained_alone(mlp(*SIZES, seed=first), data))


@several
def test_different_models(world):
    """DDP compares the ranks' parameters at its start; every rank raises if they differ."""
    with pytest.raises(RuntimeError, match=r"DDP expects same model across all ranks, but Rank \d has \d params"):
        DDP(mlp(*[12] * (4 if world.rank else 3)))


@pytest.mark.long  # the compiler takes most of the time
@on_ranks(2)
def test_compile(world):
    """A compiled model works in DDP, and so does DDP compiled as a whole; its graph is cut at buckets (from 1 MiB)."""
    sizes = (12, 384, 384, 384, 6)
    data = batches(3, BATCH, 12, 6)
    expected = trained_alone(mlp(*sizes), data)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return compile_fx(graph, inputs)

    for compile_whole in (False, True):
        model = mlp(*sizes, seed=world.rank)
        inner = DDP(model if compile_whole else torch.compile(model, backend=backend), bucket_cap_mb=1)
        train(torch.compile(inner, backend=backend) if compile_whole else inner, parts(world, data))
        assert_same(model, expected)
    assert len(graphs) > 2
