# SPDX-License-Identifier: Apache-2.0
"""Steps in several pieces, losses with weights or several terms, and clipping, compared with one process."""

import copy

import pytest
import torch
import torch.nn.functional as F
from one_process import accumulated_step, assert_same, relative_difference
from ranks import mixed, on_ranks
from small_models import F64, PAD, Net, NormNet, batch, masked, num_tokens, sgd
from torch import nn

from distributed_trainer import create_distributed_trainer
from distributed_trainer.data.split import part_bounds

several = on_ranks(2, 3, 4, (3, 2))


@pytest.mark.parametrize("net", [Net, NormNet])
@pytest.mark.parametrize("num_pieces", [2, 3, 5])
@mixed
def test_pieces(world, small_buckets, num_pieces, net):
    """Pieces have all sizes, and some are empty on some ranks; BatchNorm sees each piece on all ranks."""
    model, reference = net(F64), net(F64)
    trainer = create_distributed_trainer(model)
    optimizer, plain_optimizer = sgd(model), sgd(reference)
    for step, num_samples in enumerate([12, 10, 10, 11, 13]):
        tensors = batch(num_samples, F64, step)
        expected, _ = accumulated_step(reference, tensors, num_pieces, len, nn.CrossEntropyLoss(), plain_optimizer)
        loss = trainer.train_step(*tensors, nn.CrossEntropyLoss(), optimizer, microbatches=num_pieces)
        assert relative_difference(loss, expected) <= 1e-11
    assert_same(model, reference, 1e-10)
    trainer.close()


@mixed
def test_more_pieces_than_samples(world):
    model, reference = Net(F64), Net(F64)
    trainer = create_distributed_trainer(model)
    tensors = batch(3, F64)
    accumulated_step(reference, tensors, 1, len, nn.CrossEntropyLoss(), sgd(reference))
    trainer.train_step(*tensors, nn.CrossEntropyLoss(), sgd(model), microbatches=100)
    assert_same(model, reference)
    trainer.close()


@mixed
def test_weights_of_torch(world):
    """Targets have different weights in different pieces; one piece has weight 0."""
    criterion = nn.CrossEntropyLoss(torch.tensor([0.1, 2.0, 0.7, 5.0], dtype=F64), ignore_index=3)
    x, y = batch(13, F64)
    y[4:7] = 3
    model, reference = Net(F64), Net(F64)
    trainer = create_distributed_trainer(model)
    accumulated_step(reference, (x, y), 1, len, criterion, sgd(reference))
    trainer.train_step(x, y, criterion, sgd(model), microbatches=4)
    assert_same(model, reference)
    trainer.close()


@mixed
def test_parts(world, small_buckets):
    """Ranks pass parts of different sizes; rank 1 has no samples in every other step."""
    model, reference = Net(F64), Net(F64)
    trainer = create_distributed_trainer(model, split_batches=False)
    optimizer, plain_optimizer = sgd(model), sgd(reference)
    for step in range(4):
        own = batch(0 if world.rank == 1 and step % 2 else 3 + 2 * world.rank, F64, 10 * step + world.rank)
        union = [torch.cat(tensors) for tensors in zip(*world.gather(own), strict=True)]
        accumulated_step(reference, union, 1, len, nn.CrossEntropyLoss(), plain_optimizer)
        trainer.train_step(*own, nn.CrossEntropyLoss(), optimizer, microbatches=3)
    assert_same(model, reference, 1e-10)
    trainer.close()


