// SPDX-License-Identifier: Apache-2.0
// The MPI library of this process: start, end, version, and the one check that every MPI call goes through.
#pragma once

#include <source_location>
#include <stdexcept>
#include <string>
#include <utility>

namespace dtrain::mpi {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Throws Error naming `call`, the place and MPI's own text unless `code` is MPI_SUCCESS.
void check(int code, const char* call, std::source_location where = std::source_location::current());

// Initialises MPI with MPI_THREAD_MULTIPLE unless that has been done; returns whether this call did it.
// Whoever initialises finalises. Throws if the thread level in force is lower.
bool initialize();

// Collective. Does nothing where MPI is finalised already.
void finalize();

bool is_finalized();

// Instead, where MPI may have lost ranks: its end waits for some that die as it is called. Tells the launcher that this
// process ends as it should, and nothing may call MPI any more. Local. Open MPI alone.
void leave();

// Whether MPI lives on when a rank dies, so that Communicator's revoke(), shrink() and has_failed() can be called. So
// far with Open MPI 5 alone, under `mpirun --with-ft ulfm`. After MPI is initialised.
bool survives_deaths();

// This process's rank in the world of the launch, and that world's size.
std::pair<int, int> world_rank_and_size();

// First line of what the library says of itself, e.g. "Open MPI v5.0.11, ...".
std::string library_version();

// Ends all ranks of the job with `exit_code`. Does not return.
[[noreturn]] void abort(int exit_code);

}  // namespace dtrain::mpi
