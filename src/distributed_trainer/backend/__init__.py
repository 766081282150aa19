# SPDX-License-Identifier: Apache-2.0
"""torch.distributed over MPI: the job and its groups."""