class Branch(nn.Module):
    """Layers are used or not depending on the samples."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.extra, self.unused = (nn.Linear(4, 4, dtype=F64) for _ in range(3))

    def forward(self, x):
        output = self.first(x)
        return torch.cat([output[:-1], self.extra(output[-1:])]) if x[-1, 0] == 7 else output


@several
@pytest.mark.parametrize("marked", [0, 8, 11], ids=["first piece", "middle", "last"])
def test_used_in_one_piece(world, small_buckets, marked):
    """One sample uses a parameter, in any piece of any rank; another parameter is not used at all."""
    x = torch.arange(48, dtype=F64).view(12, 4) / 50
    x[marked, 0] = 7
    y = torch.arange(12) % 4
    model = Branch()
    trainer = create_distributed_trainer(model)
    ends = [bounds[1] - 1 for bounds in all_bounds(12, 3, world.size)]
    x[ends[-1], 0] = 7  # the end of a rank's piece, so that `extra` is used
    reference = copy.deepcopy(model)
    loss = 0
    for start, stop in all_bounds(12, 3, world.size):
        loss = loss + F.cross_entropy(reference(x[start:stop]), y[start:stop], reduction="sum") / 12
    loss.backward()
    for _ in range(3):  # the first step lays out the buckets
        optimizer = torch.optim.SGD(model.parameters(), lr=0)
        trainer.train_step(x, y, nn.CrossEntropyLoss(), optimizer, microbatches=3)
        assert model.unused.weight.grad is None
        for name in ("first", "extra"):
            ours, plain = (getattr(of, name).weight.grad for of in (model, reference))
            assert relative_difference(ours, plain) <= 1e-12, name
    trainer.close()


def all_bounds(num_samples, num_pieces, num_ranks):
    for number in range(num_pieces):
        first, last = part_bounds(num_samples, number, num_pieces)
        for rank in range(num_ranks):
            start, stop = part_bounds(last - first, rank, num_ranks)
            if stop > start:
                yield first + start, first + stop


@mixed
def test_sharded(world):
    model, reference = Net(F64), Net(F64)
    trainer = create_distributed_trainer(model, shard="optimizer")
    optimizer, plain_optimizer = sgd(model), sgd(reference)
    for step in range(4):
        tensors = batch(7, F64, step)
        _, norm = accumulated_step(reference, tensors, 3, len, nn.CrossEntropyLoss(), plain_optimizer, clip_norm=0.3)
        trainer.train_step(*tensors, nn.CrossEntropyLoss(), optimizer, microbatches=3, clip_norm=0.3)
        assert relative_difference(trainer.gradient_norm, norm) <= 1e-11
    assert_same(model, reference, 1e-10)
    trainer.close()


@mixed
def test_nonfinite_piece(world):
    """One piece of one rank is not finite, so the step is skipped."""
    model = Net(F64)
    trainer = create_distributed_trainer(model, nonfinite_gradients="skip")
    before = copy.deepcopy(model)
    x, y = batch(12, F64)
    x[5] = torch.inf
    trainer.train_step(x, y, nn.CrossEntropyLoss(), sgd(model), microbatches=3)
    assert trainer.num_skipped_steps == 1
    assert_same(model, before, 0)
    trainer.close()


# ---- weight=


@pytest.mark.parametrize("num_pieces", [1, 3])
@mixed
def test_weight(world, caplog, num_pieces):
    """Padding differs: parts have different numbers of tokens, and some have none."""
    x, y = batch(13, F64)
    y[torch.tensor([0, 4, 5, 6, 7, 12])] = PAD
    model, reference = Net(F64), Net(F64)
    trainer = create_distributed_trainer(model)
    expected, _ = accumulated_step(reference, (x, y), 1, len, masked, sgd(reference))
    loss = trainer.train_step(x, y, masked, sgd(model), weight=num_tokens, microbatches=num_pieces)
    assert relative_difference(loss, expected) <= 1e-12
    assert_same(model, reference)
    assert not [record for record in caplog.records if "counts as a mean over samples" in record.message]
    trainer.close()


@several
def test_warning_names_weight(world, caplog):
    trainer = create_distributed_trainer(model := Net(F64))
    for _ in range(2):
        trainer.train_step(*batch(8, F64), masked, sgd(model), check_weight=False)
    said = [record.message for record in caplog.records if "counts as a mean over samples" in record.message]
    assert len(said) == (world.rank == 0)
    assert all("weight=" in message for message in said)
    trainer.close()


@mixed
def test_weight_of_parts(world):
    """The weight is a number or a function; a rank's whole part may be padding."""
    x, y = batch(5, F64, world.rank)
    y[: world.rank + 2] = PAD  # with 4 ranks, all of the last rank's targets
    union = [torch.cat(tensors) for tensors in zip(*world.gather((x, y)), strict=True)]
    for weight in (num_tokens, float(num_tokens(y))):
        model, reference = Net(F64), Net(F64)
        trainer = create_distributed_trainer(model, split_batches=False)
        accumulated_step(reference, union, 1, len, masked, sgd(reference))
        trainer.train_step(x, y, masked, sgd(model), weight=weight)
        assert_same(model, reference)
        trainer.close()


