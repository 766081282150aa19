// SPDX-License-Identifier: Apache-2.0
#include "runtime/recovery.hpp"

#include <algorithm>
#include <mutex>
#include <thread>
#include <utility>

#include "mpi/deadline.hpp"

namespace dtrain {
namespace {

using std::chrono::milliseconds;
using std::chrono::steady_clock;

constexpr Call set_up{.collective = Collective::set_up};

}  // namespace

Recovery::Recovery(const mpi::Communicator& world, const Parts& parts, bool survives_deaths)
    : world_(world), parts_(parts), survives_deaths_(survives_deaths) {}

void Recovery::look_for_deaths() {
  constexpr milliseconds between_looks(20);
  if (!survives_deaths_ || parts_.driver.has_lost_rank()) return;
  const Driver::Pause pause(parts_.driver, std::try_to_lock);
  if (!pause || steady_clock::now() < next_look_) return;
  next_look_ = steady_clock::now() + between_looks;
  if (world_.has_failed()) parts_.driver.lose_rank();
}

bool Recovery::has_lost_rank(milliseconds timeout) {
  if (!survives_deaths_) return false;
  const auto deadline = steady_clock::now() + timeout;
  while (!parts_.driver.has_lost_rank() && steady_clock::now() < deadline) {
    look_for_deaths();
    std::this_thread::sleep_for(milliseconds(1));
  }
  return parts_.driver.has_lost_rank();
}

// Makes ranks that wait for this one stop waiting and recover too, if they do not know of the death yet.
void Recovery::revoke_all() {
  Driver::Pause pause(parts_.driver);
  pause.fail_all();
  world_.revoke();
  parts_.control.revoke();
  for (const mpi::Communicator& spare : spares_) spare.revoke();
  for (const auto& group : pause.groups()) group->communicator().revoke();
}

std::optional<mpi::Communicator> Recovery::agree_on_living() {
  StallMonitor& monitor = parts_.monitor;
  parts_.driver.lose_rank();
  {
    const mpi::Deadline deadline("operations that it has begun with a killed rank");
    parts_.driver.stop_thread();
    revoke_all();
    // The monitor sees a death before MPI does, but no death on another machine.
    world_.await_failures(std::max(1, world_.size() - static_cast<int>(monitor.living().size())));
  }
  const StallMonitor::Waiting waiting(monitor, monitor.living(), set_up);
  const mpi::Deadline deadline("the agreement of the ranks that live",
                               mpi::Deadline::longest_of(world_.rank(), world_.size()),
                               [&monitor] { return monitor.are_all_in_set_ups(); });
  have_others_ended_ = !world_.agree_of_living(true);
  if (have_others_ended_) return std::nullopt;
  return world_.shrink();
}

void Recovery::agree_on_end() {
  if (survives_deaths_ && !have_others_ended_) world_.agree_of_living(false);
}

void Recovery::start_replacement(const std::string& command, const std::vector<std::string>& arguments,
                                 const std::string& folder) {
  replacement_ = std::make_shared<mpi::Replacement>(command, arguments, folder);
}

bool Recovery::has_replacement() {
  if (replacement_ && replacement_->has_failed()) replacement_.reset();
  return replacement_ != nullptr;
}

bool Recovery::has_ready_replacement() { return replacement_ && replacement_->is_ready(); }

mpi::Communicator Recovery::admit() {
  parts_.driver.stop_thread();
  const std::shared_ptr<mpi::Replacement> own = std::move(replacement_);
  const StallMonitor::Waiting waiting(parts_.monitor, parts_.monitor.living(), set_up);
  return mpi::admit(world_, own.get());
}

std::optional<mpi::Communicator> Recovery::join() {
  parts_.driver.stop_thread();
  return mpi::Replacement::join();
}

void Recovery::dismiss_replacement() {
  if (replacement_) replacement_->dismiss();
}

std::optional<mpi::Communicator> Recovery::take_spare() {
  if (spares_.empty()) return std::nullopt;
  const mpi::Communicator spare = spares_.back();
  spares_.pop_back();
  return spare;
}

}  // namespace dtrain
