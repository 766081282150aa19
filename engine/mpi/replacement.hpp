// SPDX-License-Identifier: Apache-2.0
// A process that MPI starts to replace a rank that was killed.
#pragma once

#include <mpi.h>

#include <atomic>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "mpi/communicator.hpp"
#include "mpi/deadline.hpp"

namespace dtrain::mpi {

// Handle of the new process on the rank that starts it; the static functions are for the new process itself.
// MPI_Comm_spawn returns only when the new process has initialised MPI, so a thread waits for it.
class Replacement {
 public:
  // Returns at once; the process runs `command` with `arguments` in `folder`.
  Replacement(const std::string& command, const std::vector<std::string>& arguments, const std::string& folder);
  ~Replacement();
  Replacement(const Replacement&) = delete;
  Replacement& operator=(const Replacement&) = delete;

  // Whether the process waits to be admitted.
  bool is_ready();
  // Whether the process could not be started, or has ended.
  bool has_failed();
  // Makes the process end; blocks until it has started. Local.
  void dismiss();

  // Guards the start of MPI in a new process: it would wait there for ever if the rank that has started it dies, so it
  // ends then. Returns none in other processes. Call it before MPI is initialised, in any process.
  static std::optional<Deadline> guard_start();
  // Whether this process is such a new one.
  static bool is_this_process();
  // Waits in the new process until it is admitted. Returns the communicator that admit() returns, or none if the
  // process is to end. Throws Error if the rank that has started it is gone.
  static std::optional<Communicator> join();

 private:
  friend Communicator admit(const Communicator& living, Replacement* own);
  void start(std::string command, std::vector<std::string> arguments, const std::string& folder);

  std::atomic<bool> is_started_ = false;
  std::atomic<bool> has_failed_ = false;
  MPI_Comm connection_ = MPI_COMM_NULL;
  std::thread thread_;
};

// Returns a communicator of `living` and of the new process, which is in join() and becomes the last rank. Collective
// over all of them, blocks. `own` is set on rank 0, which has started the process. Throws Error on all of `living` if a
// rank dies meanwhile.
Communicator admit(const Communicator& living, Replacement* own);

}  // namespace dtrain::mpi
