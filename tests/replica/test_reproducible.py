# SPDX-License-Identifier: Apache-2.0
"""Tests of reproducible=: the bits are the same on any number of ranks. Each rank also trains alone, to compare."""

import copy
import functools
import hashlib
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import ranks
import torch
import torch.nn.functional as F
from mpi4py import MPI
from ranks import JobSpec, job_environment, mixed, mixed_and_four, mpirun_path, on_ranks, same_message
from small_models import adam, batch
from torch import nn
from torch.utils.data import Dataset

from distributed_trainer import MismatchError, create_distributed_trainer
from distributed_trainer.data.split import own_shards
from distributed_trainer.gradients.deterministic import halves, whole_nodes
from distributed_trainer.replica.reproducible import check_computers

several = on_ranks(2, 3, 4, (3, 2))


class Net(nn.Module):
    """Convolution, BatchNorm, dropout, a layer that some batches do not use, and one that no batch uses."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Conv2d(2, 8, 3, dtype=dtype), nn.BatchNorm2d(8, dtype=dtype), nn.ReLU(), nn.Flatten()
        )
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(32, 5, dtype=dtype)
        self.extra = nn.Linear(5, 5, dtype=dtype)
        self.unused = nn.Linear(2, 2, dtype=dtype)

    def forward(self, x):
        output = self.head(self.dropout(self.body(x)))
        return output + self.extra(output) if x.flatten()[0] > 0 else output


class Noisy(Dataset):
    """Samples with random augmentation."""

    def __len__(self):
        return 29

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return torch.randn(2, 4, 4, generator=generator) + 0.1 * torch.randn(2, 4, 4), index % 5


def digest(model, optimizer, losses):
    """Return the sha256 of weights, buffers, gradients, the optimizer's state and the losses."""
    tensors = [*model.parameters(), *model.buffers(), *losses]
    tensors += [p.grad for p in model.parameters() if p.grad is not None]
    tensors += [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    data = hashlib.sha256()
    for tensor in tensors:
        data.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return data.hexdigest()


def train_on_batches(trainer, dtype=torch.float32, criterion=None, **options):
    """Train on batches of all sizes, some with fewer samples than shards."""
    optimizer, losses = adam(trainer.model), []
    for step, num_samples in enumerate([24, 7, 13, 3, 1, 16]):
        x, y = batch(num_samples, dtype, step)
        loss = trainer.train_step(x, y, criterion or nn.CrossEntropyLoss(), optimizer, **options)
        losses += loss if isinstance(loss, tuple) else [loss]
    assert trainer.model.unused.weight.grad is None
    return digest(trainer.model, optimizer, losses)


def train_with_loader(trainer):
    """Train with a loader that shuffles; its last batch has five samples."""
    optimizer, losses = adam(trainer.model), []
    loader = trainer.loader(Noisy(), 12, shuffle=True)
    for _ in range(2):
        for x, y in loader:
            losses.append(trainer.train_step(x, y, nn.CrossEntropyLoss(label_smoothing=0.1), optimizer))
    return digest(trainer.model, optimizer, losses)


def compare(world, train, num_shards=8, dtype=torch.float32, **options):
    """Train on all ranks, and on each rank alone; check that the bits are the same, and return their digest."""
    digests = []
    for comm in (world.comm, MPI.COMM_SELF):
        torch.manual_seed(0)
        with create_distributed_trainer(Net(dtype), group=comm, reproducible=num_shards, **options) as trainer:
            assert trainer.world_size == comm.size
            digests.append(train(trainer))
    assert set(itertools.chain(*world.gather(digests))) == {digests[0]}
    return digests[0]


@pytest.mark.parametrize("num_shards", [4, 5, 8])
@mixed_and_four
def test_batches(world, num_shards):
    compare(world, train_on_batches, num_shards)


@mixed
def test_loader(world):
    compare(world, train_with_loader)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@on_ranks(3, (4, 2))
def test_dtypes(world, dtype):
    compare(world, functools.partial(train_on_batches, dtype=dtype), dtype=dtype)


def own_loss(outputs, targets):
    return F.cross_entropy(outputs, targets, reduction="none").mean(), outputs.float().square().mean()


@on_ranks(3, (4, 2))
def test_options(world):
    """Options keep the bits the same: a weight function, a loss of several terms, clipping, a check for NaN."""
    weight = lambda targets: 0.3 + (targets != 2).sum()  # noqa: E731  # not the mean's, so that is not checked
    options = {"weight": weight, "clip_norm": 0.5, "check_weight": False}
    train = functools.partial(train_on_batches, criterion=own_loss, **options)
    compare(world, train, nonfinite_gradients="skip")


@on_ranks(2, 3)
def test_bits_are_looked_at(world):
    """The digest shows a change in the order of sums by one bit: a different number of shards gives another digest."""
    assert compare(world, train_on_batches, 8) != compare(world, train_on_batches, 7)


@several
def test_near_one_process(world):
    """Without dropout and BatchNorm the gradient is that of the whole batch, up to rounding."""
    torch.manual_seed(0)
    model = nn.Linear(6, 3, dtype=torch.float64)
    reference = nn.Linear(6, 3, dtype=torch.float64)
    trainer = create_distributed_trainer(model, reproducible=8)
    reference.load_state_dict(model.state_dict())
    x = torch.randn(19, 6, dtype=torch.float64)
    y = torch.arange(19) % 3
    expected = F.cross_entropy(reference(x), y)
    expected.backward()
    loss = trainer.train_step(x, y, nn.CrossEntropyLoss(), adam(model))
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-13, atol=0)
    torch.testing.assert_close(model.weight.grad, reference.weight.grad, rtol=1e-12, atol=1e-15)
    trainer.close()


