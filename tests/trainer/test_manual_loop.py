# SPDX-License-Identifier: Apache-2.0
"""Training loops of the user, with forward, backward and step, compared with the same loop in one process."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from one_process import assert_same
from ranks import mixed, on_ranks, same_message
from small_models import F64, Net, NormNet, batch, mlp, own_loss, sgd
from torch import nn
from torch.distributed.nn.functional import all_gather
from torch.utils.checkpoint import checkpoint

from distributed_trainer import MismatchError, create_distributed_trainer
from distributed_trainer.data.split import part_bounds

several = on_ranks(2, 3, 4, (3, 2))


class Steps:
    """Writer that keeps the numbers of the steps."""

    def __init__(self):
        self.steps = []

    def log(self, figures, step):
        self.steps.append(step)


@pytest.mark.parametrize("sharded", [False, True], ids=["plain", "sharded"])
@pytest.mark.parametrize("net", [Net, NormNet])
@mixed
def test_loop(world, net, sharded):
    model, reference = net(F64), net(F64)
    trainer = create_distributed_trainer(model, shard="optimizer" if sharded else None)
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


@several
def test_nan_of_an_empty_part(world):
    """The mean over an empty part is NaN, and with weight 0 it counts for nothing."""
    model, reference = Net(F64), Net(F64)
    trainer = create_distributed_trainer(model)
    optimizer, plain_optimizer = sgd(model), sgd(reference)
    for step in range(3):
        x, y = batch(world.size - 1, F64, step)
        expected = F.cross_entropy(reference(x), y)
        expected.backward()
        with trainer.forward():
            own_x, own_y = trainer.split((x, y))
            samples = x[:1] if len(own_x) == 0 else own_x
            losses = F.cross_entropy(model(samples), y[:1] if len(own_x) == 0 else own_y, reduction="none")
            loss = losses.sum() / len(own_x) if len(own_x) else losses.sum() * float("nan")
        total = trainer.backward(loss, weight=len(own_x))
        torch.testing.assert_close(total, expected.detach(), rtol=1e-11, atol=0)
        trainer.step(optimizer)
        plain_optimizer.step()
        optimizer.zero_grad()
        plain_optimizer.zero_grad()
    assert_same(model, reference, 1e-10)
    trainer.close()


@mixed
def test_batchnorm_needs_forward(world):
    """Outside of trainer.forward(), BatchNorm would use a part's statistics without a warning, so this is an error."""
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
    """Gradients of several backwards add up in `.grad`, as in plain torch, with both ways of clearing it."""
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
        optimizer.step()  # here the same as trainer.step
    assert_same(model, reference, 1e-10)
    trainer.close()


@pytest.mark.parametrize("sharded", [False, True], ids=["plain", "sharded"])
@mixed
def test_no_sync(world, sharded):
    """Gradients of several backwards are sent once, and added to the present `.grad`."""
    model, reference = Net(F64), Net(F64)
    trainer = create_distributed_trainer(model, shard="optimizer" if sharded else None)
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


def gan(trained, generator, discriminator, optimizers, real, noise):
    """Train both models for one step. `trained`: how to cut a batch, both backwards, both steps."""
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
    """Two models and two optimizers train with one trainer each, or with one trainer for both."""
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
    for trainer in dict.fromkeys([trainer_g, trainer_d]):  # in the same order on all ranks
        trainer.close()


@mixed
def test_gradient_penalty(world):
    """The loss contains a gradient (double backward)."""
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
    """All ranks skip the step in which a part of the batch overflows float16's scale, and continue in the same way."""
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
    """The user's optimizer has a step() without arguments."""

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
    """With weight=None the ranks' losses are added."""
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
    """An embedding with sparse gradients; an embedding that only some samples use; a dense layer."""

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
    """Gradients stay sparse for optimizers that need this, also on ranks without samples and without a gradient."""
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
                if last > first:  # `rare` is used or not in each part by itself
                    total = F.cross_entropy(reference(x[first:last]), y[first:last], reduction="sum") / num_samples
                    total.backward()
        plain_optimizer.step()
        trainer.train_step(x, y, nn.CrossEntropyLoss(), optimizer, microbatches=1 + step)
        assert model.words.weight.grad.is_sparse
        assert (model.rare.weight.grad is None) == (reference.rare.weight.grad is None)
    assert_same(model, reference, 1e-11)
    weight = torch.nan if world.rank == world.size - 1 else 1.0  # a NaN in the rows of one rank alone
    before = copy.deepcopy(model)
    optimizer.zero_grad()
    trainer.backward(weight * F.cross_entropy(model(x), y), weight=1.0)
    trainer.step(optimizer)
    assert trainer.num_skipped_steps == 1
    assert_same(model, before, 0)
    trainer.close()


class Checkpointed(Net):
    """Run forward again in backward."""

    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


