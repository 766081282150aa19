# SPDX-License-Identifier: Apache-2.0
"""BatchNorm.

Layers that a random number chooses, losses that contain gradients, averages of weights.
"""

import copy

import torch
import torch.distributed as dist
import torch.nn.functional as F
from compatibility import refused, works
from small_models import F64, batch, regression_batch, sgd
from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils.data import DataLoader, TensorDataset

from distributed_trainer import MismatchError

DIFFERENT = r"ranks call different BatchNorm modules: rank 0 is .* rank [12] is .*common_random"


class Chosen(nn.Module):
    """Model that runs one of its layers, or none, chosen by `choose`."""

    def __init__(self, choose, widths):
        super().__init__()
        torch.manual_seed(0)
        self.choose = choose
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(4, n), nn.BatchNorm1d(n, track_running_stats=False), nn.Linear(n, 4))
            for n in widths
        ).to(F64)
        self.last = nn.Linear(4, 2, dtype=F64)

    def forward(self, x):
        number = self.choose(len(self.layers))
        return self.last(x if number is None else x + self.layers[number](x))


def by_torch(number):
    return int(torch.rand(()) * number)


def or_none(number):
    return None if torch.rand(()) < 0.5 else 0


def train_steps(run, model, num_samples=8):
    optimizer = sgd(run.start(model))
    for step in range(6):
        run.step(*regression_batch(num_samples, step, inputs=4, outputs=2), nn.MSELoss(), optimizer)


@refused(
    "a layer with BatchNorm, chosen by `torch.rand` in `forward`",
    DIFFERENT,
    error=MismatchError,
    ranks=(2, 3),
    instead="draw inside `with distributed_trainer.common_random():`",
)
def test_chosen_layer(run):
    train_steps(run, Chosen(by_torch, [6] * 50))


@refused(
    "the same with layers of different widths",
    DIFFERENT,
    error=MismatchError,
    ranks=(2, 3),
    instead="draw inside `with distributed_trainer.common_random():`",
)
def test_chosen_width(run):
    train_steps(run, Chosen(by_torch, range(2, 52)))


@refused(
    "a layer with BatchNorm that is left out if `torch.rand` says so (stochastic depth)",
    DIFFERENT,
    error=MismatchError,
    ranks=(2, 3),
    instead="draw inside `with distributed_trainer.common_random():`",
)
def test_dropped_layer(run):
    train_steps(run, Chosen(or_none, [6]))


class Critic(nn.Module):
    """Critic with BatchNorm that returns its input, too, for a gradient penalty."""

    def __init__(self, activation=torch.tanh, norm=nn.BatchNorm2d):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 3, 3, bias=False)
        self.norm = norm(3)
        self.linear = nn.Linear(12, 5, bias=False)
        self.norm1 = nn.BatchNorm1d(5)
        self.last = nn.Linear(5, 1)
        self.activation = activation
        self.double()

    def forward(self, x):
        x = x.detach().requires_grad_()
        hidden = self.activation(self.norm(self.conv(x)))
        return self.last(self.activation(self.norm1(self.linear(hidden.flatten(1))))), x


def penalty(outputs, inputs, center):
    (gradient,) = torch.autograd.grad(outputs.sum(), inputs, create_graph=True)
    return (gradient.flatten(1).norm(dim=1) - center).square().mean()


def wgan_gp(results, _):
    outputs, inputs = results
    return outputs.mean() + 10 * penalty(outputs, inputs, 1.0)


def r1(results, _):
    outputs, inputs = results
    return F.softplus(-outputs).mean() + 5 * penalty(outputs, inputs, 0.0)


def train_critic(run, criterion, num_samples=5, model=None, **options):
    model = run.start(model or Critic())
    optimizer = sgd(model, lr=0.01)
    for step in range(3):
        run.step(*batch(num_samples, F64, step), criterion, optimizer, **options)


@works("gradient penalty (WGAN-GP) through BatchNorm, by `torch.autograd.grad(..., create_graph=True)`")
def test_gradient_penalty(run):
    train_critic(run, wgan_gp)


@works("R1 penalty through BatchNorm")
def test_r1(run):
    train_critic(run, r1)


@works("a gradient penalty with fewer samples than ranks", ways=("train_step",))
def test_gradient_penalty_of_few_samples(run):
    train_critic(run, r1, num_samples=2)


class Learner(nn.Module):
    """Model whose loss is that after a step of SGD on its own weights (MAML)."""

    def __init__(self, share):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 2)).to(F64)
        self.share = share  # this rank's share of the samples

    def forward(self, x, y):
        parameters = dict(self.net.named_parameters())
        loss = F.mse_loss(self.net(x), y) * self.share(len(x))
        gradients = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
        if dist.is_initialized():
            gradients = [dist.nn.functional.all_reduce(gradient) for gradient in gradients]
        adapted = {
            name: parameter - 0.1 * gradient
            for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True)
        }
        return torch.func.functional_call(self.net, adapted, x)


@works("a step of gradient descent in `forward` (MAML), whose gradients `torch.distributed` adds")
def test_maml(run):
    model = run.start(Learner(lambda num_samples: num_samples / 7))
    if run.trainer is not None:
        dist.init_process_group("shmpi")
    optimizer = sgd(model)
    for step in range(3):
        x, y = regression_batch(7, step, inputs=4, outputs=2)
        run.step((x, y), y, nn.MSELoss(), optimizer)
    if run.trainer is not None:
        dist.destroy_process_group()


