# SPDX-License-Identifier: Apache-2.0
"""Mixed precision, GradScaler and 16-bit parameters on several ranks, compared with one process."""

import contextlib
import copy
import logging
import warnings

import pytest
import torch
import torch.nn.functional as F
from internals import session_of
from one_process import assert_same, relative_difference
from ranks import mixed, on_ranks, same_message
from small_models import Net, batch, own_loss, sgd
from torch import nn

from distributed_trainer import PowerSGD, create_distributed_trainer
from distributed_trainer.gradients import loss_scale

some = on_ranks(1, 2, 3, (4, 2))
several = on_ranks(2, 3, (3, 2))
F32 = torch.float32
MEAN = nn.MSELoss()


def scale_of(trainer):
    return session_of(trainer).progress.loss_scale


def integers(step, seed=0, num_samples=8):
    """Return a batch of small integers. Their gradients are exact in 16 bits, whatever the parts of the batch."""
    generator = torch.Generator().manual_seed(100 * seed + step)
    return tuple(torch.randint(-1, 2, (num_samples, size), generator=generator).float() for size in (4, 2))


class Line(nn.Linear):
    """Linear layer whose weights are small integers."""

    def __init__(self):
        super().__init__(4, 2)
        torch.manual_seed(0)
        self.round(torch.randn(2, 4), torch.randn(2))

    @torch.no_grad()
    def round(self, weight=None, bias=None):
        self.weight.copy_((self.weight if weight is None else weight).round().clamp(-2, 2))
        self.bias.copy_((self.bias if bias is None else bias).round().clamp(-2, 2))