@mixed
def test_wrong_arguments(world):
    model = Net(F64)
    trainer = create_distributed_trainer(model)
    x, y = batch(8, F64)
    optimizer = sgd(model)
    for options, text in [
        ({"weight": 3.0}, "pass a function of the targets"),
        ({"weight": lambda targets: -1}, "weight= gives -1"),
        ({"weight": lambda targets: 0}, "weight= is 0 for all samples of the batch"),
        ({"microbatches": 0}, 'microbatches must be an int of at least 1, or "auto", not 0'),
        ({"microbatches": 2.0}, "microbatches must be an int"),
        ({"clip_norm": 0}, "clip_norm must be above 0"),
    ]:
        with pytest.raises(ValueError, match=text):
            trainer.train_step(x, y, masked, optimizer, **options)
    with pytest.raises(ValueError, match="so weight= has no meaning"):
        trainer.train_step(x, y, nn.CrossEntropyLoss(reduction="sum"), optimizer, weight=len)
    with pytest.raises(ValueError, match=r"its loss\[1\] has shape \[8\]"):
        trainer.train_step(x, y, lambda outputs, y: (outputs.sum(), y[:0].new_zeros(8)), optimizer)
    trainer.close()


# ---- several terms, clipping


@pytest.mark.parametrize("kind", [tuple, list, dict])
@mixed
def test_terms(world, kind):
    """Each term of the loss is that of the global batch, in the criterion's structure."""

    def criterion(outputs, targets):
        terms = [F.cross_entropy(outputs, targets), 0.1 * outputs.square().mean()]
        return {"fit": terms[0], "size": {"squares": terms[1]}} if kind is dict else kind(terms)

    x, y = batch(7, F64)
    model, reference = Net(F64), Net(F64)
    trainer = create_distributed_trainer(model)
    expected = criterion(reference(x), y)
    terms = [expected["fit"], expected["size"]["squares"]] if kind is dict else expected
    (terms[0] + terms[1]).backward()
    sgd(reference).step()
    loss = trainer.train_step(x, y, criterion, sgd(model), microbatches=2)
    assert type(loss) is kind
    ours = [loss["fit"], loss["size"]["squares"]] if kind is dict else loss
    for term, other in zip(ours, terms, strict=True):
        assert relative_difference(term, other.detach()) <= 1e-12
        assert not term.requires_grad
    assert_same(model, reference)
    trainer.close()


@pytest.mark.parametrize("clip_norm", [0.1, 1e6])
@mixed
def test_clip_norm(world, clip_norm):
    model, reference = Net(F64), Net(F64)
    trainer = create_distributed_trainer(model)
    optimizer, plain_optimizer = sgd(model), sgd(reference)
    assert trainer.gradient_norm is None
    for step in range(3):
        tensors = batch(7, F64, step)
        _, norm = accumulated_step(reference, tensors, 1, len, nn.CrossEntropyLoss(), plain_optimizer, clip_norm)
        trainer.train_step(*tensors, nn.CrossEntropyLoss(), optimizer, clip_norm=clip_norm)
        assert relative_difference(trainer.gradient_norm, norm) <= 1e-11
    assert len(set(world.gather(trainer.gradient_norm.item()))) == 1
    assert_same(model, reference, 1e-11)
    trainer.close()
