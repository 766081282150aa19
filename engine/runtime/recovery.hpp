// SPDX-License-Identifier: Apache-2.0
// Agreement of an engine's ranks on who continues: without ranks that were killed, and with processes that replace
// them.
//
// Each way ends with a communicator of the ranks that continue, over which Engine makes its successor.
#pragma once

#include <chrono>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "mpi/communicator.hpp"
#include "mpi/replacement.hpp"
#include "runtime/control_channel.hpp"
#include "runtime/driver.hpp"
#include "runtime/stall_monitor.hpp"

namespace dtrain {

class Recovery {
 public:
  // Parts of the engine that Recovery uses; they live longer than Recovery.
  struct Parts {
    Driver& driver;
    ControlChannel& control;
    StallMonitor& monitor;
  };

  // `survives_deaths`: without it, Recovery does not look for deaths.
  Recovery(const mpi::Communicator& world, const Parts& parts, bool survives_deaths);
  Recovery(const Recovery&) = delete;
  Recovery& operator=(const Recovery&) = delete;

  // Looks for deaths on other nodes, which the monitor cannot see. Called by threads that wait.
  void look_for_deaths();
  // Whether a rank was killed. If so, all operations of all groups fail and nothing can be set up any more. Waits up to
  // `timeout`, since errors may arrive before MPI reports the death. Local.
  bool has_lost_rank(std::chrono::milliseconds timeout);

  // Returns a communicator of the ranks that live, in their order, after has_lost_rank(). Returns none if one of them
  // is in agree_on_end(): then the other ranks have reached their end. Collective over the ranks that live, blocks.
  std::optional<mpi::Communicator> agree_on_living();
  // Tells ranks that may be in agree_on_living() that this rank has reached its end; a rank may have been killed after
  // it had taken part in this one's last operation. Collective over the ranks that live, blocks.
  void agree_on_end();

  // Starts a process to replace a rank that was killed. Local, returns at once; call it on rank 0.
  void start_replacement(const std::string& command, const std::vector<std::string>& arguments,
                         const std::string& folder);
  // Whether there is such a process, and whether it waits in join(). Local.
  bool has_replacement();
  bool has_ready_replacement();
  // Returns a communicator of all ranks and of that process, which becomes the last rank. Call it once
  // has_ready_replacement() is true on rank 0. Collective over all ranks, blocks.
  mpi::Communicator admit();
  // Returns the same communicator in the new process, on an engine of that process alone; or none if the process is not
  // needed any more. Throws mpi::Error if the rank that has started it is gone.
  std::optional<mpi::Communicator> join();
  // Tells the new process, if there is one, that it is not needed. Local.
  void dismiss_replacement();

  // Takes over the process that an earlier engine has started.
  void take_replacement(Recovery& earlier) { replacement_ = std::move(earlier.replacement_); }
  // Keeps a communicator of all ranks, made when all agreed, for a group that is created later.
  void add_spare(const mpi::Communicator& spare) { spares_.push_back(spare); }
  std::optional<mpi::Communicator> take_spare();

 private:
  void revoke_all();

  const mpi::Communicator world_;
  const Parts parts_;
  const bool survives_deaths_;
  std::chrono::steady_clock::time_point next_look_;  // used by the holder of the driver's pause
  bool have_others_ended_ = false;
  std::vector<mpi::Communicator> spares_;
  std::shared_ptr<mpi::Replacement> replacement_;
};

}  // namespace dtrain
