# SPDX-License-Identifier: Apache-2.0
"""Gradients: what gets them, what changes them, and losses without them."""

import torch
import torch.nn.functional as F
from compatibility import refused, works
from small_models import F64, Net, NormNet, batch, mlp, regression_batch, sgd
from torch import nn

TRAIN_STEP, MANUAL_LOOP = ("train_step",), ("manual-loop",)


class Words(nn.Module):
    """Embedding with `max_norm`, whose weight is also that of the last layer."""

    def __init__(self, is_tied):
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(11, 4, max_norm=1.0, dtype=F64)
        self.last = nn.Linear(4, 11, bias=False, dtype=F64)
        if is_tied:
            self.last.weight = self.words.weight

    def forward(self, x):
        return self.last(torch.tanh(self.words(x)).mean(1))


def sentences(num_samples, seed):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(11, shape, generator=generator) for shape in ((num_samples, 3), (num_samples,)))


@works("`nn.Embedding(max_norm=1.0)`")
def test_max_norm(run):
    model = run.start(Words(is_tied=False))
    optimizer = sgd(model, lr=1.0)
    for step in range(5):
        run.step(*sentences(7, step), nn.CrossEntropyLoss(), optimizer)


@refused(
    "`nn.Embedding(scale_grad_by_freq=True)`, also `nn.EmbeddingBag`",
    "scale_grad_by_freq=True, which divides gradients by the counts of the indices in each rank's part",
    instead="leave it out",
    ranks=(2, 3),
)
def test_scale_grad_by_freq(run):
    torch.manual_seed(0)
    model = run.start(
        nn.Sequential(nn.Embedding(11, 4, scale_grad_by_freq=True), nn.Flatten(), nn.Linear(12, 11)).double()
    )
    run.step(*sentences(7, 0), nn.CrossEntropyLoss(), sgd(model))


@works("`nn.Embedding(max_norm=1.0)` whose weight is also that of the last layer")
def test_tied_max_norm(run):
    model = run.start(Words(is_tied=True))
    optimizer = sgd(model, lr=1.0)
    for step, num_samples in enumerate((7, 2, 1, 6)):
        run.step(*sentences(num_samples, step), nn.CrossEntropyLoss(), optimizer)


@works("`nn.EmbeddingBag(max_norm=1.0)`")
def test_max_norm_bag(run):
    torch.manual_seed(0)
    model = run.start(nn.EmbeddingBag(11, 4, max_norm=1.0, dtype=F64))
    optimizer = sgd(model, lr=1.0)
    for step in range(4):
        x, y = sentences(6, step)
        run.step(x, y % 4, nn.CrossEntropyLoss(), optimizer)


class Projected(nn.Module):
    """Layer that normalises its own weight in forward, whatever the batch."""

    def __init__(self):
        super().__init__()
        self.layer = mlp(3, 2)[0]

    def forward(self, x):
        with torch.no_grad():
            self.layer.weight.div_(self.layer.weight.norm(dim=1, keepdim=True))
        return self.layer(x)


@works("`forward` writes to a weight, in the same way for every batch")
def test_projection_in_forward(run):
    model = run.start(Projected())
    optimizer = sgd(model)
    for step in range(3):
        run.step(*regression_batch(7, step, inputs=3, outputs=2), nn.MSELoss(), optimizer)


