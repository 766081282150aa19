# SPDX-License-Identifier: Apache-2.0
"""Ranks that call different BatchNorm modules get one error, which names both, whatever process group they use."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import on_ranks
from small_models import F64, regression_batch, sgd
from torch import nn

from distributed_trainer import MismatchError, create_distributed_trainer


class Net(nn.Module):
    """Model that runs the layers whose numbers are in `calls`; a layer's output is detached if its number is in
    `detached`, so that it has no backward."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) for width in (4, 4, 8)).double()
        self.first, self.last = nn.Linear(4, 8, dtype=F64), nn.Linear(8, 2, dtype=F64)
        self.calls, self.detached = [0, 1, 2], []

    def forward(self, x):
        y = self.first(x)
        for number in self.calls:
            norm = self.norms[number]
            part = norm(y[:, : norm.num_features])
            y = y + F.pad(part.detach() if number in self.detached else part, (0, 8 - norm.num_features))
        return self.last(y)


END = "past its last one in this step"
# By name: what the last rank does instead, and what the error says of rank 0 and of the last rank.
CASES = {
    "same width": ({"calls": [1, 0, 2]}, "in the forward of 'norms.0'", "in the forward of 'norms.1'"),
    "other width": ({"calls": [2, 0, 1]}, "in the forward of 'norms.0'", "in the forward of 'norms.2'"),
    "fewer calls": ({"calls": [0, 1]}, "in the forward of 'norms.2'", "in the backward of 'norms.1'"),
    "more calls": ({"calls": [0, 1, 2, 2]}, "in the backward of 'norms.2'", "in the forward of 'norms.2'"),
    "no calls": ({"calls": []}, "in the forward of 'norms.0'", END),
    "less backward": ({"detached": [0]}, "in the backward of 'norms.0'", END),
    "other backward": ({"detached": [1]}, "in the backward of 'norms.1'", "in the backward of 'norms.0'"),
}


def step(trainer, way, optimizer):
    x, y = regression_batch(8, inputs=4, outputs=2)
    if way == "train_step":
        trainer.train_step(x, y, nn.MSELoss(), optimizer)
        return
    x, y = trainer.split((x, y))
    with trainer.forward():
        loss = F.mse_loss(trainer.model(x), y)
    optimizer.zero_grad()
    trainer.backward(loss, weight=len(x))
    trainer.step(optimizer)


def check(world, way, case, group=None):
    changes, *places = CASES[case]
    if way == "manual-loop" and case in ("fewer calls", "more calls"):  # backward has not begun
        places = [END if "backward" in place else place for place in places]
    model = Net()
    trainer = create_distributed_trainer(model, group=group)
    optimizer = sgd(model)
    step(trainer, way, optimizer)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    last = world.size - 1
    if world.rank == last:
        vars(model).update(changes)
    with pytest.raises(MismatchError) as raised:
        step(trainer, way, optimizer)
    text = str(raised.value)
    assert f": rank 0 is {places[0]}, rank {last} is {places[1]}. " in text
    assert "distributed_trainer.common_random()" in text
    assert set(world.gather(text)) == {text}
    assert all(map(torch.equal, before, model.parameters()))
    trainer.close()


@pytest.mark.parametrize("way", ["train_step", "manual-loop"])
@pytest.mark.parametrize("case", CASES)
@on_ranks(2, (3, 2))
def test_different_calls(world, case, way):
    check(world, way, case)


@pytest.mark.parametrize("case", CASES)
@on_ranks(3)
def test_group_of_torch(world, shared_folder, case):
    """Gloo does not compare lengths, and would end the process."""
    store = dist.FileStore(str(shared_folder / "store"), world.size)
    dist.init_process_group("gloo", store=store, rank=world.rank, world_size=world.size)
    try:
        check(world, "train_step", case, dist.group.WORLD)
    finally:
        dist.destroy_process_group()


def composed(x, weight):
    """Return BatchNorm of x in operations that autograd differentiates any number of times."""
    mean, var = x.mean(0), x.var(0, unbiased=False)
    return (x - mean) * (var + 1e-5).rsqrt() * weight


@on_ranks(2, 3)
def test_third_derivative(world):
    """Torch's own BatchNorm takes its statistics for constants there, so formulas are the reference."""
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(3, track_running_stats=False, dtype=F64)
    nn.init.normal_(norm.weight)
    whole = torch.randn(7, 3, dtype=F64)

    def third(function, x):
        x = x.detach().requires_grad_()
        derivative = function(x).tanh()
        for is_last in (False, False, True):
            (derivative,) = torch.autograd.grad(derivative.square().sum(), x, create_graph=not is_last)
        return derivative

    trainer = create_distributed_trainer(norm)
    x = trainer.split(whole)
    with trainer.forward():
        found = third(norm, x)
    expected = third(lambda x: composed(x, norm.weight), whole)
    torch.testing.assert_close(found, trainer.split(expected), rtol=1e-9, atol=1e-12)
    trainer.close()
