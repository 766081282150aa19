# SPDX-License-Identifier: Apache-2.0
"""Access to private parts of a trainer, for tests of things that nothing public shows."""


def session_of(trainer):
    """Return the trainer's present `Session`."""
    return trainer._session


def gradients_of(trainer):
    """Return the trainer's `GradientReducer`."""
    return trainer._session.replica.gradients


def buckets_of(trainer):
    """Return the reducer's buckets; there are none before the end of the first step."""
    return gradients_of(trainer)._buckets


def shares_of(trainer):
    """Return the ranks' shares of the next batch; None if they are equal."""
    return trainer._session.handshake.balance.split.shares


def write_in_progress(trainer):
    """Return the `BackgroundWrite` of the checkpoint that is being written; None if there is none."""
    return trainer._checkpointer._writing
