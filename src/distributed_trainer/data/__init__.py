# SPDX-License-Identifier: Apache-2.0
"""Batches, this rank's part of each batch, and the part's weight in the mean."""