class OneProcess:
    """Plain torch with the usual recipe: autocast around model and criterion, and a GradScaler for float16."""

    def __init__(self, model, optimizer, precision, scale, growth_interval):
        self.model, self.optimizer, self.dtype = model, optimizer, getattr(torch, precision)
        self.scaler = torch.amp.GradScaler(
            "cpu", init_scale=scale, growth_interval=growth_interval, enabled=precision == "float16"
        )

    def step(self, x, y, criterion=MEAN, clip_norm=None):
        """Make a step; return the loss, and the norm of the gradients before clipping."""
        self.optimizer.zero_grad()
        with torch.autocast("cpu", self.dtype):
            loss = criterion(self.model(x), y)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        norm = clip_norm and nn.utils.clip_grad_norm_(self.model.parameters(), clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.detach(), norm


def whole_step(trainer, model, optimizer, x, y, clip_norm, **options):
    return trainer.train_step(x, y, MEAN, optimizer, clip_norm=clip_norm, **options), trainer.gradient_norm


def own_step(trainer, model, optimizer, x, y, clip_norm, num_backwards=1, num_exchanges=1):
    """Make a step in a loop of one's own, with the batch in halves if there are two backwards."""
    optimizer.zero_grad()
    total = 0
    for number, (part_x, part_y) in enumerate(zip(x.chunk(num_backwards), y.chunk(num_backwards), strict=True), 1):
        is_held = number <= num_backwards - num_exchanges
        with trainer.no_sync() if is_held else contextlib.nullcontext():
            with trainer.forward():
                loss, weight = own_loss(trainer, model, part_x, part_y, MEAN)
            total += trainer.backward(loss / num_backwards, weight=weight)
    return total, trainer.step(optimizer, clip_norm=clip_norm)


KINDS = {
    "whole batch": (whole_step, {}, {}),
    "microbatches": (whole_step, {}, {"microbatches": 3}),
    "sharded": (whole_step, {"shard": "optimizer"}, {}),
    "reproducible": (whole_step, {"reproducible": 4}, {}),
    "float16 on the wire": (whole_step, {"compression": "float16"}, {}),
    "own loop": (own_step, {}, {}),
    "no_sync": (own_step, {"nonfinite_gradients": "skip"}, {"num_backwards": 2}),
    "two exchanges": (own_step, {}, {"num_backwards": 2, "num_exchanges": 2}),
}


@pytest.mark.parametrize(
    ("kind", "precision"),
    [*((kind, "float16") for kind in KINDS), *((kind, "bfloat16") for kind in ("whole batch", "own loop"))],
)
@mixed
def test_as_one_process(world, monkeypatch, kind, precision):
    """Steps, skipped steps and the loss scale are those of torch's recipe; the last sample overflows on one rank."""
    step_of, options, step_options = KINDS[kind]
    monkeypatch.setattr(loss_scale, "GROWTH_INTERVAL", 3)
    model, reference = Line(), Line()
    trainer = create_distributed_trainer(model, precision=precision, **options)
    scale_of(trainer).value = 2.0**10
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    plain = OneProcess(reference, torch.optim.SGD(reference.parameters(), lr=0.5), precision, 2.0**10, 3)
    scales = []
    for step in range(10):
        x, y = integers(step)
        is_skipped = precision == "float16" and step in (3, 8)
        if is_skipped:
            y[-1] = 1e4
        before = copy.deepcopy(model)
        clip_norm = 1.0 if step % 2 else None
        expected, expected_norm = plain.step(x, y, clip_norm=clip_norm)
        loss, norm = step_of(trainer, model, optimizer, x, y, clip_norm, **step_options)
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
        assert_same(model, before if is_skipped else reference, 1e-6)
        if not is_skipped and clip_norm is not None:
            torch.testing.assert_close(norm, expected_norm, rtol=1e-6, atol=0)
        if not is_skipped and "shard" not in options:
            grads = ({n: p.grad for n, p in net.named_parameters()} for net in (model, reference))
            assert_same(*grads, 1e-6)
        assert all(parameter.dtype == F32 for parameter in model.parameters())
        scales.append(scale_of(trainer).value)
        if precision == "float16":
            assert scales[-1] == plain.scaler.get_scale()
        world.comm.barrier()  # ranks share the weights with shard="optimizer"
        model.round()
        reference.round()
        world.comm.barrier()
    grown = [2.0**10] * 2 + [2.0**11] + [2.0**10] * 3 + [2.0**11] * 2 + [2.0**10] * 2
    assert scales == (grown if precision == "float16" else [2.0**10] * 10)
    assert trainer.num_skipped_steps == (2 if precision == "float16" else 0)
    trainer.close()


@mixed
def test_first_overflows(world, caplog):
    """The scale begins high, and falls without a warning until gradients no longer overflow."""
    model, reference = Line(), Line()
    trainer = create_distributed_trainer(model, precision="float16")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    plain = OneProcess(reference, torch.optim.SGD(reference.parameters(), lr=0.01), "float16", 2.0**16, 2000)
    scales = []
    with caplog.at_level(logging.WARNING, logger="distributed_trainer"):
        for step in range(6):
            x, y = integers(step)
            y[step] = 200.0
            trainer.train_step(x, y, MEAN, optimizer)
            plain.step(x, y)
            scales.append(scale_of(trainer).value)
            assert scales[-1] == plain.scaler.get_scale()
    assert scales == [2.0**15, 2.0**14, 2.0**13, 2.0**12, 2.0**11, 2.0**11]
    assert trainer.num_skipped_steps == 5
    assert not [record for record in caplog.records if "NaN" in record.getMessage()]
    assert_same(model, reference, 1e-5)
    trainer.close()


class Infinite:
    """Criterion whose gradients are not finite where a target is above 50, on the rank that has it."""

    reduction = "mean"

    def __call__(self, outputs, targets):
        return MEAN(outputs, targets) * (torch.inf if (targets > 50).any() else 1.0)


@pytest.mark.parametrize("policy", ["ignore", "skip", "raise"])
@several
def test_not_the_scale(world, caplog, policy):
    """A gradient that is infinite at scale 1 is reported: by one warning, or an error on every rank in each step."""
    model = Line()
    trainer = create_distributed_trainer(model, precision="float16", nonfinite_gradients=policy)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scale_of(trainer).value = 4.0
    x, y = integers(0)
    y[-1] = 100.0
    before = copy.deepcopy(model)
    text = "the gradient of weight is infinite or NaN, so no parameter was changed. The loss scale has fallen to 1"
    with caplog.at_level(logging.WARNING, logger="distributed_trainer"):
        for step in range(1, 6):
            is_raised = policy == "raise" and step > 2
            with (
                pytest.raises(FloatingPointError, match=f"step {step}: {text}")
                if is_raised
                else warnings.catch_warnings()
            ):
                trainer.train_step(x, y, Infinite(), optimizer)
            assert scale_of(trainer).value == max(1.0, 4.0 / 2**step)
    messages = [record.getMessage() for record in caplog.records if "NaN" in record.getMessage()]
    assert len(messages) == (policy != "raise" and world.rank == 0)
    assert all(message.startswith(f"step 3: {text}") for message in messages)
    assert trainer.num_skipped_steps == (2 if policy == "raise" else 5)
    assert_same(model, before, 0)
    trainer.train_step(*integers(1), MEAN, optimizer)
    assert not torch.equal(model.weight, before.weight)
    trainer.close()


@pytest.mark.parametrize(
    ("kind", "precision"),
    [("around the step", "bfloat16"), ("train_step", "bfloat16"), ("train_step", "float16"), ("own loop", "float16")],
)
@some
def test_rounding(world, kind, precision):
    """The samples that a rank multiplies together change the rounding of products, and nothing else."""
    model, reference = Net(F32), Net(F32)
    dtype = getattr(torch, precision)
    trainer = create_distributed_trainer(model, precision=None if kind == "around the step" else precision)
    optimizer, plain_optimizer = sgd(model), sgd(reference)
    for step in range(4):
        x, y = batch(12, F32, step)
        plain_optimizer.zero_grad()
        with torch.autocast("cpu", dtype):
            expected = F.cross_entropy(reference(x), y)
        expected.backward()
        plain_optimizer.step()
        if kind == "own loop":
            with trainer.forward():
                loss, weight = own_loss(trainer, model, x, y)
            optimizer.zero_grad()
            loss = trainer.backward(loss, weight=weight)
            trainer.step(optimizer)
        else:
            with torch.autocast("cpu", dtype) if kind == "around the step" else contextlib.nullcontext():
                loss = trainer.train_step(x, y, nn.CrossEntropyLoss(), optimizer)
        torch.testing.assert_close(loss, expected.detach(), rtol=2e-2, atol=0)
    assert trainer.num_skipped_steps == 0
    for (name, parameter), other in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert parameter.dtype == F32
        assert relative_difference(parameter.detach(), other.detach()) < 1e-2, name
    trainer.close()


class Where(nn.Module):
    """Linear layer that notes where autocast is on: in forward, backward, criterion, metric, optimizer."""

    def __init__(self):
        super().__init__()
        self.line = Line()
        self.seen = {}

    def note(self, place):
        is_on = torch.is_autocast_enabled("cpu")
        self.seen.setdefault(place, set()).add(torch.get_autocast_dtype("cpu") if is_on else None)

    def forward(self, x):
        self.note("forward")
        x = self.line(x)
        if x.requires_grad:
            x.register_hook(lambda _: self.note("backward"))
        return x

    def criterion(self, outputs, targets):
        self.note("criterion")
        return MEAN(outputs, targets)

    def metric(self, outputs, targets):
        self.note("metric")
        return (outputs - targets).abs().mean(1)


@pytest.mark.parametrize("outer", [None, torch.bfloat16], ids=str)
@on_ranks(1, 3)
def test_where(world, outer):
    """Autocast is on in forward and criterion alone; inside of the script's own block, precision counts there."""
    model = Where()
    trainer = create_distributed_trainer(model, precision="float16")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    optimizer.register_step_pre_hook(lambda *_: model.note("optimizer"))
    trainer.on_gradient(model.line.weight, lambda _: model.note("sum"))
    with torch.autocast("cpu", outer) if outer else contextlib.nullcontext():
        trainer.train_step(*integers(0, num_samples=3), model.criterion, optimizer)
        with trainer.forward():
            loss = model.criterion(*model_and_targets(trainer, model))
        trainer.backward(loss, weight=1.0)
        trainer.step(optimizer)
        result = trainer.evaluate([integers(0, num_samples=3)], model.criterion, {"error": model.metric})
    on = {torch.float16}
    assert model.seen == {
        **dict.fromkeys(["forward", "criterion"], on),
        **{place: {outer} for place in ("backward", "sum", "optimizer", "metric")},
    }
    assert set(result) == {"loss", "error"}
    trainer.close()


def model_and_targets(trainer, model):
    x, y = trainer.split(integers(1, num_samples=3))
    return model(x), y


@mixed
def test_who_sees_what(world):
    """Functions of on_gradient, inputs and `.grad` of before a backward have no scale in them."""
    model, reference = Line(), Line()
    trainer = create_distributed_trainer(model, precision="float16")
    scale_of(trainer).value = 2.0**10
    seen = []
    handle = trainer.on_gradient(model.weight, lambda gradient: seen.append(gradient.clone()))
    for step in range(3):
        x, y = (tensor.requires_grad_(step < 2) for tensor in integers(step))
        with torch.autocast("cpu", torch.float16):
            expected = MEAN(reference(x), y)
        reference.weight.grad, before = None, reference.weight.grad
        expected.backward()
        own_x = trainer.split(x.detach()).requires_grad_(step < 2)
        own_y = trainer.split(y.detach())
        for tensor in (own_x, x):
            tensor.grad = torch.ones_like(tensor) if step == 1 else tensor.grad
        with trainer.forward():
            loss = MEAN(model(own_x), own_y)
        inputs = [own_x, *model.parameters()] if step == 1 else None
        trainer.backward(loss, weight=len(own_y), inputs=inputs)
        if step < 2:
            torch.testing.assert_close(seen.pop(), reference.weight.grad, rtol=1e-6, atol=0)
        if before is not None:
            reference.weight.grad += before
        torch.testing.assert_close(model.weight.grad, reference.weight.grad, rtol=1e-6, atol=0)
        torch.testing.assert_close(model.bias.grad, reference.bias.grad, rtol=1e-6, atol=0)
        if step == 0:
            torch.testing.assert_close(own_x.grad, trainer.split(x.grad), rtol=1e-6, atol=0)
        if step == 1:
            handle.remove()
    trainer.close()


@pytest.mark.parametrize("options", [{"precision": "float16"}, {"nonfinite_gradients": "skip"}], ids=str)
@mixed
def test_two_optimizers(world, options):
    """If a sum is not finite, every optimizer that steps on these sums skips; the scale changes once."""
    model = Line()
    trainer = create_distributed_trainer(model, **options)
    scale_of(trainer).value = 2.0**10
    optimizers = [torch.optim.SGD([parameter], lr=0.5) for parameter in model.parameters()]
    for step in range(4):
        x, y = integers(step)
        if step == 1:
            y[-1] = torch.inf
        for optimizer in optimizers:
            optimizer.zero_grad()
        before = copy.deepcopy(model)
        with trainer.forward():
            loss, weight = own_loss(trainer, model, x, y, MEAN)
        trainer.backward(loss, weight=weight)
        for optimizer in optimizers:
            trainer.step(optimizer)
        for parameter, earlier in zip(model.parameters(), before.parameters(), strict=True):
            assert parameter.isfinite().all()
            assert torch.equal(parameter, earlier) == (step == 1)
    if "precision" in options:
        assert (scale_of(trainer).value, scale_of(trainer).num_finite) == (2.0**9, 2)
    assert trainer.num_skipped_steps == 2
    trainer.close()


@several
def test_compression(world, monkeypatch):
    """The part of a gradient that PowerSGD keeps for the next step gets the scale of that step."""

    def train(growth_interval):
        monkeypatch.setattr(loss_scale, "GROWTH_INTERVAL", growth_interval)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16))
        trainer = create_distributed_trainer(model, precision="float16", compression=PowerSGD(rank=1))
        scale_of(trainer).value = 2.0**10
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for step in range(6):
            generator = torch.Generator().manual_seed(step)
            x, y = torch.randn(12, 8, generator=generator), torch.randn(12, 16, generator=generator)
            trainer.train_step(x, y, MEAN, optimizer)
        assert trainer.num_skipped_steps == 0
        trainer.close()
        return model

    assert_same(train(1), train(2000), 1e-4)


