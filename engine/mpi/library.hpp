// SPDX-License-Identifier: Apache-2.0
// MPI library of this process: start, end, version, and the one check that every MPI call goes through.
#pragma once

#include <source_location>
#include <stdexcept>
#include <string>
#include <utility>

namespace dtrain::mpi {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Throws Error, which names `call`, the place and MPI's own text, unless `code` is MPI_SUCCESS.
void check(int code, const char* call, std::source_location where = std::source_location::current());

// Initialises MPI with MPI_THREAD_MULTIPLE unless it is initialised already; returns whether this call did it. Whoever
// initialises MPI finalises it. Throws Error if the thread level in force is lower, or if MPI was finalised.
bool initialize();

// Finalises MPI. Collective. Does nothing if MPI is finalised already.
void finalize();

bool is_finalized();

// Ends this process's use of MPI without finalize(), where MPI may have lost ranks: MPI_Finalize waits for some ranks
// that die while it is called. Tells the launcher that this process ends in good order; nothing may call MPI
// afterwards. Local. Only for Open MPI.
void leave();

// Whether MPI continues when a rank dies, so that Communicator's revoke(), shrink() and has_failed() can be called. So
// far only Open MPI 5 under `mpirun --with-ft ulfm` does. Call it after MPI is initialised.
bool survives_deaths();

// This process's rank in the world of the launch, and the size of that world.
std::pair<int, int> world_rank_and_size();

// First line of the library's description of itself, e.g. "Open MPI v5.0.11, ...".
std::string library_version();

// Ends all ranks of the job with `exit_code`. Does not return.
[[noreturn]] void abort(int exit_code);

}  // namespace dtrain::mpi