@pytest.mark.parametrize("kind", ["plain", "checkpointed", "compiled"])
@pytest.mark.parametrize("loop", ["own loop", "train_step"])
@on_ranks(2, (3, 2))
def test_long_loop(world, kind, loop):
    """The loop has parameter groups, a scheduler, and a layer that is frozen for some steps in the middle."""
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
    """Compare every sample with all samples of the batch; `gather` returns the samples of all ranks."""
    everyone, labels = gather(own), gather(targets)
    similarity = F.normalize(own) @ F.normalize(everyone).t()
    return F.binary_cross_entropy_with_logits(similarity, (targets[:, None] == labels).to(F64))


@on_ranks(1, 2, (3, 2))
def test_contrastive(world, group):
    """A loss over pairs of samples: each rank compares its samples with all, and gradients return to their ranks."""
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
    """step() finds a value that is not finite in any backward since the last step."""
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
    for clip_norm in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="clip_norm must be above 0"):
            trainer.step(sgd(model), clip_norm=clip_norm)
    trainer.close()
    with pytest.raises(ValueError, match="was closed"):
        trainer.backward(loss, weight=1.0)


@pytest.mark.parametrize("net", [Net, NormNet])
@mixed
def test_one_graph_twice(world, net):
    """Several backwards of one graph add up, also those of some parameters only."""
    model, reference = net(F64), net(F64)
    trainer = create_distributed_trainer(model)
    optimizer, plain_optimizer = sgd(model), sgd(reference)
    for step in range(3):
        x, y = batch(3 * world.size + 1, F64, step)
        plain_optimizer.zero_grad()
        outputs = reference(x)
        F.cross_entropy(outputs, y).backward(retain_graph=True)
        outputs.square().mean().backward(inputs=[reference.conv.weight])
        own_x, own_y = trainer.split((x, y))
        with trainer.forward():
            outputs = model(own_x)
            losses = F.cross_entropy(outputs, own_y), outputs.square().mean()
        optimizer.zero_grad()
        trainer.backward(losses[0], weight=len(own_y), retain_graph=True)
        trainer.backward(losses[1], weight=len(own_y), inputs=model.conv.weight)
        plain_optimizer.step()
        trainer.step(optimizer)
    assert_same(model, reference, 1e-10)
    trainer.close()


@mixed
def test_create_graph(world):
    """A sum over ranks has no graph; one rank's gradient has."""
    model = Net(F64)
    trainer = create_distributed_trainer(model)
    loss, weight = own_loss(trainer, model, *batch(8, F64))
    if world.size == 1:
        (parameter,) = [model.linear.bias]
        trainer.backward(loss, weight=weight, create_graph=True, inputs=parameter)
        assert parameter.grad.requires_grad
    else:
        with pytest.raises(ValueError, match=r"create_graph=True needs one rank"):
            trainer.backward(loss, weight=weight, create_graph=True)
    trainer.close()


@several
def test_batches_that_differ(world):
    """Batches given to `split` are compared by the next backward, as they were then; parts may be written to."""
    model = mlp(6, 3)
    trainer = create_distributed_trainer(model)
    optimizer = sgd(model)

    def step(*batches):
        optimizer.zero_grad()
        parts = [trainer.split(one) for one in batches]
        for part in parts:
            part.add_(world.rank)  # such as noise of this rank's own
        trainer.backward(sum(model(part).square().sum() for part in parts), weight=None)
        trainer.step(optimizer)

    def inputs(seed):
        return torch.randn(9, 6, dtype=F64, generator=torch.Generator().manual_seed(seed))

    step(inputs(0), inputs(1))
    before = copy.deepcopy(model.state_dict())
    for batches in [(inputs(2 + world.rank),), (inputs(2), inputs(3 + world.rank), inputs(4))]:
        with pytest.raises(MismatchError, match="batch") as raised:
            step(*batches)
        same_message(world, raised)
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    step(inputs(5))
    if world.rank == 0:
        trainer.split(inputs(6))  # just to look at it
    step(inputs(7))
    if world.rank == 0:
        trainer.split(inputs(8))  # a batch that this rank alone skips
    with pytest.raises(MismatchError, match="batch") as raised:
        step(inputs(9) if world.rank == 0 else inputs(8))
    same_message(world, raised)
    trainer.close()


@several
def test_weight_0_with_batchnorm(world):
    """Forward has counted the samples in the statistics, so they cannot be left out of backward."""
    model = NormNet(F64)
    trainer = create_distributed_trainer(model)
    x, y = batch(2 * world.size, F64)
    with trainer.forward():
        loss = F.cross_entropy(model(trainer.split(x)), trainer.split(y))
    with pytest.raises(ValueError, match="weight=0 does not go with BatchNorm in training") as raised:
        trainer.backward(loss, weight=float(world.rank > 0))
    same_message(world, raised)
    trainer.close()


@several
def test_no_graph_and_no_outputs(world):
    """Without the model's outputs a rank cannot take part in BatchNorm's backward, which every rank is told."""
    model = NormNet(F64)
    trainer = create_distributed_trainer(model)
    x, y = batch(8, F64)
    with trainer.forward():
        outputs = model.forward(x)
    loss = F.cross_entropy(outputs, y) if world.rank else torch.zeros((), dtype=F64)
    with pytest.raises(ValueError, match=r"the loss of rank 0 has no graph, and the model was not called as a whole"):
        trainer.backward(loss, weight=1)
    trainer.close()
