# SPDX-License-Identifier: Apache-2.0
"""Parameters that are moved, replaced, added, removed or frozen between steps, gradients that are kept or sparse."""

import copy

import torch
from compatibility import refused, works
from small_models import F64, adam, batch, mlp, regression_batch, sgd
from torch import nn
from torch.nn.utils import parametrizations, prune

from distributed_trainer import PowerSGD


def train(run, optimizer, first=0, *, num_steps=2, inputs=5, dtype=F64, **options):
    """Train steps on batches of an `mlp` with 5 outputs."""
    for step in range(first, first + num_steps):
        run.step(*regression_batch(7, step, dtype, inputs=inputs, outputs=5), nn.MSELoss(), optimizer, **options)


@works("`model.float()` and `model.double()` between steps")
def test_there_and_back(run):
    model = run.start(mlp(5, 6, 5))
    optimizer = sgd(model)
    for step in range(4):
        train(run, optimizer, step, num_steps=1)
        model.float()
        model.double()


@works("a module that `torch.jit.script` has compiled, with a buffer")
def test_scripted(run):
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = mlp(5, 6, 5)
            self.register_buffer("count", torch.zeros((), dtype=F64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.count += 1
            return self.layers(x)

    model = run.start(nn.Sequential(torch.jit.script(Counting()), mlp(5, 5, seed=1)))
    optimizer = sgd(model)
    train(run, optimizer)
    model[1] = mlp(5, 5, seed=2)
    train(run, sgd(model), 2)


@works("`model.float()` between steps, for good", rtol=1e-5)
def test_other_dtype(run):
    model = run.start(mlp(5, 6, 5))
    train(run, sgd(model))
    model.float()
    train(run, sgd(model), 2, dtype=torch.float32)


@works("`model.to(memory_format=torch.channels_last)` between steps")
def test_memory_format(run):
    torch.manual_seed(0)
    model = run.start(nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 4)).double())
    optimizer = sgd(model)
    for step in range(4):
        run.step(*batch(4, F64, step), nn.CrossEntropyLoss(), optimizer)
        model.to(memory_format=(torch.channels_last, torch.contiguous_format)[step % 2])


@works("`parameter.data` and `parameter.grad.data` assigned between steps")
def test_data(run):
    model = run.start(mlp(5, 6, 5))
    optimizer = sgd(model)
    for step in range(4):
        train(run, optimizer, step, num_steps=1)
        for parameter in model.parameters():
            parameter.grad.data = parameter.grad.data * 2
            parameter.data = parameter.data - 0.1 * parameter.grad


@works("an embedding that gets more rows, by `weight.data`")
def test_more_rows(run):
    torch.manual_seed(0)
    model = run.start(nn.Sequential(nn.Embedding(4, 5), nn.Flatten(), nn.Linear(10, 5)).double())
    generator = torch.Generator().manual_seed(run.trainer.rank if run.trainer else 0)
    for num_rows in (4, 4, 6, 6):
        if num_rows > len(model[0].weight):
            more = torch.randn(num_rows - 4, 5, dtype=F64, generator=generator)
            model[0].weight.data = torch.cat([model[0].weight.data, more])
            optimizer = sgd(model)
        elif run.losses == []:
            optimizer = sgd(model)
        indices = torch.arange(14).view(7, 2) % num_rows
        run.step(indices, torch.arange(7) % 5, nn.CrossEntropyLoss(), optimizer)


@works("`load_state_dict(assign=True)`, and a new optimizer")
def test_assign(run):
    model = run.start(mlp(5, 6, 5))
    train(run, sgd(model))
    model.load_state_dict({name: value * 2 for name, value in model.state_dict().items()}, assign=True)
    train(run, sgd(model), 2)


@works("a layer that is replaced (`model[2] = nn.Linear(...)`), and a new optimizer")
def test_replaced(run):
    model = run.start(mlp(5, 6, 5))
    train(run, sgd(model))
    torch.manual_seed(1)
    model[2] = nn.Linear(6, 5, dtype=F64)
    train(run, sgd(model), 2)


