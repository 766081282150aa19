# SPDX-License-Identifier: Apache-2.0
"""The trainer that a user calls, and one step from batch to update."""
