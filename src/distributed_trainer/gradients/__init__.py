# SPDX-License-Identifier: Apache-2.0
"""Gradients: the hooks that collect them, the buckets that hold them, and their sums over the ranks."""