@pytest.mark.parametrize("num_shards", [1, 2, 5, 8, 13])
def test_tree(num_shards):
    """For any number of ranks, the ranks' nodes together make up the tree, and each node is complete."""

    def leaves(node):
        return [node[0]] if node[1] - node[0] == 1 else [leaf for half in halves(node) for leaf in leaves(half)]

    for num_ranks in range(1, num_shards + 1):
        nodes = [whole_nodes((0, num_shards), own_shards(num_shards, rank, num_ranks)) for rank in range(num_ranks)]
        assert [leaf for own in nodes for node in own for leaf in leaves(node)] == list(range(num_shards))
        assert max(map(len, nodes)) <= 2 * num_shards.bit_length()


@several
def test_different_computers(world, monkeypatch):
    """Different computers are refused with the same text on every rank, unless the instruction sets are forced."""
    group = world.group()
    number = torch.get_num_threads()
    cpu = "Vendor (avx avx2)" if world.rank == 1 else "Vendor (avx avx2 avx512f)"
    environ = dict(os.environ)
    with pytest.raises(MismatchError) as error:
        check_computers(group, environ, cpu)
    (message,) = set(world.gather(str(error.value)))
    assert "CPU is Vendor (avx avx2 avx512f) on rank 0 and Vendor (avx avx2) on rank 1" in message
    assert "ATEN_CPU_CAPABILITY=avx2, MKL_CBWR=AVX2 and ONEDNN_MAX_CPU_ISA=AVX2" in message
    forced = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    check_computers(group, environ | forced, cpu)
    with pytest.raises(MismatchError, match=r"MKL_CBWR is AVX2 on rank 0 and AVX512 on rank 1.*same value"):
        check_computers(group, environ | forced | ({"MKL_CBWR": "AVX512"} if world.rank == 1 else {}), cpu)
    with pytest.raises(MismatchError, match="threads is 1 on rank 0 and 2 on rank 1"):
        check_computers(group, environ | {"OMP_NUM_THREADS": "2" if world.rank == 1 else "1"}, "same")
    torch.set_num_threads(number)