def swa(run, update):
    """Train, average the weights, and update the running statistics of the average; return its state."""
    torch.manual_seed(0)
    model = run.start(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 2)).double())
    average = AveragedModel(model)
    optimizer = sgd(model)
    dataset = TensorDataset(*regression_batch(12, inputs=4, outputs=2))
    loader = DataLoader(dataset, 5) if run.trainer is None else run.trainer.loader(dataset, 5)
    for _ in range(2):
        for x, y in loader:
            if run.trainer is None:
                run.step(x, y, nn.MSELoss(), optimizer)
            else:
                run.trainer.train_step(x, y, nn.MSELoss(), optimizer)
        average.update_parameters(model)
    run.losses.clear()
    update(run, loader, average)
    return dict(average.state_dict())


@works(
    "the running statistics of SWA's average, by `trainer.update_bn(trainer.loader(...), swa_model)`",
    ways=("train_step",),
)
def test_update_bn(run):
    def update(run, loader, average):
        if run.trainer is None:
            update_bn(loader, average)
        else:
            run.trainer.update_bn(loader, average)

    return swa(run, update)


@works("the same by torch's `update_bn`, with whole batches on every rank", ways=("train_step",))
def test_update_bn_with_whole_batches(run):
    dataset = TensorDataset(*regression_batch(12, inputs=4, outputs=2))
    return swa(run, lambda run, _, average: update_bn(DataLoader(dataset, 5), average))


@refused(
    "the same by torch's `update_bn`, with `trainer.loader`",
    r"update_bn would compute the statistics of each rank's parts .* call trainer.update_bn",
    instead="`trainer.update_bn(loader, swa_model)`",
    ways=("train_step",),
    ranks=(2, 3),
)
def test_torch_update_bn(run):
    def update(run, loader, average):
        run.before = copy.deepcopy(run.model.state_dict())
        update_bn(((x * 1, y) for x, y in loader), average)

    swa(run, update)


_MODULE_OF_MODEL = "BatchNorm modules of the model (`nn.ModuleList` in place of a list), or `sync_batchnorm=False`"


class Normalised(nn.Module):
    """A linear layer whose outputs `normalise` changes by the statistics of the batch."""

    def __init__(self, normalise):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.normalise = nn.Linear(4, 2, dtype=F64), normalise

    def forward(self, x):
        return self.normalise(self.linear(x))


def one_step(run, model, criterion=None, options=None):
    model = run.start(model, **options or {})
    run.step(*regression_batch(7, inputs=4, outputs=2), criterion or nn.MSELoss(), sgd(model))


@refused(
    "`F.batch_norm(x, None, None, training=True)` in `forward`",
    "F.batch_norm is called in training, but not by a BatchNorm module that the model has",
    instead=_MODULE_OF_MODEL,
    ranks=(2, 3),
)
def test_functional(run):
    one_step(run, Normalised(lambda x: F.batch_norm(x, None, None, training=True)))


@refused(
    "BatchNorm modules in a Python list",
    "F.batch_norm is called in training, but not by",
    instead=_MODULE_OF_MODEL,
    ranks=(2, 3),
)
def test_module_in_list(run):
    norms = [nn.BatchNorm1d(2, affine=False, dtype=F64)]
    one_step(run, Normalised(lambda x: norms[0](x)))


@refused(
    "a criterion that contains BatchNorm",
    "F.batch_norm is called in training, but not by",
    instead="a module of the model that computes the loss",
    ranks=(2, 3),
)
def test_norm_in_criterion(run):
    norm = nn.BatchNorm1d(2, affine=False, dtype=F64)
    one_step(run, nn.Linear(4, 2, dtype=F64), lambda outputs, y: (norm(outputs) - y).square().mean())


class OwnStatistics(nn.BatchNorm1d):
    """BatchNorm that computes its statistics by itself."""

    def forward(self, x):
        return (x - x.mean(0)) / (x.var(0, unbiased=False) + self.eps).sqrt()


@refused(
    "a BatchNorm subclass that computes its statistics without `F.batch_norm`",
    r"BatchNorm module 'normalise' \(OwnStatistics\) does not call F.batch_norm",
    instead="a forward that calls `F.batch_norm`, or `sync_batchnorm=False`",
    ranks=(2, 3),
)
def test_own_statistics(run):
    one_step(run, Normalised(OwnStatistics(2, affine=False, track_running_stats=False)))


@works("`InstanceNorm`, `GroupNorm` and `LayerNorm`")
def test_norms_of_samples(run):
    torch.manual_seed(0)
    norms = nn.InstanceNorm1d(4, affine=True), nn.Tanh(), nn.GroupNorm(2, 4), nn.Tanh(), nn.LayerNorm(3)
    model = run.start(nn.Sequential(nn.Unflatten(1, (4, 1)), nn.Conv1d(4, 4, 1), nn.Linear(1, 3), *norms).double())
    for step in range(2):
        x, _ = regression_batch(7, step, inputs=4, outputs=2)
        run.step(x, x[:, :1, None].expand(-1, 4, 3), nn.MSELoss(), sgd(model))
