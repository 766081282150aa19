# SPDX-License-Identifier: Apache-2.0
"""Buffers.

They have any layout, and `forward` changes them in any way; those that depend on the samples have a rule.
"""

import torch
import torch.nn.functional as F
from compatibility import Run, refused, works
from small_models import F64, regression_batch, sgd
from torch import nn


class Net(nn.Module):
    """Model that multiplies its input by `self.weights(x)`, 4 numbers computed from buffers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).to(F64)

    def forward(self, x):
        return self.layers(x * self.weights(x))


def train(run, model, num_samples=5, num_steps=3, **options):
    model = run.start(model, **options)
    optimizer = sgd(model)
    for step in range(num_steps):
        run.step(*regression_batch(num_samples, step, inputs=4, outputs=2), nn.MSELoss(), optimizer)


class Constants(Net):
    """Buffers of all kinds, which forward reads."""

    def __init__(self, *buffers):
        super().__init__()
        for number, buffer in enumerate(buffers):  # some of these kinds cannot be saved
            self.register_buffer(f"buffer{number}", buffer, persistent=False)

    def weights(self, x):
        dense = [b.to_dense() if b.layout is not torch.strided else b for b in self.buffers()]
        dense = [b.dequantize() if b.is_quantized else b for b in dense]
        return sum((b.abs() if b.is_complex() else b).to(F64).sum() for b in dense) + torch.arange(4.0, dtype=F64)


@works("sparse buffers, COO and CSR")
def test_sparse(run):
    train(run, Constants(torch.eye(3, dtype=F64).to_sparse(), torch.eye(3, dtype=F64).to_sparse_csr()))


@works("quantised buffers")
def test_quantized(run):
    values = torch.linspace(-1, 1, 6).view(2, 3)
    scales, zeros = torch.tensor([0.1, 0.2]), torch.zeros(2, dtype=torch.int64)
    per_channel = torch.quantize_per_channel(values, scales, zeros, 0, torch.qint8)
    train(run, Constants(torch.quantize_per_tensor(values, 0.1, 0, torch.qint8), per_channel))


@works("buffers that are complex, bool, 0-dimensional, empty, expanded, not contiguous, or have 8 or 16 bits")
def test_kinds(run):
    complex_numbers = torch.ones(3, dtype=torch.complex128) * (1 + 2j)
    train(
        run,
        Constants(
            *(complex_numbers, complex_numbers.conj(), complex_numbers.imag, torch.ones(3, dtype=torch.bool)),
            *(torch.ones(()), torch.ones(0, 3), torch.ones(1, 3).expand(5, 3), torch.arange(6.0).view(2, 3).t()),
            *(torch.arange(6.0)[::2], torch.ones(3, dtype=torch.bfloat16), torch.ones(3, dtype=torch.float16)),
            torch.ones(3).to(torch.float8_e4m3fn),
        ),
    )


class Counter(Net):
    """A count of the calls in a buffer, which `count` advances."""

    def __init__(self, count, initial):
        super().__init__()
        self.count = count
        self.register_buffer("calls", initial, persistent=initial is None or not initial.is_sparse)

    def weights(self, x):
        if self.training:
            self.count(self)
        calls = self.calls
        return calls.to_dense().to(F64).sum() if calls is not None else 1.0


def in_place(model):
    model.calls += 1


def replaced(model):
    model.calls = model.calls + 1


def by_data(model):
    model.calls.data.add_(1)


def resized(model):
    model.calls.resize_(len(model.calls) + 1).fill_(len(model.calls))


def to_none(model):
    model.calls = None


def from_none(model):
    model.calls = torch.ones(2, dtype=F64) if model.calls is None else model.calls + 1


def to_sparse(model):
    model.calls = (model.calls.to_dense() + 1).to_sparse()


@works("`forward` writes to a buffer")
def test_written(run):
    train(run, Counter(in_place, torch.zeros(2)))


@works("`forward` writes to a buffer's `.data`")
def test_written_data(run):
    train(run, Counter(by_data, torch.zeros(2)))


@works("`forward` replaces a buffer")
def test_replaced(run):
    train(run, Counter(replaced, torch.zeros(2)))


@works("`forward` writes to an expanded buffer")
def test_written_expanded(run):
    train(run, Counter(lambda model: model.calls[:1].add_(1), torch.zeros(1).expand(3)))


@works("`forward` resizes a buffer")
def test_resized(run):
    train(run, Counter(resized, torch.zeros(2)))


@works("`forward` sets a buffer to None")
def test_to_none(run):
    train(run, Counter(to_none, torch.zeros(2)))


@works("a buffer is None at first")
def test_from_none(run):
    train(run, Counter(from_none, None))


@works("`forward` replaces a sparse buffer")
def test_replaced_sparse(run):
    model = Counter(to_sparse, torch.zeros(3).to_sparse())
    train(run, model)
    return model.calls.to_dense()


@works("`forward` registers a buffer")
def test_registered(run):
    def register(model):
        model.register_buffer(f"extra{len(dict(model.named_buffers()))}", torch.full((2,), 3.0))
        model.calls += 1

    train(run, Counter(register, torch.zeros(2)))


@works("two modules share a buffer")
def test_shared(run):
    model = Counter(in_place, torch.zeros(2))
    model.layers[0].register_buffer("calls", model.calls)
    train(run, model)
    return model.layers[0].calls.sum() == 2 * 3, model.layers[0].calls is model.calls


class Center(Net):
    """A moving average of the batch's mean, as DINO's center."""

    def __init__(self):
        super().__init__()
        self.register_buffer("center", torch.ones(1, 4, dtype=F64))

    def weights(self, x):
        center = self.center.clone()
        self.center.data.mul_(0.9).add_(x.detach().mean(0, keepdim=True), alpha=0.1)
        return center


@works('a moving average of means (DINO\'s center), with `buffers={"center": "mean"}`')
def test_mean(run):
    train(run, Center(), buffers={"center": "mean"})


@works("the same with fewer samples than ranks", ways=("train_step",))
def test_mean_of_few_samples(run):
    train(run, Center(), num_samples=2, buffers={"*": "mean"})


class Codebook(Net):
    """VQ's codebook, moved towards the means of the vectors that are nearest to its entries.

    The update is made at the start of the next forward, from the last batch's vectors.
    """

    def __init__(self):
        super().__init__()
        self.register_buffer("codes", torch.randn(3, 4, dtype=F64))
        self.register_buffer("sizes", torch.ones(3, dtype=F64))
        self.register_buffer("sums", self.codes.clone())
        self.register_buffer("vectors", None)

    def nearest(self, x):
        return F.one_hot(torch.cdist(x, self.codes).argmin(1), 3).to(F64)

    def weights(self, x):
        if self.training:
            if self.vectors is not None:
                nearest = self.nearest(self.vectors)
                self.sizes.data.mul_(0.9).add_(nearest.sum(0), alpha=0.1)
                self.sums.data.mul_(0.9).add_(nearest.t() @ self.vectors, alpha=0.1)
                self.codes.data.copy_(self.sums / self.sizes[:, None])
            self.vectors = x.detach()
        return self.nearest(x) @ self.codes


@works('a codebook that is updated from the vectors of the last batch, with `buffers={"vectors": "gather"}`')
def test_gather(run):
    train(run, Codebook(), num_steps=5, buffers={"vectors": "gather"})


@works("the same with fewer samples than ranks", ways=("train_step",))
def test_gather_few_samples(run):
    train(run, Codebook(), num_samples=2, num_steps=5, buffers={"vectors": "gather"})


class Queue(Net):
    """MoCo's queue: the keys of the last batches, the newest first."""

    def __init__(self):
        super().__init__()
        self.register_buffer("queue", torch.randn(8, 4, dtype=F64))
        self.register_buffer("keys", torch.zeros(0, 4, dtype=F64))

    def weights(self, x):
        if self.training:
            self.queue = torch.cat((self.keys, self.queue))[:8]
            self.keys = F.normalize(x.detach())
        return self.queue.mean(0)


