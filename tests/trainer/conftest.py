# SPDX-License-Identifier: Apache-2.0
"""Fixtures that several tests of the trainer use."""

import pytest

from distributed_trainer.gradients import direct_linear, layout


@pytest.fixture
def small_buckets(monkeypatch):
    """Use a bucket for each parameter, and compute the gradients of all linear layers in place."""
    monkeypatch.setattr(layout, "BUCKET_BYTES", 1)
    monkeypatch.setattr(direct_linear, "MIN_BYTES", 0)