@on_ranks(2)
def test_wrong_arguments(world):
    for options, text in [
        ({"reproducible": 0}, "reproducible must be a number of shards"),
        ({"reproducible": True}, "reproducible must be a number of shards"),
        ({"reproducible": 8, "split_batches": False}, "pass whole batches, or use trainer.loader"),
        ({"reproducible": 8, "shard": "optimizer"}, "pass shard or reproducible"),
        ({"reproducible": 8, "compression": "bfloat16"}, "pass compression or reproducible"),
        ({"reproducible": 1}, "too few for 2 ranks"),
    ]:
        with pytest.raises(ValueError, match=text):
            create_distributed_trainer(Net(), **options)
    trainer = create_distributed_trainer(model := Net(), reproducible=8)
    with pytest.raises(ValueError, match="leave microbatches out"):
        trainer.train_step(*batch(16, torch.float32), nn.CrossEntropyLoss(), adam(model), microbatches=2)
    with pytest.raises(ValueError, match="not in manual loops"), trainer.forward():
        pass
    with pytest.raises(ValueError, match="not in manual loops"):
        trainer.backward(model(batch(16, torch.float32)[0]).sum(), weight=1.0)
    next(iter(trainer.loader(Noisy(), 12)))  # train_step takes parts from now on
    with pytest.raises(ValueError, match=r"pass what trainer\.loader gives"):
        trainer.train_step(*batch(3 if world.rank else 6, torch.float32), nn.CrossEntropyLoss(), adam(model))
    trainer.close()


SCRIPT = """
import sys
sys.path[:0] = {folders!r}
import torch
from distributed_trainer import create_distributed_trainer
from test_reproducible import Net, train_on_batches, train_with_loader

results = []
for train in (train_on_batches, train_with_loader):
    torch.manual_seed(0)
    with create_distributed_trainer(Net(), reproducible=8) as trainer:
        results.append(train(trainer))
if trainer.rank == 0:
    print("digests", *results)
"""


@pytest.mark.long
@pytest.mark.timeout(200)
def test_launches(tmp_path):
    """Jobs of 1, 2, 3, 4 and 8 ranks, and of 4 ranks on two simulated machines, have the same bits."""
    (tmp_path / "train.py").write_text(
        SCRIPT.format(folders=[str(Path(file).parent) for file in (__file__, ranks.__file__)])
    )
    lines = set()
    for job in (JobSpec(1), JobSpec(2), JobSpec(3), JobSpec(4), JobSpec(8), JobSpec(4, 2)):
        command = [mpirun_path(), "-np", str(job.num_ranks), sys.executable, "train.py"]
        result = subprocess.run(
            command, cwd=tmp_path, env=job_environment(job), capture_output=True, text=True, timeout=100
        )
        assert result.returncode == 0, result.stdout + result.stderr
        lines |= {line for line in result.stdout.splitlines() if line.startswith("digests")}
    assert len(lines) == 1


class MovingAverage(nn.Module):
    """Linear layer that keeps a moving average of its weight in a parameter."""

    def __init__(self):
        super().__init__()
        self.linear, self.average = nn.Linear(3, 2), nn.Linear(3, 2).requires_grad_(False)

    def forward(self, x):
        with torch.no_grad():
            self.average.weight.lerp_(self.linear.weight, 0.1)
        return self.linear(x) + self.average(x)


@on_ranks(1, 2, 3)
def test_forward_that_writes_to_weights(world):
    """It would write once for each shard of a rank, so as many times as the number of ranks decides."""
    model = MovingAverage()
    trainer = create_distributed_trainer(model, reproducible=4)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.linear.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="With reproducible= a rank computes its shards one after the other") as raised:
        trainer.train_step(torch.randn(8, 3), torch.randn(8, 2), nn.MSELoss(), optimizer)
    same_message(world, raised)
    assert torch.equal(model.linear.weight, before["linear.weight"])
    model.load_state_dict(before)  # the ranks have written to it differently often
    trainer.close()
