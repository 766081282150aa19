// SPDX-License-Identifier: Apache-2.0
// A process that MPI starts in the place of a rank that was killed.
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

// On the rank that starts it. MPI starts a process only when that has initialised MPI, so a thread waits for it.
class Replacement {
 public:
  // Returns at once; the process runs `command` with `arguments` in `folder`.
  Replacement(const std::string& command, const std::vector<std::string>& arguments, const std::string& folder);
  ~Replacement();
  Replacement(const Replacement&) = delete;
  Replacement& operator=(const Replacement&) = delete;

  // Whether it waits to be admitted.
  bool is_ready();
  // Whether it could not be started, or has ended.
  bool has_failed();
  // Has it end; blocks until it runs. Local.
  void dismiss();

  // In any process, before MPI is initialised: a new one would wait there for ever for the rank that has started it, if
  // that dies, so it ends then. None in others.
  static std::optional<Deadline> guard_start();
  // In the process: whether it is one, and its way in. Throws Error if the rank that has started it is gone; returns
  // none if it is to end.
  static bool is_this_process();
  static std::optional<Communicator> join();

 private:
  friend Communicator admit(const Communicator& living, Replacement* own);
  void start(std::string command, std::vector<std::string> arguments, std::string folder);

  std::atomic<bool> is_started_ = false;
  std::atomic<bool> has_failed_ = false;
  MPI_Comm connection_ = MPI_COMM_NULL;
  std::thread thread_;
};

// Collective over `living` and the new process, which is in join(); blocks. A communicator of these, the new one last.
// `own`: on rank 0, which has started it. Throws Error on all of `living` if a rank dies meanwhile.
Communicator admit(const Communicator& living, Replacement* own);

}  // namespace dtrain::mpi
