# SPDX-License-Identifier: Apache-2.0
"""torch's fully_shard (FSDP2) over shmpi, against one process."""

import copy

import pytest
import torch
from ranks import on_ranks
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch_groups import assert_same, batches, loss_of, mlp, parts, train, trained_alone

pytestmark = pytest.mark.usefixtures("default_group")
some_ranks = on_ranks(1, 2, 4, (4, 2))
SIZES = (12, 24, 7, 24, 3)  # some that 2 and 4 do not divide, one below the number of ranks
BATCH = 8
FULL = StateDictOptions(full_state_dict=True)


def shard(model, **options):
    """Each linear layer by itself, then what is left."""
    for layer in model[::2]:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def adam(model):
    return torch.optim.AdamW(model.parameters(), lr=0.01)


@some_ranks
@pytest.mark.parametrize("reshard", [True, False, 2], ids=lambda reshard: f"reshard={reshard}")
def test_training(world, reshard):
    """With weights freed after forward, kept, and freed but for a part that pairs of ranks share."""
    if reshard == 2 and world.size < 4:
        reshard = True
    model = shard(mlp(*SIZES), reshard_after_forward=reshard)
    weight = model[0].weight
    assert isinstance(weight, DTensor)
    assert weight.to_local().shape[0] == 24 // world.size
    data = batches(4, BATCH, 12, 3)
    train(model, parts(world, data), adam(model))
    assert_same(model, trained_alone(mlp(*SIZES), data, make_optimizer=adam))


@some_ranks
def test_mixed_precision(world):
    """Computes in bfloat16 and reduces in float32, exactly as each part would by itself in bfloat16."""
    model = shard(
        mlp(*SIZES, dtype=torch.float32),
        mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
    )
    data = batches(4, BATCH, 12, 3, dtype=torch.float32)

    def loss_of(model, batch):  # in one dtype: torch 2.11 has no gradient of mse_loss for two
        inputs, targets = batch
        return torch.nn.functional.mse_loss(model(inputs).float(), targets)

    train(model, parts(world, data), loss_of=loss_of)

    expected = mlp(*SIZES, dtype=torch.float32)
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1, momentum=0.9)
    for batch in data:
        gradients = []
        for chunk in zip(*(tensor.chunk(world.size) for tensor in batch), strict=True):
            lowered = copy.deepcopy(expected).bfloat16()
            loss_of(lowered, (chunk[0].bfloat16(), chunk[1])).backward()
            gradients.append([parameter.grad.float() for parameter in lowered.parameters()])
        for parameter, *of_ranks in zip(expected.parameters(), *gradients, strict=True):
            parameter.grad = sum(of_ranks) / world.size
        optimizer.step()
    # One ulp in float32 may be another bfloat16 in the next step; such a step would show as 4e-3.
    assert_same(model, expected, rtol=1e-5)


@some_ranks
def test_meta_init(world):
    """Built without memory; rank 0's weights are sent to the shards."""
    with torch.device("meta"):
        model = mlp(*SIZES)
    shard(model).to_empty(device="cpu")
    whole = mlp(*SIZES).state_dict() if world.rank == 0 else {}
    set_model_state_dict(model, whole, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    assert_same(model, mlp(*SIZES), rtol=0)
    data = batches(2, BATCH, 12, 3)
    train(model, parts(world, data), adam(model))
    assert_same(model, trained_alone(mlp(*SIZES), data, make_optimizer=adam))


@some_ranks
def test_accumulation(world):
    """Gradients of two batches are added before they are reduced, with weights kept in between; then clipped."""
    data = batches(2, BATCH, 12, 3)
    model, expected = shard(mlp(*SIZES)), mlp(*SIZES)
    for number, batch in enumerate(parts(world, data)):
        model.set_requires_gradient_sync(number == 1)
        model.set_reshard_after_backward(number == 1)
        loss_of(model, batch).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    sum(loss_of(expected, batch) for batch in data).backward()
    expected_norm = torch.nn.utils.clip_grad_norm_(expected.parameters(), 0.1)
    assert expected_norm > 0.1
    torch.testing.assert_close(norm.full_tensor(), expected_norm, rtol=1e-12, atol=0)
    assert_same(gradients(model), gradients(expected))


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@on_ranks(4, (4, 2))
def test_hybrid(world):
    """Sharded over pairs of ranks, replicated over the pairs."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = shard(mlp(*SIZES), mesh=mesh)
    assert model[0].weight.to_local().shape == (12, 12)
    data = batches(4, BATCH, 12, 3)
    train(model, parts(world, data), adam(model))
    assert_same(model, trained_alone(mlp(*SIZES), data, make_optimizer=adam))


@some_ranks
def test_state_dicts(world):
    """A whole state dict of model and optimizer, gathered on rank 0 and sent out again, goes on as if never stopped."""
    data = batches(4, BATCH, 12, 3)
    model = shard(mlp(*SIZES))
    optimizer = adam(model)
    train(model, parts(world, data[:2]), optimizer)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    whole = get_model_state_dict(model, options=options)
    of_optimizer = get_optimizer_state_dict(model, optimizer, options=options)
    assert bool(whole) == (world.rank == 0)  # as the documentation has it

    resumed = shard(mlp(*SIZES, seed=5))
    optimizer = adam(resumed)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(resumed, whole, options=options)
    set_optimizer_state_dict(resumed, optimizer, of_optimizer, options=options)
    train(resumed, parts(world, data[2:]), optimizer)
    assert_same(resumed, trained_alone(mlp(*SIZES), data, make_optimizer=adam))
