# SPDX-License-Identifier: Apache-2.0
"""torch's distributed checkpoints, its sharded optimizer and local SGD over shmpi, against one process."""

import copy
from collections import OrderedDict

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from one_process import assert_same
from ranks import on_ranks
from small_models import adamw, mlp, sgd
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState, post_localSGD_hook
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.algorithms.model_averaging.hierarchical_model_averager import HierarchicalModelAverager
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import PostLocalSGDOptimizer, ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel as DDP
from torch_groups import batches, loss_of, parts, train, trained_alone

pytestmark = pytest.mark.usefixtures("default_group")
some_ranks = on_ranks(1, 2, 4, (4, 2))
four = on_ranks(4, (4, 2))
SIZES = (12, 24, 7, 24, 3)
BATCH = 12


def sharded(seed, mesh):
    """Return a model, sharded over the mesh unless that is None, and its optimizer."""
    model = mlp(*SIZES, seed=seed)
    if mesh is not None:
        for layer in model[::2]:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model, adamw(model)


def save(model, optimizer, folder):
    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state, "step": 2}, checkpoint_id=folder)


def load(model, optimizer, folder, **options):
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state, "step": 0}
    dcp.load(state, checkpoint_id=folder, **options)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    assert state["step"] == 2


@four
def test_checkpoint(world, shared_folder):
    """A checkpoint of 4 ranks continues exactly on 4, 2 and 3 ranks (3: without rank 0) and in one process."""
    data = batches(4, BATCH, 12, 3)
    expected = trained_alone(mlp(*SIZES), data, adamw)
    groups = {ranks: dist.new_group(ranks) for ranks in [(0, 1, 2, 3), (0, 1), (1, 2, 3)]}
    meshes = {}
    for ranks, group in groups.items():
        if world.rank in ranks:
            meshes[ranks] = DeviceMesh.from_group(group, "cpu")
    model, optimizer = sharded(0, meshes[0, 1, 2, 3])
    train(model, parts(world, data[:2]), optimizer)
    save(model, optimizer, shared_folder / "checkpoint")
    assert len(list((shared_folder / "checkpoint").glob("*.distcp"))) == 4

    for ranks, mesh in meshes.items():
        model, optimizer = sharded(5, mesh)
        load(model, optimizer, shared_folder / "checkpoint", process_group=groups[ranks])
        place = ranks.index(world.rank)
        own = [tuple(tensor.chunk(len(ranks))[place] for tensor in batch) for batch in data[2:]]
        assert_same(train(model, own, optimizer), expected)

    if world.rank == 3:
        model, optimizer = sharded(5, None)
        load(model, optimizer, shared_folder / "checkpoint", no_dist=True)
        assert_same(train(model, data[2:], optimizer), expected)


@on_ranks(2, 4, (4, 2))
def test_async_save(world, shared_folder):
    """A thread can save by one group while the main thread trains by another."""
    data = batches(12, BATCH, 12, 3)
    model = DDP(mlp(*SIZES))
    optimizer = adamw(model)
    train(model, parts(world, data[:2]), optimizer)
    state = {"model": copy.deepcopy(model.module).state_dict(), "rank of": world.rank}
    saving = dcp.async_save(state, checkpoint_id=shared_folder / "checkpoint", process_group=dist.new_group())
    train(model, parts(world, data[2:]), optimizer)
    saving.result()
    assert_same(model.module, trained_alone(mlp(*SIZES), data, adamw))

    loaded = {"model": mlp(*SIZES, seed=5).state_dict()}
    dcp.load(loaded, checkpoint_id=shared_folder / "checkpoint")
    assert_same(loaded["model"], trained_alone(mlp(*SIZES), data[:2], adamw).state_dict())


