# SPDX-License-Identifier: Apache-2.0
"""Training steps of one process without a trainer, and comparisons of a model with one that they trained."""

import torch
from torch import nn


def plain_step(model, x, y, criterion, optimizer):
    optimizer.zero_grad()
    loss = criterion(model(x), y)
    loss.backward()
    optimizer.step()
    return loss.detach()


def pieces(tensors, num_pieces):
    """Cut all tensors at the same samples; return the pieces, at most one for each sample."""
    num_samples = len(tensors[0])
    num_pieces = min(num_pieces, num_samples)
    return list(zip(*(tensor.tensor_split(num_pieces) for tensor in tensors), strict=True))


def accumulated_step(model, tensors, num_pieces, weight_of, criterion, optimizer, clip_norm=None):
    """Make a step in one process: sum the pieces' gradients by their shares of the weight. Return loss and norm."""
    optimizer.zero_grad()
    total = sum(weight_of(y) for _, y in pieces(tensors, num_pieces))
    losses = []
    for x, y in pieces(tensors, num_pieces):
        if weight_of(y):
            losses.append(criterion(model(x), y) * (weight_of(y) / total))
            losses[-1].backward()
    norm = clip_norm and nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    optimizer.step()
    return sum(loss.detach() for loss in losses), norm


def relative_difference(actual, expected):
    assert torch.isfinite(expected).all()
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def assert_same(found, expected, rtol=1e-12, atol=None):
    """Assert that the tensors of two models or dicts agree; by default float64 sums may be taken in another order.

    Args:
        found: The model, or the dict, under test.
        expected: The reference.
        rtol: Tolerance, relative to each element.
        atol: Absolute tolerance; None takes `rtol` of the tensor's largest element.
    """
    if isinstance(found, torch.nn.Module):
        found, expected = found.state_dict(), expected.state_dict()
    assert list(found) == list(expected)
    for name, tensor in found.items():
        assert torch.isfinite(expected[name]).all(), name
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        message = lambda text, name=name: f"{name}: {text}"  # noqa: E731
        is_scaled = atol is None and expected[name].is_floating_point() and expected[name].numel()
        scale = expected[name].abs().max().item() if is_scaled else 0.0
        torch.testing.assert_close(whole, expected[name], rtol=rtol, atol=atol or rtol * scale, msg=message)
