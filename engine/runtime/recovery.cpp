// SPDX-License-Identifier: Apache-2.0
// How an engine goes on without ranks that were killed.
#include <numeric>

#include "mpi/library.hpp"
#include "runtime/engine.hpp"

namespace dtrain {

using std::chrono::milliseconds;
using std::chrono::steady_clock;

// By the watch's thread, or by whoever meets an error of MPI's first.
void Engine::lose_rank(const std::string& reason) {
  if (has_lost_rank_.exchange(true)) return;
  world_.revoke();
  if (control_) control_->revoke();
  std::vector<std::shared_ptr<Group>> groups;
  {
    const std::scoped_lock lock(drive_mutex_);
    groups = groups_;
  }
  for (const auto& group : groups) {
    group->communicator().revoke();
    give_up(*group, reason);
  }
  own_doorbell().ring();
}

bool Engine::has_lost_rank(milliseconds timeout) {
  if (!options_.survives_deaths) return false;
  const auto deadline = steady_clock::now() + timeout;
  while (!has_lost_rank_ && steady_clock::now() < deadline) std::this_thread::sleep_for(milliseconds(1));
  return has_lost_rank_;
}

std::shared_ptr<Engine> Engine::recover() {
  lose_rank("the job goes on without the ranks that were killed");
  stop_thread();
  mpi::Communicator living = world_;
  for (;;) {
    {
      std::vector<int> everyone(static_cast<std::size_t>(size()));
      std::iota(everyone.begin(), everyone.end(), 0);
      const Watch::Waiting waiting(*watch_, everyone, {.collective = Collective::set_up});
      living = living.shrink();
    }
    watch_->close();
    try {
      std::shared_ptr<Engine> next(new Engine(options_, living));
      retire();
      return next;
    } catch (const mpi::Error&) {
      living.revoke();  // another has died meanwhile
    }
  }
}

// Lets go of what only the end of MPI would free.
void Engine::retire() {
  {
    const std::scoped_lock lock(inbox_mutex_);
    is_closed_ = true;
  }
  const std::scoped_lock lock(drive_mutex_);
  for (const auto& group : groups_) left_communicators_.push_back(group->communicator());
  groups_.clear();
  try {
    for (mpi::Communicator& communicator : left_communicators_) communicator.close();
    world_.close();
  } catch (const mpi::Error&) {
    // They stay until the process ends.
  }
}

}  // namespace dtrain
