# SPDX-License-Identifier: Apache-2.0
"""Find or start the launcher and MPI, so that a process becomes a rank. Importing this package imports no torch."""
