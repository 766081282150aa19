# SPDX-License-Identifier: Apache-2.0
"""This rank's model, kept equal to the other ranks' models."""
