// SPDX-License-Identifier: Apache-2.0
// MPI's proposed functions for jobs that lose ranks (user-level failure mitigation). In an MPI without them their
// addresses are null.
#pragma once

#include <mpi.h>

extern "C" {
int MPIX_Comm_revoke(MPI_Comm communicator) __attribute__((weak));
int MPIX_Comm_is_revoked(MPI_Comm communicator, int* flag) __attribute__((weak));
int MPIX_Comm_shrink(MPI_Comm communicator, MPI_Comm* shrunk) __attribute__((weak));
int MPIX_Comm_agree(MPI_Comm communicator, int* flag) __attribute__((weak));
int MPIX_Comm_get_failed(MPI_Comm communicator, MPI_Group* failed) __attribute__((weak));
}
