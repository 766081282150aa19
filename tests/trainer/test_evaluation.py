# SPDX-License-Identifier: Apache-2.0
"""trainer.evaluate counts every sample once, for any number of ranks and last batch; compared with one process."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from ranks import mixed, mixed_and_four, on_ranks
from small_models import F64, PAD, Net, NormNet, batch, masked, num_tokens
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from distributed_trainer import MismatchError, create_distributed_trainer

SIZES = [(1, 1), (7, 3), (13, 4), (12, 4)]  # sizes of the dataset and of a batch


def accuracy(outputs, targets):
    return outputs.argmax(1) == targets


def mean_size(outputs, targets):
    return outputs.square().sum(1).mean()


CRITERIA = {
    "mean": nn.CrossEntropyLoss(),
    "sum": nn.CrossEntropyLoss(reduction="sum"),
    "weights": nn.CrossEntropyLoss(torch.tensor([0.1, 2.0, 0.7, 5.0], dtype=F64), ignore_index=1),
    "terms": lambda outputs, y: {"fit": F.cross_entropy(outputs, y), "size": outputs.square().sum(1).mean()},
}


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@mixed_and_four
def test_loss(world, sizes, criterion):
    x, y = batch(sizes[0], F64)
    y[0] = 0  # at least one target is not ignored
    model, reference = Net(F64), Net(F64)
    trainer = create_distributed_trainer(model)
    expected = CRITERIA[criterion](reference(x), y)
    for loader in (DataLoader(TensorDataset(x, y), sizes[1]), trainer.loader(TensorDataset(x, y), sizes[1])):
        result = trainer.evaluate(loader, CRITERIA[criterion], {"accuracy": accuracy, "size": mean_size})
        losses, others = (
            (list(result["loss"].values()), list(expected.values()))
            if criterion == "terms"
            else ([result["loss"]], [expected])
        )
        assert losses == pytest.approx([other.item() for other in others], rel=1e-12)
        assert result["accuracy"] == accuracy(reference(x), y).double().mean().item()
        assert result["size"] == pytest.approx(mean_size(reference(x), y).item(), rel=1e-12)
        assert len(set(map(str, world.gather(result)))) == 1
    trainer.close()


@mixed
def test_modes(world):
    """BatchNorm's running statistics are used and not changed; every module's mode is restored."""
    model = NormNet(F64)
    model.norm.eval()
    trainer = create_distributed_trainer(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x, y = batch(5, F64)
    result = trainer.evaluate([(x, y)], nn.CrossEntropyLoss())
    assert (model.training, model.norm.training, model.norm1.training) == (True, False, True)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    assert result["loss"] == pytest.approx(F.cross_entropy(model.eval()(x), y).item(), rel=1e-12)
    trainer.close()


@mixed
def test_parts(world):
    """Each rank has its own loader, and their lengths differ; rank 0's is empty if there are others."""
    trainer = create_distributed_trainer(model := Net(F64), split_batches=False)
    own = [batch(3 + number, F64, 10 * world.rank + number) for number in range(world.rank or world.size == 1)]
    union = [torch.cat(tensors) for tensors in zip(*itertools.chain(*world.gather(own)), strict=True)]
    result = trainer.evaluate(own, nn.CrossEntropyLoss(), {"accuracy": accuracy})
    assert result["loss"] == pytest.approx(F.cross_entropy(model(union[0]), union[1]).item(), rel=1e-12)
    assert result["accuracy"] == accuracy(model(union[0]), union[1]).double().mean().item()
    with pytest.raises(ValueError, match="no samples, on any rank"):
        trainer.evaluate([], nn.CrossEntropyLoss())
    trainer.close()


@mixed
def test_weight(world):
    x, y = batch(13, F64)
    y[torch.tensor([0, 4, 5, 6, 7, 12])] = PAD
    trainer = create_distributed_trainer(model := Net(F64))
    loader = DataLoader(TensorDataset(x, y), 5)
    result = trainer.evaluate(loader, masked, weight=num_tokens)
    assert result["loss"] == pytest.approx(masked(model(x), y).item(), rel=1e-12)
    trainer.close()


