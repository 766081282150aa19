# SPDX-License-Identifier: Apache-2.0
"""Console command `distributed-trainer` and its sub-commands."""
