# SPDX-License-Identifier: Apache-2.0
"""Training loops of the user's own, with forward, backward and step: against the same loop on one process."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from ranks import mixed, on_ranks
from test_exactness import F64, Net, NormNet, batch
from test_microbatches import assert_same, sgd
from torch import nn
from torch.distributed.nn.functional import all_gather
from torch.utils.checkpoint import checkpoint

from distributed_trainer import MismatchError, create_distributed_trainer
from distributed_trainer.data import part_bounds

several = on_ranks(2, 3, 4, (3, 2))


def own_loss(trainer, model, x, y, criterion=F.cross_entropy):
    """The loss of this rank's part, and its weight; of the first sample and 0 where the part is empty."""
    own_x, own_y = trainer.split((x, y))
    weight = len(own_y)
    if not weight:
        own_x, own_y = x[:1], y[:1]
    return criterion(model(own_x), own_y), weight


class Steps:
    """A writer that keeps the numbers of steps."""

    def __init__(self):
        self.steps = []

    def log(self, figures, step):
        self.steps.append(step)


@pytest.mark.parametrize("sharded", [False, True], ids=["plain", "sharded"])
@pytest.mark.parametrize("net", [Net, NormNet])
@mixed
def test_loop(world, net, sharded):
    model, reference = net(F64), net(F64)
    trainer = create_distributed_trainer(model, shard_optimizer=sharded)
    trainer.log_to(log := Steps())
    optimizer, plain_optimizer = sgd(model), sgd(reference)
    for step, num_samples in enumerate([12, 7, 9] if net is NormNet else [12, 7, 2, 1]):
        x, y = batch(num_samples, F64, step)
        plain_optimizer.zero_grad()
        expected = F.cross_entropy(reference(x), y)
        expected.backward()
        norm = nn.utils.clip_grad_norm_(reference.parameters(), 0.3)
        plain_optimizer.step()
        with trainer.forward():
            loss, weight = own_loss(trainer, model, x, y)
        optimizer.zero_grad()
        total = trainer.backward(loss, weight=weight)
        torch.testing.assert_close(total, expected.detach(), rtol=1e-11, atol=0)
        assert total.shape == ()
        torch.testing.assert_close(trainer.step(optimizer, clip_norm=0.3), norm, rtol=1e-11, atol=0)
        trainer.log({"own": 1.0})
    assert log.steps == ([*range(1, step + 2)] if world.rank == 0 else [])
    assert_same(model, reference, 1e-10)
    trainer.close()


@mixed
def test_batchnorm_needs_forward(world):
    """Elsewhere its statistics would be those of a part, unsaid."""
    model = NormNet(F64)
    trainer = create_distributed_trainer(model)
    loss, weight = own_loss(trainer, model, *batch(8, F64))
    if world.size == 1:
        trainer.backward(loss, weight=weight)
    else:
        with pytest.raises(ValueError, match=r"with trainer\.forward"):
            trainer.backward(loss, weight=weight)
    trainer.close()


@pytest.mark.parametrize("set_to_none", [True, False])
@mixed
def test_two_losses(world, set_to_none):
    """Gradients of several backwards add up in `.grad`, as in plain torch, however it is cleared."""
    model, reference = Net(F64), Net(F64)
    trainer = create_distributed_trainer(model)
    optimizer, plain_optimizer = sgd(model), sgd(reference)
    for step in range(3):
        plain_optimizer.zero_grad(set_to_none)
        optimizer.zero_grad(set_to_none)
        for x, y in (batch(7, F64, step), batch(5, F64, 100 + step)):
            F.cross_entropy(reference(x), y).backward()
            trainer.backward(*own_loss(trainer, model, x, y))
        for ours, plain in zip(model.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-10, atol=1e-14)
        plain_optimizer.step()
        optimizer.step()  # as good as trainer.step here
    assert_same(model, reference, 1e-10)
    trainer.close()


