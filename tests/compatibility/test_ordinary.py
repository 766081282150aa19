# SPDX-License-Identifier: Apache-2.0
"""Ordinary training.

These scripts show that the comparison itself works; other files have what is out of the ordinary.
"""

import torch
from compatibility import refused, works
from small_models import F64, Net, NormNet, batch, sgd
from torch import nn


@works("a convolutional network, `nn.CrossEntropyLoss`, SGD with momentum")
def test_convolutions(run):
    model = run.start(Net(F64))
    optimizer = sgd(model)
    for step in range(3):
        run.step(*batch(4, F64, step), nn.CrossEntropyLoss(), optimizer)


@works("BatchNorm")
def test_batchnorm(run):
    model = run.start(NormNet(F64))
    optimizer = sgd(model)
    for step in range(3):
        run.step(*batch(5, F64, step), nn.CrossEntropyLoss(), optimizer)


@refused(
    "an optimizer with parameters that are not the model's",
    "the optimizer has 1 parameter.s. that are not the model's",
    instead="make the optimizer from `model.parameters()`",
)
def test_foreign_parameter(run):
    model = run.start(Net(F64))
    optimizer = torch.optim.SGD([*model.parameters(), nn.Parameter(torch.zeros(1))], lr=0.1)
    run.step(*batch(4, F64), nn.CrossEntropyLoss(), optimizer)
