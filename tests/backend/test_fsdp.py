# SPDX-License-Identifier: Apache-2.0
"""torch's fully_shard (FSDP2) over shmpi, against one process."""

import copy

import pytest
import torch
from one_process import assert_same
from ranks import on_ranks
from small_models import adamw, mlp, sgd
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
from torch_groups import batches, loss_of, parts, train, trained_alone

pytestmark = pytest.mark.usefixtures("default_group")
some_ranks = on_ranks(1, 2, 4, (4, 2))
SIZES = (12, 24, 7, 24, 3)  # 2 and 4 do not divide 7, and 3 is below the largest number of ranks
BATCH = 8
FULL = StateDictOptions(full_state_dict=True)


def shard(model, **options):
    """Put each linear layer under fully_shard separately, then the rest of the model."""
    for layer in model[::2]:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


@some_ranks
@pytest.mark.parametrize("reshard", [True, False, 2], ids=lambda reshard: f"reshard={reshard}")
def test_training(world, reshard):
    """Training works with weights freed after forward, kept, or freed except for a part that pairs of ranks share."""
    if reshard == 2 and world.size < 4:
        reshard = True
    model = shard(mlp(*SIZES), reshard_after_forward=reshard)
    weight = model[0].weight
    assert isinstance(weight, DTensor)
    assert weight.to_local().shape[0] == 24 // world.size
    data = batches(4, BATCH, 12, 3)
    train(model, parts(world, data), adamw(model))
    assert_same(model, trained_alone(mlp(*SIZES), data, make_optimizer=adamw))


@some_ranks
def test_mixed_precision(world):
    """FSDP computes in bfloat16 and reduces in float32; each part is exactly as one process computes it in bfloat16."""
    model = shard(
        mlp(*SIZES, dtype=torch.float32),
        mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
    )
    data = batches(4, BATCH, 12, 3, dtype=torch.float32)

    def loss_of(model, batch):  # with one dtype, because torch 2.11 has no gradient of mse_loss for two dtypes
        inputs, targets = batch
        return torch.nn.functional.mse_loss(model(inputs).float(), targets)

    train(model, parts(world, data), loss_of=loss_of)

    expected = mlp(*SIZES, dtype=torch.float32)
    optimizer = sgd(expected)
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
    """A model on the meta device, without memory, gets rank 0's weights as shards."""
    with torch.device("meta"):
        model = mlp(*SIZES)
    shard(model).to_empty(device="cpu")
    whole = mlp(*SIZES).state_dict() if world.rank == 0 else {}
    set_model_state_dict(model, whole, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    assert_same(model, mlp(*SIZES), rtol=0)
    data = batches(2, BATCH, 12, 3)
    train(model, parts(world, data), adamw(model))
    assert_same(model, trained_alone(mlp(*SIZES), data, make_optimizer=adamw))


@some_ranks
def test_accumulation(world):
    """Gradients of two batches are added and then reduced, with weights kept in between, and clipped afterwards."""
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
    """A model can be sharded over pairs of ranks and replicated over the pairs."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = shard(mlp(*SIZES), mesh=mesh)
    assert model[0].weight.to_local().shape == (12, 12)
    data = batches(4, BATCH, 12, 3)
    train(model, parts(world, data), adamw(model))
    assert_same(model, trained_alone(mlp(*SIZES), data, make_optimizer=adamw))


@some_ranks
def test_state_dicts(world):
    """Training continues exactly after a whole state dict was gathered on rank 0 and distributed again."""
    data = batches(4, BATCH, 12, 3)
    model = shard(mlp(*SIZES))
    optimizer = adamw(model)
    train(model, parts(world, data[:2]), optimizer)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    whole = get_model_state_dict(model, options=options)
    of_optimizer = get_optimizer_state_dict(model, optimizer, options=options)
    assert bool(whole) == (world.rank == 0)  # as torch documents it

    resumed = shard(mlp(*SIZES, seed=5))
    optimizer = adamw(resumed)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(resumed, whole, options=options)
    set_optimizer_state_dict(resumed, optimizer, of_optimizer, options=options)
    train(resumed, parts(world, data[2:]), optimizer)
    assert_same(resumed, trained_alone(mlp(*SIZES), data, make_optimizer=adamw))