@some_ranks
@pytest.mark.parametrize("in_bucket", [False, True], ids=["by_parameter", "bucket_view"])
def test_zero_redundancy_optimizer(world, in_bucket):
    """The optimizer's state works in parts and gathered, and another optimizer continues from it."""
    data = batches(4, BATCH, 12, 3)
    model, alone = DDP(mlp(*SIZES)), mlp(*SIZES)

    def sharded_optimizer():
        options = {"lr": 0.01, "parameters_as_bucket_view": in_bucket}
        return ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, **options)

    optimizer, reference = sharded_optimizer(), adamw(alone)
    train(model, parts(world, data[:2]), optimizer)
    train(alone, data[:2], reference)
    assert_same(model.module, alone)
    root = world.size - 1
    optimizer.consolidate_state_dict(to=root)
    states = [optimizer.state_dict() if world.rank == root else None]
    dist.broadcast_object_list(states, src=root)
    for number, state in reference.state_dict()["state"].items():
        assert_same(states[0]["state"][number], state)

    resumed = sharded_optimizer()
    resumed.load_state_dict(states[0])
    train(model, parts(world, data[2:]), resumed)
    train(alone, data[2:], reference)
    assert_same(model.module, alone)


def local_sgd(world, data, groups_of_step, averages_of_step):
    """Simulate all ranks in one process, and return the weights of each.

    `groups_of_step(step)` is how many neighbouring ranks share gradients; `averages_of_step(step)` is how many average
    their weights after the step; 1 for none.
    """
    models = [mlp(*SIZES) for _ in range(world.size)]
    optimizers = [sgd(model) for model in models]

    def mean(tensors, size):
        for start in range(0, world.size, size):
            mean = sum(tensor.clone() for tensor in tensors[start : start + size]) / size
            for tensor in tensors[start : start + size]:
                tensor.copy_(mean)

    for step, (inputs, targets) in enumerate(data):
        chunks = zip(inputs.chunk(world.size), targets.chunk(world.size), strict=True)
        for model, chunk in zip(models, chunks, strict=True):
            model.zero_grad()
            loss_of(model, chunk).backward()
        with torch.no_grad():
            for of_ranks in zip(*(model.parameters() for model in models), strict=True):
                mean([parameter.grad for parameter in of_ranks], groups_of_step(step))
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():
            for of_ranks in zip(*(model.parameters() for model in models), strict=True):
                mean(of_ranks, averages_of_step(step))
    return models


@some_ranks
def test_periodic_averager(world):
    """Each rank trains separately, and all average their weights in every third step from the second on."""
    data = batches(7, BATCH, 12, 3)
    model = mlp(*SIZES)
    averager = PeriodicModelAverager(period=3, warmup_steps=1)
    optimizer = sgd(model)
    for batch in parts(world, data):
        train(model, [batch], optimizer)
        averager.average_parameters(model.parameters())
    expected = local_sgd(world, data, lambda step: 1, lambda step: world.size if step % 3 == 1 else 1)
    assert_same(model, expected[world.rank])


@some_ranks
@pytest.mark.parametrize("in_pairs", [True, False], ids=["pairs", "alone"])
def test_post_local_sgd(world, in_pairs):
    """All ranks share gradients at first, then pairs or none, and all average their weights in every second step."""
    data = batches(7, BATCH, 12, 3)
    model = DDP(mlp(*SIZES), bucket_cap_mb=0.002)
    size = min(2, world.size) if in_pairs else 1
    pair, _ = dist.new_subgroups(group_size=size)
    state = PostLocalSGDState(None, pair, start_localSGD_iter=3, post_local_gradient_allreduce=in_pairs)
    model.register_comm_hook(state, post_localSGD_hook)
    optimizer = PostLocalSGDOptimizer(sgd(model), PeriodicModelAverager(period=2, warmup_steps=3))
    train(model, parts(world, data), optimizer)
    expected = local_sgd(
        world,
        data,
        lambda step: world.size if step < 3 else size,
        lambda step: world.size if step >= 3 and (step - 3) % 2 == 0 else 1,
    )
    assert_same(model.module, expected[world.rank])


@four
def test_hierarchical_averager(world):
    """All ranks average their weights in every fourth step, and pairs two steps after that."""
    data = batches(8, BATCH, 12, 3)
    model = mlp(*SIZES)
    averager = HierarchicalModelAverager(OrderedDict([(2, 2), (4, 4)]), warmup_steps=0)
    optimizer = sgd(model)
    for batch in parts(world, data):
        train(model, [batch], optimizer)
        averager.average_parameters(model.parameters())
    expected = local_sgd(world, data, lambda step: 1, lambda step: {0: 4, 2: 2}.get(step % 4, 1))
    assert_same(model, expected[world.rank])