class ArcFace(nn.Module):
    """Criterion with a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, dtype=F64))

    def forward(self, outputs, targets):
        return F.cross_entropy(outputs * self.weight, targets)


@refused(
    "a criterion with parameters, and an optimizer of its own for them",
    r"the parameter weight \[4\] of ArcFace gets a gradient in this backward, but is not a parameter of the trainer's",
    instead="put the criterion into the model, such as `nn.ModuleList([model, criterion])`, and make one optimizer",
)
def test_criterion_with_parameters(run):
    model, criterion = run.start(Net(F64)), ArcFace()
    second = torch.optim.SGD(criterion.parameters(), lr=0.1)
    run.step(*batch(6, F64), criterion, sgd(model))
    second.step()


@refused(
    "a plain tensor that an optimizer of its own trains beside the model",
    r"a tensor of shape \[4\] gets a gradient in this backward, but is not a parameter of the trainer's model",
    instead="make it an `nn.Parameter` of the model",
)
def test_trained_tensor(run):
    model, scale = run.start(Net(F64)), torch.ones(4, dtype=F64, requires_grad=True)
    second = torch.optim.SGD([scale], lr=0.1)
    run.step(*batch(6, F64), lambda outputs, y: F.cross_entropy(outputs * scale, y), sgd(model))
    second.step()


@refused(
    "a manual loop reads `.grad` of a tensor that is the same on every rank",
    r"a tensor of shape \[4\] is the same on every rank and gets a gradient in this backward",
    instead="make it an `nn.Parameter` of the model, or pass `inputs=list(model.parameters())`",
    ways=MANUAL_LOOP,
    ranks=(2, 3),
)
def test_plain_tensor(run):
    model, scale = run.start(Net(F64)), torch.ones(4, dtype=F64, requires_grad=True)
    run.step(*batch(6, F64), lambda outputs, y: F.cross_entropy(outputs * scale, y), sgd(model))
    scale.grad.norm()


@refused(
    "the inputs come from another module, which is trained, too",
    r"the parameter weight \[32, 32\] of Linear gets a gradient in this backward",
    instead="put both modules into one model",
    ways=TRAIN_STEP,
)
def test_module_before_the_model(run):
    model, first = run.start(Net(F64)), nn.Linear(32, 32, dtype=F64)
    x, y = batch(6, F64)
    run.step(first(x.flatten(1)).view_as(x), y, nn.CrossEntropyLoss(), sgd(model))


class WithDerivative(nn.Module):
    """Model that differentiates its output by its inputs, as physics-informed networks do."""

    def __init__(self):
        super().__init__()
        self.layers = mlp(2, 5, 1)

    def forward(self, x):
        y = self.layers(x)
        (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return torch.cat([y, slope], 1)


@works("inputs require a gradient, by which the model differentiates", note="the inputs get no `.grad`")
def test_inputs_require_gradients(run):
    model = run.start(WithDerivative())
    optimizer = sgd(model)
    for step in range(3):
        x, y = regression_batch(7, step, inputs=2, outputs=3)
        run.step(x.requires_grad_(), y, nn.MSELoss(), optimizer)


class BoundaryLoss(nn.Module):
    """Criterion that differentiates by points of its own, which have no optimizer."""

    def __init__(self):
        super().__init__()
        self.points = torch.ones(3, 4, dtype=F64, requires_grad=True)

    def forward(self, outputs, targets):
        (slope,) = torch.autograd.grad(self.points.pow(2).sum(), self.points, create_graph=True)
        return F.cross_entropy(outputs + slope.mean() * self.points.sum(), targets)


@works("the loss depends on another tensor that requires a gradient", ways=TRAIN_STEP, note="it gets no `.grad`")
def test_tensor_of_the_criterion(run):
    model, criterion = run.start(Net(F64)), BoundaryLoss()
    optimizer = sgd(model)
    for step in range(3):
        run.step(*batch(7, F64, step), criterion, optimizer)
    assert run.trainer is None or criterion.points.grad is None


def labelled(outputs, targets):
    """Return the sum of the losses of labelled samples, without a graph where there are none."""
    is_labelled = targets >= 0
    return F.cross_entropy(outputs[is_labelled], targets[is_labelled], reduction="sum") if is_labelled.any() else zero()


def zero():
    return torch.zeros((), dtype=F64)


labelled.reduction = "sum"


@works("a criterion that returns `torch.zeros(())` where no sample has a label", ways=TRAIN_STEP)
def test_part_without_labels(run):
    model = run.start(NormNet(F64))
    optimizer = sgd(model)
    for step in range(3):
        x, y = batch(6, F64, step)
        y[2 * step : 2 * step + 2] = -1
        y[:2] = -1
        run.step(x, y, labelled, optimizer)


@works("a manual loop in which a rank's loss has no graph", ways=MANUAL_LOOP)
def test_loop_without_labels(run):
    model = run.start(NormNet(F64))
    optimizer = sgd(model)
    for step in range(3):
        x, y = batch(6, F64, step)
        y[:3] = -1
        backward_of_sum(run, x, y, optimizer)


def backward_of_sum(run, x, y, optimizer):
    """Make a step with the sum of the ranks' losses."""
    trainer = run.trainer
    if trainer is None:
        return run.step(x, y, labelled, optimizer)
    part_x, part_y = trainer.split((x, y))
    with trainer.forward():
        loss = labelled(run.model(part_x), part_y)
    optimizer.zero_grad()
    run.losses.append(float(trainer.backward(loss, weight=None)))
    trainer.step(optimizer)
    return run.losses[-1]


@refused(
    "a loss without a graph on every rank",
    "element 0 of tensors does not require grad and does not have a grad_fn",
    error=RuntimeError,
    instead="skip the batch on every rank",
)
def test_no_graph(run):
    model = run.start(Net(F64))
    run.step(*batch(6, F64), lambda outputs, targets: zero(), sgd(model))


def clamped(gradient):
    return gradient.clamp(-0.01, 0.01)


@works("`trainer.on_gradient(parameter, clamp)` in place of `parameter.register_hook(clamp)`")
def test_on_gradient(run):
    model = run.start(Net(F64))
    optimizer = sgd(model)
    register = model.conv.weight.register_hook if run.trainer is None else on_gradient(run, model.conv.weight)
    handle = register(clamped)
    for step in range(4):
        if step == 3:
            handle.remove()
        run.step(*batch(7, F64, step), nn.CrossEntropyLoss(), optimizer)


def on_gradient(run, parameter):
    return lambda function: run.trainer.on_gradient(parameter, function)


@works("`parameter.register_hook` with a function that only reads the gradient", note="it sees a part's gradient")
def test_watching_hook(run):
    model = run.start(Net(F64))
    optimizer = sgd(model)
    norms = []
    model.conv.weight.register_hook(lambda gradient: norms.append(gradient.norm().item()))
    for step in range(3):
        run.step(*batch(7, F64, step), nn.CrossEntropyLoss(), optimizer)
    assert len(norms) == 3


@refused(
    "`parameter.register_hook(clamp)`",
    "the hook clamped on conv.weight has changed the gradient of a part of the batch",
    instead="`trainer.on_gradient(parameter, clamp)`",
    ranks=(2, 3),
)
def test_changing_hook(run):
    model = run.start(Net(F64))
    model.conv.weight.register_hook(clamped)
    run.step(*batch(6, F64), nn.CrossEntropyLoss(), sgd(model))


@refused(
    "an optimizer that steps in backward (`register_post_accumulate_grad_hook`)",
    "the hook .*step_now runs after the gradient of conv.weight is accumulated",
    instead="`trainer.on_gradient(parameter, function)`, or one optimizer after backward",
    ranks=(2, 3),
)
def test_optimizer_in_backward(run):
    model = run.start(Net(F64))
    optimizers = {parameter: torch.optim.SGD([parameter], lr=0.1) for parameter in model.parameters()}

    def step_now(parameter):
        optimizers[parameter].step()
        parameter.grad = None

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step_now)
    run.step(*batch(6, F64), nn.CrossEntropyLoss(), sgd(model))