@works('a queue of the last keys (MoCo), which come from a buffer with `buffers={"keys": "gather"}`')
def test_queue(run):
    train(run, Queue(), num_steps=4, buffers={"keys": "gather"})


@works("running statistics of InstanceNorm, with the rule `mean`")
def test_instance_norm(run):
    norm = nn.InstanceNorm1d(4, track_running_stats=True, dtype=F64)
    torch.manual_seed(0)
    model = run.start(nn.Sequential(norm, nn.Flatten(), nn.Linear(12, 2, dtype=F64)), buffers={"0.running_*": "mean"})
    optimizer = sgd(model)
    for step in range(3):
        run.step(*regression_batch(5, step, inputs=(4, 3), outputs=2), nn.MSELoss(), optimizer)


@refused(
    "`buffers=` with a pattern that matches nothing",
    "buffers={'centre': 'mean'} matches no buffer. The model's buffers are center",
    instead="write the name as in `model.named_buffers()`",
)
def test_no_match(run):
    model = Run.start(run, Center())
    train(run, model, buffers={"centre": "mean"})


@refused(
    "the mean of integers",
    'calls is int64, but the rule "mean" needs floating-point numbers',
    instead="keep the mean in a floating-point buffer",
)
def test_mean_of_integers(run):
    model = Run.start(run, Counter(in_place, torch.zeros(2, dtype=torch.int64)))
    train(run, model, buffers={"calls": "mean"})


@refused(
    "several backwards of one graph, with `buffers=`",
    "retain_graph=True does not go with buffers=",
    instead="add the losses, and call `backward` once",
    ways=("manual-loop",),
    ranks=(2, 3),
)
def test_two_backwards(run):
    model = nn.Linear(4, 2, dtype=F64)
    model.register_buffer("center", torch.zeros(2, dtype=F64))
    run.start(model, buffers={"center": "mean"})
    x, _ = run.trainer.split(regression_batch(5, inputs=4, outputs=2))
    with run.trainer.forward():
        loss = model(x).square().mean()
    run.trainer.backward(loss, weight=len(x), retain_graph=True)