@pytest.mark.parametrize("sharded", [False, True], ids=["plain", "sharded"])
@mixed
def test_no_sync(world, sharded):
    """Backwards whose gradients are sent once, on top of what `.grad` held."""
    model, reference = Net(F64), Net(F64)
    trainer = create_distributed_trainer(model, shard_optimizer=sharded)
    optimizer, plain_optimizer = sgd(model), sgd(reference)
    for step in range(3):
        plain_optimizer.zero_grad()
        optimizer.zero_grad()
        for number in range(4):
            x, y = batch([7, 2, 9, 6][number], F64, 10 * step + number)
            F.cross_entropy(reference(x), y).backward()
            if number in (1, 2):
                with trainer.no_sync():
                    trainer.backward(*own_loss(trainer, model, x, y))
                    with pytest.raises(ValueError, match="inside no_sync"):
                        trainer.step(optimizer)
            else:
                trainer.backward(*own_loss(trainer, model, x, y))
        plain_optimizer.step()
        trainer.step(optimizer)
    assert_same(model, reference, 1e-10)
    trainer.close()


def mlp(num_inputs, num_hidden, num_outputs):
    first, last = nn.Linear(num_inputs, num_hidden, dtype=F64), nn.Linear(num_hidden, num_outputs, dtype=F64)
    return nn.Sequential(first, nn.Tanh(), last)


def gan(trained, generator, discriminator, optimizers, real, noise):
    """One round of both. `trained` gives (part of a batch, backward for the discriminator, for the generator)."""
    cut, backward_d, backward_g, step_d, step_g = trained
    real, noise = cut(real), cut(noise)
    optimizers[1].zero_grad()
    fake = generator(noise)
    ones, zeros = torch.ones(len(real), 1, dtype=F64), torch.zeros(len(real), 1, dtype=F64)
    loss = F.binary_cross_entropy_with_logits(discriminator(real), ones)
    backward_d(loss + F.binary_cross_entropy_with_logits(discriminator(fake.detach()), zeros))
    step_d(optimizers[1])
    optimizers[0].zero_grad()
    backward_g(F.binary_cross_entropy_with_logits(discriminator(fake), ones))
    step_g(optimizers[0])


@pytest.mark.parametrize("num_trainers", [1, 2])
@mixed
def test_gan(world, num_trainers):
    """Two models and two optimizers, with a trainer for each or one for both."""
    torch.manual_seed(0)
    pair = nn.ModuleDict({"g": mlp(3, 8, 2), "d": mlp(2, 8, 1)})
    reference = copy.deepcopy(pair)
    make = [lambda m: torch.optim.Adam(m.parameters(), lr=0.01), lambda m: torch.optim.SGD(m.parameters(), lr=0.1)]
    plain_optimizers = [make[0](reference["g"]), make[1](reference["d"])]
    optimizers = [make[0](pair["g"]), make[1](pair["d"])]
    if num_trainers == 1:
        trainer_g = trainer_d = create_distributed_trainer(pair)
    else:
        trainer_g, trainer_d = create_distributed_trainer(pair["g"]), create_distributed_trainer(pair["d"])

    def plain_step(optimizer):
        optimizer.step()

    for step in range(5):
        generator = torch.Generator().manual_seed(step)
        real, noise = (torch.randn(7, n, generator=generator, dtype=F64) for n in (2, 3))
        plain = (lambda x: x, torch.Tensor.backward, torch.Tensor.backward, plain_step, plain_step)
        gan(plain, reference["g"], reference["d"], plain_optimizers, real, noise)
        weight = len(trainer_d.split(real))
        ours = (
            trainer_d.split,
            lambda loss, weight=weight: trainer_d.backward(loss, weight=weight),
            lambda loss, weight=weight: trainer_g.backward(loss, weight=weight),
            trainer_d.step,
            trainer_g.step,
        )
        gan(ours, pair["g"], pair["d"], optimizers, real, noise)
    assert_same(pair, reference, 1e-10)
    for trainer in dict.fromkeys([trainer_g, trainer_d]):  # in one order on all ranks
        trainer.close()