@refused(
    "a layer that is replaced, but the optimizer has the old one",
    r"the optimizer has 2 parameter\(s\) that are not the model's",
    instead="make a new optimizer from `model.parameters()`",
)
def test_old_optimizer(run):
    model = run.start(mlp(5, 6, 5))
    optimizer = sgd(model)
    train(run, optimizer)
    model[2] = nn.Linear(6, 5, dtype=F64)
    run._remember()
    train(run, optimizer, 2)


@works("a new layer, by `add_module` and `optimizer.add_param_group`")
def test_added(run):
    model = run.start(mlp(5, 6, 5))
    optimizer = sgd(model)
    train(run, optimizer)
    torch.manual_seed(1)
    model.append(nn.Linear(5, 5, dtype=F64))
    optimizer.add_param_group({"params": model[3].parameters(), "lr": 0.02})
    train(run, optimizer, 2)


@works("a new layer with other random values on each rank")
def test_added_at_random(run):
    model = run.start(mlp(5, 6, 5))
    optimizer = sgd(model)
    train(run, optimizer)
    torch.manual_seed(run.trainer.rank if run.trainer else 0)
    model.append(nn.Linear(5, 5, dtype=F64))
    optimizer.add_param_group({"params": model[3].parameters(), "lr": 0.02})
    train(run, optimizer, 2)


@works("BatchNorm that is added between steps")
def test_late_batchnorm(run):
    model = run.start(mlp(5, 6, 5))
    train(run, adam(model))
    model.insert(1, nn.BatchNorm1d(6, dtype=F64))
    train(run, adam(model), 2)


@works("a layer that is removed (`del model[0]`), and a new optimizer")
def test_removed(run):
    model = run.start(mlp(5, 5, 5))
    train(run, sgd(model))
    del model[0]
    train(run, sgd(model), 2)