@pytest.mark.parametrize("num_samples", [3, 13])
@on_ranks(1, 4)
def test_torchmetrics(world, num_samples):
    """Metrics keep counts, or lists of all outputs; some ranks have no samples."""
    import torchmetrics

    def make():
        return {
            "accuracy": torchmetrics.classification.MulticlassAccuracy(4),
            "auroc": torchmetrics.classification.MulticlassAUROC(4),  # keeps all outputs
            "confusion": torchmetrics.classification.MulticlassConfusionMatrix(4),
        }

    x, y = batch(num_samples, F64)
    model = nn.Sequential(Net(F64), nn.Softmax(1))  # given logits, AUROC decides in each batch how to treat them
    trainer = create_distributed_trainer(model)
    metrics, plain = make(), make()
    for _ in range(2):  # the metrics are reset in between
        result = trainer.evaluate(DataLoader(TensorDataset(x, y), 5), None, metrics)
    assert result.keys() == metrics.keys()
    for name, metric in plain.items():
        metric.update(model(x).detach(), y)
        torch.testing.assert_close(result[name], metric.compute(), rtol=1e-6, atol=1e-7)
        gathered = world.gather(result[name].tolist())
        assert all(other == gathered[0] for other in gathered)
        assert metrics[name].dist_sync_fn is None
    trainer.close()


@on_ranks(2, 3)
def test_different_batches(world):
    trainer = create_distributed_trainer(Net(F64))
    x, y = batch(6, F64, seed=world.rank)
    with pytest.raises(MismatchError, match=r"rank.* 1.* a different batch than rank 0"):
        trainer.evaluate([(x, y)], nn.CrossEntropyLoss())
    trainer.close()


def _one_ahead(batches):
    iterator = iter(batches)
    waiting = [next(iterator)]
    for pair in iterator:
        waiting.append(pair)
        yield waiting.pop(0)
    yield from waiting


@mixed
def test_iterators(world):
    """Parts stay parts in whatever iterates over a loader; parts that were kept in a list are refused."""
    model = Net(F64)
    trainer = create_distributed_trainer(model)
    x, y = batch(13, F64)
    criterion = nn.CrossEntropyLoss()
    iterators = {
        "progress": trainer.progress,
        "iter": iter,
        "first": lambda loader: itertools.islice(loader, 2),
        "generator": lambda loader: (pair for pair in loader),
        "enumerate": lambda loader: (pair for _, pair in enumerate(loader)),
        "zip": lambda loader: (pair for _, pair in zip(itertools.count(), loader, strict=False)),
        "changed": lambda loader: ((inputs * 1.0, targets) for inputs, targets in loader),
        "one ahead": _one_ahead,
    }
    for name, around in iterators.items():
        number = 8 if name == "first" else 13
        expected = criterion(model(x[:number]), y[:number]).item()
        for loader in (trainer.loader(TensorDataset(x, y), 4), DataLoader(TensorDataset(x, y), 4)):
            result = trainer.evaluate(around(loader), criterion)
            assert result["loss"] == pytest.approx(expected, rel=1e-12), name
    kept = list(trainer.loader(TensorDataset(x, y), 4))
    if world.size > 1:
        with pytest.raises(MismatchError, match="such as into a list, pass the loader"):
            trainer.evaluate(kept, criterion)
    trainer.close()


@on_ranks(1, 2)
def test_wrong_arguments(world):
    trainer = create_distributed_trainer(Net(F64))
    x, y = batch(6, F64)
    with pytest.raises(ValueError, match=r"pairs \(inputs, targets\)"):
        trainer.evaluate([{"x": x, "y": y}], nn.CrossEntropyLoss())
    with pytest.raises(TypeError, match=r"metrics\['a'\] must be a function"):
        trainer.evaluate([(x, y)], None, {"a": 3})
    with pytest.raises(ValueError, match="pass a criterion too"):
        trainer.evaluate([(x, y)], weight=len)
    with pytest.raises(ValueError, match='cannot be named "loss"'):
        trainer.evaluate([(x, y)], nn.CrossEntropyLoss(), {"loss": accuracy})
    trainer.close()


class Calls(nn.Module):
    """Layer that counts its calls, in evaluation mode, too."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2, dtype=F64)
        self.register_buffer("count", torch.zeros((), dtype=F64))

    def forward(self, x):
        self.count += 1
        return self.linear(x) * self.count


@mixed
def test_buffers(world):
    """Buffers that forward changes are those of one process afterwards, also on ranks whose parts were empty."""
    trainer = create_distributed_trainer(model := Calls())
    batches = [(torch.ones(size, 3, dtype=F64), torch.ones(size, 2, dtype=F64)) for size in (4, 1, 1)]
    trainer.evaluate(batches, nn.MSELoss())
    assert model.count == 3
    trainer.close()