@mixed
def test_gradient_penalty(world):
    """Double backward: the loss holds a gradient."""
    torch.manual_seed(0)
    model = mlp(3, 8, 1)
    reference = copy.deepcopy(model)
    trainer = create_distributed_trainer(model)

    def penalised(net, x):
        x = x.clone().requires_grad_()
        output = net(x)
        (slope,) = torch.autograd.grad(output.sum(), x, create_graph=True)
        return output.mean() + (slope.norm(dim=1) - 1).square().mean()

    optimizer, plain_optimizer = sgd(model), sgd(reference)
    for step in range(3):
        x = torch.randn(7, 3, generator=torch.Generator().manual_seed(step), dtype=F64)
        plain_optimizer.zero_grad()
        penalised(reference, x).backward()
        plain_optimizer.step()
        part = trainer.split(x)
        optimizer.zero_grad()
        with trainer.forward():
            loss = penalised(model, part)
        trainer.backward(loss, weight=len(part))
        trainer.step(optimizer)
    assert_same(model, reference, 1e-10)
    trainer.close()


@mixed
def test_lbfgs(world):
    model, reference = Net(F64), Net(F64)
    trainer = create_distributed_trainer(model)
    x, y = batch(12, F64)
    optimizer, plain_optimizer = (
        torch.optim.LBFGS(net.parameters(), max_iter=5, line_search_fn="strong_wolfe") for net in (model, reference)
    )

    def plain_closure():
        plain_optimizer.zero_grad()
        loss = F.cross_entropy(reference(x), y)
        loss.backward()
        return loss

    def closure():
        optimizer.zero_grad()
        return trainer.backward(*own_loss(trainer, model, x, y))

    for _ in range(2):
        plain_optimizer.step(plain_closure)
        trainer.step(optimizer, closure)
    assert_same(model, reference, 1e-8)
    with pytest.raises(ValueError, match="clip inside of the closure"):
        trainer.step(optimizer, closure, clip_norm=1.0)
    trainer.close()


@mixed
def test_grad_scaler(world):
    """All ranks skip the step in which one part of the batch overflows float16's scale, and go on alike."""
    model, reference = Net(torch.float32), Net(torch.float32)
    trainer = create_distributed_trainer(model)
    optimizer, plain_optimizer = sgd(model), sgd(reference)
    scaler, plain_scaler = (torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2) for _ in range(2))
    for step in range(5):
        x, y = batch(8, torch.float32, step)
        if step == 2:
            x[6] = torch.inf
        plain_optimizer.zero_grad()
        plain_scaler.scale(F.cross_entropy(reference(x), y)).backward()
        plain_scaler.step(plain_optimizer)
        plain_scaler.update()
        optimizer.zero_grad()
        loss, weight = own_loss(trainer, model, x, y)
        trainer.backward(scaler.scale(loss), weight=weight)
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == plain_scaler.get_scale()
    assert scaler.get_scale() != 2.0**10
    assert_same(model, reference, 1e-5)
    trainer.close()


@on_ranks(1, 2)
def test_step_without_closure(world):
    """An optimizer of one's own, whose step() takes nothing."""

    class Plain(torch.optim.SGD):
        def step(self):
            super().step()

    trainer = create_distributed_trainer(model := Net(F64))
    before = copy.deepcopy(model)
    trainer.train_step(*batch(8, F64), nn.CrossEntropyLoss(), Plain(model.parameters(), lr=0.1))
    assert not torch.equal(model.conv.weight, before.conv.weight)
    trainer.close()


