# SPDX-License-Identifier: Apache-2.0
"""Measure where time goes, and show progress."""