@on_ranks(1, 2, (3, 2))
def test_sparse_gradients(world):
    model, reference = (nn.EmbeddingBag(6, 3, sparse=True) for _ in range(2))
    reference.load_state_dict(model.state_dict())
    trainer = create_distributed_trainer(model, precision="float16")
    reference.load_state_dict(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    plain = OneProcess(reference, torch.optim.SGD(reference.parameters(), lr=0.5), "float16", 2.0**16, 2000)
    for step in range(4):
        x, y = torch.arange(12).view(6, 2) * (step + 1) % 6, torch.full((6, 3), 3.0)
        if step == 2:
            y[-1] = torch.inf
        plain.step(x, y)
        trainer.train_step(x, y, MEAN, optimizer)
        assert model.weight.grad.is_sparse
    assert_same(model, reference, 1e-6)
    assert trainer.num_skipped_steps == 1
    trainer.close()


@several
def test_checkpoint(world, shared_folder):
    """A run that continues has the scale and the count of the earlier one, also on another number of ranks."""
    model = Line()
    trainer = create_distributed_trainer(model, precision="float16")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(3):
        x, y = integers(step)
        y[0] = 1e4 if step == 0 else y[0]
        trainer.train_step(x, y, MEAN, optimizer)
    trainer.save(shared_folder, optimizer=optimizer)
    trainer.close()
    alone = world.comm.Split(world.rank)
    for group, precision in [(None, "float16"), (alone, "float16"), (None, "bfloat16")]:
        model = Line()
        trainer = create_distributed_trainer(model, group=group, precision=precision)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        assert trainer.resume(shared_folder, optimizer=optimizer) == 3
        assert (scale_of(trainer).value, scale_of(trainer).num_finite) == (2.0**15, 2)
        assert trainer.num_skipped_steps == 1
        trainer.train_step(*integers(4), MEAN, optimizer)
        assert scale_of(trainer).num_finite == 2 + (precision == "float16")
        trainer.close()


@several
def test_misuse(world, monkeypatch):
    model = Line()
    trainer = create_distributed_trainer(model, precision="float16")
    optimizer, lbfgs = torch.optim.SGD(model.parameters(), lr=0.1), torch.optim.LBFGS(model.parameters())
    x, y = integers(0)
    loss, weight = own_loss(trainer, model, x, y, MEAN)
    with pytest.raises(ValueError, match=r"precision='float16' acts inside of `with trainer\.forward\(\):`") as error:
        trainer.backward(loss, weight=weight)
    same_message(world, error)
    with trainer.forward():
        loss, weight = own_loss(trainer, model, x, y, MEAN)
    trainer.backward(loss, weight=weight)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for step in (optimizer.step, lambda: scaler.step(optimizer)):
        with pytest.raises(
            ValueError, match=r"SGD\.step\(\) was called by itself.*call trainer\.step\(optimizer\)"
        ) as error:
            step()
        same_message(world, error)
    with pytest.raises(ValueError, match='a closure does not go with precision="float16"') as error:
        trainer.step(lbfgs, lambda: None)
    same_message(world, error)
    torch.optim.SGD(Line().parameters(), lr=0.1).step()  # its model has no trainer
    trainer.step(optimizer)
    trainer.train_step(x, y, MEAN, optimizer)
    optimizer.zero_grad()
    optimizer.step()  # there are no sums to step on
    trainer.close()
    with pytest.raises(
        ValueError, match='bias is float16, but precision="float16" computes in float16 with weights'
    ) as error:
        changed = Line()
        changed.bias.data = changed.bias.data.half()
        create_distributed_trainer(changed, precision="float16")
    same_message(world, error)
    model = Line()
    trainer = create_distributed_trainer(model, precision="float16")
    model.half()
    with pytest.raises(ValueError, match="weight is float16") as error:
        trainer.train_step(x.half(), y, MEAN, torch.optim.SGD(model.parameters(), lr=0.1))
    same_message(world, error)
    trainer.close()
    autocast = torch.autocast

    def unsupported(*arguments):
        warnings.warn("the dtype is not supported. Disabling autocast.", stacklevel=1)
        return autocast(*arguments)

    if world.rank == 1:
        monkeypatch.setattr(torch, "autocast", unsupported)
    with pytest.raises(ValueError, match="precision='bfloat16' does not work on cpu: the dtype is not") as error:
        create_distributed_trainer(Line(), precision="bfloat16")
    same_message(world, error)


@pytest.mark.slow
@on_ranks(1, 2)
def test_compiled(world):
    """A compiled model computes in the type of precision, too."""
    model, reference = Line(), Line()
    compiled = torch.compile(model, backend="aot_eager")
    trainer = create_distributed_trainer(compiled, precision="bfloat16")
    optimizer = torch.optim.SGD(compiled.parameters(), lr=0.5)
    plain = OneProcess(reference, torch.optim.SGD(reference.parameters(), lr=0.5), "bfloat16", 1.0, 2000)
    for step in range(3):
        x, y = integers(step)
        loss = trainer.train_step(x, y, MEAN, optimizer)
        torch.testing.assert_close(loss, plain.step(x, y)[0], rtol=1e-6, atol=0)
        assert compiled(x).dtype == F32
        assert_same(model, reference, 1e-6)
        model.round()
        reference.round()
    trainer.close()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@some
def test_many_tokens(world, dtype):
    """With 10,000 tokens a rank, the sum of their gradients is more than float16 holds, but their mean is small."""
    torch.manual_seed(0)
    model = nn.Linear(4, 2, dtype=dtype)
    reference = copy.deepcopy(model).float()
    num_tokens = 10000 * world.size
    x = 8 + torch.rand(num_tokens, 4)
    y = torch.full((num_tokens, 2), -4.0)
    F.mse_loss(reference(x.to(dtype).float()), y).backward()
    assert reference.weight.grad.abs().max() * 10000 > 5 * 65504
    trainer = create_distributed_trainer(model)
    loss = trainer.train_step(x.to(dtype), y.to(dtype), nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=0.0))
    assert torch.isfinite(loss)
    tolerance = 1e-2 if dtype == torch.float16 else 3e-2
    assert relative_difference(model.weight.grad.float(), reference.weight.grad) < tolerance
    trainer.close()


@some
def test_scaler_with_float16(world):
    """If one rank's part overflows, the scale falls on every rank in that step, and the weights stay equal."""
    model = Net(F32)
    trainer = create_distributed_trainer(model)
    optimizer = sgd(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**15, growth_interval=100)
    scales = []
    for step in range(5):
        x, y = batch(12, F32, step)
        if step == 2:
            x[11] = 1e30  # in the last rank's part
        optimizer.zero_grad()
        with trainer.forward(), torch.autocast("cpu", torch.float16):
            loss, weight = own_loss(trainer, model, x, y)
        trainer.backward(scaler.scale(loss.float()), weight=weight)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert scales[1] > scales[2] == scales[4]
    assert len(set(map(str, world.gather(scales)))) == 1
    weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    assert all(torch.equal(weights, other) for other in world.gather(weights))
    trainer.close()