@mixed
def test_sum(world):
    """weight=None adds the ranks' losses."""
    model, reference = Net(F64), Net(F64)
    trainer = create_distributed_trainer(model)
    x, y = batch(8, F64)
    expected = F.cross_entropy(reference(x), y, reduction="sum")
    expected.backward()
    part_x, part_y = trainer.split((x, y))
    total = trainer.backward(F.cross_entropy(model(part_x), part_y, reduction="sum"), weight=None)
    torch.testing.assert_close(total, expected.detach(), rtol=1e-12, atol=0)
    for ours, plain in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-11, atol=1e-14)
    trainer.close()


class Words(nn.Module):
    """An embedding with sparse gradients; one that only some samples look at; a dense layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(10, 4, sparse=True, dtype=F64)
        self.rare = nn.Embedding(10, 4, sparse=True, dtype=F64)
        self.linear = nn.Linear(4, 2, dtype=F64)

    def forward(self, x):
        words = self.words(x)
        return self.linear(words + self.rare(x) if (x == 9).any() else words)


@pytest.mark.parametrize("kind", ["SGD", "Adagrad", "SparseAdam"])
@on_ranks(1, 2, (3, 2))
def test_sparse_gradients(world, kind):
    """They stay sparse, as optimizers for such ones want, on ranks without samples and without a gradient, too."""
    model, reference = Words(), Words()
    trainer = create_distributed_trainer(model, nonfinite_gradients="skip")
    trained = slice(0, 2) if kind == "SparseAdam" else slice(None)
    make = functools.partial(getattr(torch.optim, kind), lr=0.1)
    optimizer, plain_optimizer = (make([*net.parameters()][trained]) for net in (model, reference))
    for step, num_samples in enumerate([7, 7, 12, 2]):
        x = (torch.arange(num_samples) * (step + 3)) % 9
        x[0] = 9 if step != 1 else 0
        y = x % 2
        pieces = [part_bounds(num_samples, number, min(1 + step, num_samples)) for number in range(1 + step)]
        plain_optimizer.zero_grad()
        for start, stop in pieces:
            for rank in range(world.size):
                first, last = (start + bound for bound in part_bounds(stop - start, rank, world.size))
                if last > first:  # each part by itself decides whether it looks at `rare`
                    total = F.cross_entropy(reference(x[first:last]), y[first:last], reduction="sum") / num_samples
                    total.backward()
        plain_optimizer.step()
        trainer.train_step(x, y, nn.CrossEntropyLoss(), optimizer, microbatches=1 + step)
        assert model.words.weight.grad.is_sparse
        assert (model.rare.weight.grad is None) == (reference.rare.weight.grad is None)
    assert_same(model, reference, 1e-11)
    weight = torch.nan if world.rank == world.size - 1 else 1.0  # a NaN in one rank's rows alone
    before = copy.deepcopy(model)
    optimizer.zero_grad()
    trainer.backward(weight * F.cross_entropy(model(x), y), weight=1.0)
    trainer.step(optimizer)
    assert trainer.num_skipped_steps == 1
    assert_same(model, before, 0)
    trainer.close()


class Checkpointed(Net):
    """Forward runs again in backward."""

    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


@pytest.mark.parametrize("kind", ["plain", "checkpointed", "compiled"])
@pytest.mark.parametrize("loop", ["own loop", "train_step"])
@on_ranks(2, (3, 2))
def test_long_loop(world, kind, loop):
    """Parameter groups, a scheduler, and a layer that is frozen for some steps in the middle."""
    model, reference = (Checkpointed if kind == "checkpointed" else Net)(F64), Net(F64)
    trainer = create_distributed_trainer(model)
    net = torch.compile(model, backend="aot_eager") if kind == "compiled" else model
    optimizers, schedulers = [], []
    for other in (model, reference):
        groups = [{"params": [*other.conv.parameters()]}, {"params": [*other.linear.parameters()], "lr": 0.01}]
        optimizers.append(torch.optim.AdamW(groups, lr=0.05))
        schedulers.append(torch.optim.lr_scheduler.StepLR(optimizers[-1], 2, gamma=0.5))
    for step in range(6):
        for other in (model, reference):
            other.conv.requires_grad_(step not in (2, 3))
        x, y = batch(8, F64, step)
        optimizers[1].zero_grad()
        F.cross_entropy(reference(x), y).backward()
        optimizers[1].step()
        if loop == "train_step":
            if kind == "compiled" and step == 0:
                trainer.close()
                trainer = create_distributed_trainer(net)
            trainer.train_step(x, y, nn.CrossEntropyLoss(), optimizers[0])
        else:
            with trainer.forward():
                loss, weight = own_loss(trainer, net, x, y)
            optimizers[0].zero_grad()
            trainer.backward(loss, weight=weight)
            trainer.step(optimizers[0])
        for scheduler in schedulers:
            scheduler.step()
    assert_same(model, reference, 1e-8)
    trainer.close()


def contrastive(own, targets, gather=lambda tensor: tensor):
    """Every sample against every other of the batch, of which `gather` brings those of other ranks."""
    everyone, labels = gather(own), gather(targets)
    similarity = F.normalize(own) @ F.normalize(everyone).t()
    return F.binary_cross_entropy_with_logits(similarity, (targets[:, None] == labels).to(F64))


@on_ranks(1, 2, (3, 2))
def test_contrastive(world, group):
    """A loss that cannot be split: each rank compares its samples with all, and gradients go back to their ranks."""
    model, reference = NormNet(F64), NormNet(F64)
    trainer = create_distributed_trainer(model)
    optimizer, plain_optimizer = sgd(model), sgd(reference)
    for step in range(3):
        x, y = batch(4 * world.size, F64, step)
        plain_optimizer.zero_grad()
        expected = contrastive(reference(x), y)
        expected.backward()
        plain_optimizer.step()
        own_x, own_y = trainer.split((x, y))
        with trainer.forward():
            loss = contrastive(model(own_x), own_y, lambda tensor: torch.cat(all_gather(tensor)))
        optimizer.zero_grad()
        total = trainer.backward(loss, weight=len(own_y))
        trainer.step(optimizer)
        torch.testing.assert_close(total, expected.detach(), rtol=1e-11, atol=0)
    assert_same(model, reference, 1e-9)
    trainer.close()


@several
def test_nonfinite(world):
    """Of any backward since the last step."""
    model = Net(F64)
    trainer = create_distributed_trainer(model, nonfinite_gradients="raise")
    optimizer = sgd(model)
    before = copy.deepcopy(model)
    x, y = batch(8, F64)
    loss, weight = own_loss(trainer, model, x, y)
    trainer.backward(loss * (torch.nan if world.rank == 1 else 1), weight=weight)
    optimizer.zero_grad()
    trainer.backward(*own_loss(trainer, model, x, y))
    with pytest.raises(FloatingPointError, match="infinite or NaN"):
        trainer.step(optimizer)
    assert_same(model, before, 0)
    trainer.step(optimizer)
    trainer.close()


@several
def test_misuse(world):
    model = Net(F64)
    trainer = create_distributed_trainer(model)
    loss, _ = own_loss(trainer, model, *batch(8, F64))
    for wrong, kind, text in [
        ((loss, -1.0), ValueError, "weight must be finite and not negative"),
        ((loss, float("nan")), ValueError, "weight must be finite"),
        ((torch.zeros(3), 1.0), TypeError, r"one element, not a tensor of shape \[3\]"),
        ((1.0, 1.0), TypeError, "one element, not 1.0"),
        ((loss, 0), ValueError, "weight is 0 on every rank"),
    ]:
        with pytest.raises(kind, match=text):
            trainer.backward(*wrong)
    with pytest.raises(MismatchError, match="weight=None to backward"):
        trainer.backward(loss, weight=None if world.rank else 1.0)
    trainer.backward(loss, weight=1.0)
    trainer.close()
    with pytest.raises(ValueError, match="was closed"):
        trainer.backward(loss, weight=1.0)