class Adapted(nn.Module):
    """Linear layer with a low-rank adapter."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Parameter(torch.ones(2, layer.in_features, dtype=F64) / 10)
        self.up = nn.Parameter(torch.zeros(layer.out_features, 2, dtype=F64))

    def forward(self, x):
        return self.layer(x) + x @ self.down.T @ self.up.T


@works("adapters (LoRA) that replace layers, whose weights are frozen")
def test_adapters(run):
    model = run.start(mlp(5, 6, 5))
    train(run, sgd(model))
    for index in (0, 2):
        model[index] = Adapted(model[index])
    train(run, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1), 2)


@works("parameters that are frozen and unfrozen in turn")
def test_frozen_in_turn(run):
    model = run.start(mlp(5, 6, 6, 5))
    optimizer = sgd(model)
    for step in range(4):
        model[0].requires_grad_(step % 2 == 0)
        model[2].requires_grad_(step % 2 == 1)
        train(run, optimizer, step, num_steps=1)


@works("`torch.nn.utils.parametrizations.weight_norm` and `prune` between steps")
def test_parametrized(run):
    model = run.start(mlp(5, 6, 6, 5))
    train(run, sgd(model))
    parametrizations.weight_norm(model[0])
    prune.l1_unstructured(model[2], "weight", amount=0.5)
    train(run, sgd(model), 2)


@works("gradients and views of gradients that the script keeps")
def test_kept_gradients(run):
    model = run.start(mlp(5, 6, 5))
    optimizer = sgd(model)
    kept = []
    for step in range(5):
        train(run, optimizer, step, num_steps=1)
        first, *_, last = (parameter.grad for parameter in model.parameters())
        kept.append([first.view(-1)[3:], last.data] if step < 2 else [first.numpy()] if step == 2 else [last])
    return [gradient for gradients in kept for gradient in gradients]


@works("`microbatches=2`, and a layer that is replaced", ways=("train_step",))
def test_microbatches(run):
    model = run.start(mlp(5, 6, 5))
    train(run, sgd(model), microbatches=2)
    model[2] = copy.deepcopy(model[2])
    model.float()
    model.double()
    train(run, sgd(model), 2, microbatches=2)


@works('`nonfinite_gradients="skip"`, and a layer that is replaced')
def test_skip(run):
    model = run.start(mlp(5, 6, 5), nonfinite_gradients="skip")
    train(run, sgd(model))
    model[2] = copy.deepcopy(model[2])
    train(run, sgd(model), 2)


@works("`reproducible=4`, and a layer that is replaced", ways=("train_step",))
def test_reproducible(run):
    model = run.start(mlp(5, 6, 5), reproducible=4)
    train(run, sgd(model))
    model[2] = copy.deepcopy(model[2])
    model[0].requires_grad_(False)
    kept = [parameter.grad for parameter in model.parameters()]
    train(run, sgd(model), 2)
    return kept


@works("`PowerSGD`, and a layer that is replaced", rtol=1e-6, ranks=(1, 2, 3))
def test_power_sgd(run):
    model = run.start(mlp(5, 6, 5), compression=PowerSGD(rank=5))
    train(run, sgd(model))
    model[2] = copy.deepcopy(model[2])
    train(run, sgd(model), 2)


@works('gradients of shards that the script keeps, with `shard="optimizer"`, and frozen parameters')
def test_sharded(run):
    model = run.start(mlp(5, 6, 5), shard="optimizer")
    optimizer = adam(model)
    kept = []
    for step in range(5):
        model[0].requires_grad_(step < 3)
        train(run, optimizer, step, num_steps=1)
        gradients = [parameter.grad for group in optimizer.param_groups for parameter in group["params"]]
        kept += [(gradient, gradient.clone()) for gradient in gradients if gradient is not None]
    return all(torch.equal(gradient, value) for gradient, value in kept)


@refused(
    'a layer that is replaced, with `shard="optimizer"`',
    r"2\.weight was replaced after the trainer was made with shard=.optimizer.",
    instead="close the trainer, and make another trainer and another optimizer",
    ranks=(2, 3),
)
def test_sharded_replaced(run):
    model = run.start(mlp(5, 6, 5), shard="optimizer")
    train(run, sgd(model))
    model[2] = copy.deepcopy(model[2])
    run._remember()
    train(run, sgd(model), 2)


class Words(nn.Module):
    """Two embeddings with sparse gradients; samples with an even first word use the first one only."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.tables = nn.ModuleList(nn.Embedding(6, 3, sparse=True, dtype=F64) for _ in range(2))

    def forward(self, words):
        return torch.stack([self.tables[int(row[0]) % 2](row).sum(0) for row in words])


@works("`nn.Embedding(sparse=True)` that is first used in a later step, and on some ranks only, with SparseAdam")
def test_sparse_later(run):
    model = run.start(Words())
    optimizer = torch.optim.SparseAdam(list(model.parameters()), lr=0.1)
    for firsts in ([0, 2, 4, 0], [0, 1, 2, 3], [0, 0, 0, 1], [2, 2, 2, 2], [1, 1, 1, 3]):
        words = torch.stack([torch.tensor(firsts), torch.tensor([1, 5, 3, 3])], 1)
        run.step(words, torch.arange(12).view(4, 3).double(), nn.MSELoss(), optimizer)
    return model.tables[1].weight.grad.to_dense()


class Tied(nn.Module):
    """A table with sparse gradients; samples with a negative word use it as a dense matrix as well."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(6, 3, sparse=True, dtype=F64)

    def forward(self, words):
        x = self.table(words.abs()).sum(1)
        is_dense = (words < 0).any(1, keepdim=True)
        return x + is_dense * (x @ self.table.weight.T @ self.table.weight) if is_dense.any() else x


@works("a gradient that is sparse in some steps, and dense in others or on some ranks")
def test_sparse_and_dense(run):
    model = run.start(Tied())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
    are_sparse = []
    for signs in ([1, 1, 1], [1, 1, 1], [-1, -1, -1], [1, 1, -1], [-1, 1, 1], [1, 1, 1], [1, 1, 1]):
        words = torch.tensor([[1, 2], [3, 4], [5, 1]]) * torch.tensor(signs)[:, None]
        run.step(words, torch.arange(9).view(3, 3).double(), nn.MSELoss(), optimizer)
        are_sparse.append(model.table.weight.grad.is_sparse)
    return are_sparse
