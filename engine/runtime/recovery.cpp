// SPDX-License-Identifier: Apache-2.0
// How an engine goes on without ranks that were killed.
#include <algorithm>

#include "mpi/deadline.hpp"
#include "mpi/library.hpp"
#include "runtime/engine.hpp"

namespace dtrain {

using std::chrono::milliseconds;
using std::chrono::steady_clock;

// By any thread. Calls nothing of MPI's, lest the watch gets stuck in it.
void Engine::lose_rank() {
  has_lost_rank_ = true;
  own_doorbell().ring();
}

// Of other nodes, of which the watch sees nothing: by whoever waits.
void Engine::look_for_deaths() {
  constexpr milliseconds between_looks(20);
  if (!options_.survives_deaths || has_lost_rank_) return;
  const std::unique_lock lock(drive_mutex_, std::try_to_lock);
  if (!lock || steady_clock::now() < next_look_for_deaths_) return;
  next_look_for_deaths_ = steady_clock::now() + between_looks;
  if (world_.has_failed()) lose_rank();
}

// With drive_mutex_ held, by whoever drives. Whether there was something to fail.
bool Engine::fail_groups() {
  bool has_failed = false;
  if (!has_lost_rank_) return has_failed;
  for (const auto& group : groups_) {
    if (group->local().has_left()) continue;
    fail(*group, "a rank was killed");
    has_failed = true;
  }
  return has_failed;
}

// Has ranks that wait for this one come here, too, if they do not know of the death yet.
void Engine::revoke_all() {
  const std::scoped_lock lock(drive_mutex_);
  take_inbox();
  fail_groups();
  world_.revoke();
  if (control_) control_->revoke();
  for (const mpi::Communicator& spare : spare_communicators_) spare.revoke();
  for (const auto& group : groups_) group->communicator().revoke();
}

bool Engine::has_lost_rank(milliseconds timeout) {
  if (!options_.survives_deaths) return false;
  const auto deadline = steady_clock::now() + timeout;
  while (!has_lost_rank_ && steady_clock::now() < deadline) {
    look_for_deaths();
    std::this_thread::sleep_for(milliseconds(1));
  }
  return has_lost_rank_;
}

std::shared_ptr<Engine> Engine::recover() {
  lose_rank();
  {
    const mpi::Deadline deadline("what it has begun with a killed rank");
    stop_thread();
    revoke_all();
    // The watch sees a death before MPI does, but none on another machine.
    world_.await_failures(std::max(1, size() - static_cast<int>(watch_->living().size())));
  }
  std::optional<mpi::Communicator> living;
  {
    const Watch::Waiting waiting(*watch_, watch_->living(), {.collective = Collective::set_up});
    const mpi::Deadline deadline("the agreement of the ranks that live", mpi::Deadline::longest_of(rank(), size()),
                                 [this] { return watch_->are_all_in_set_ups(); });
    have_others_ended_ = !world_.agree_of_living(true);
    if (have_others_ended_) return nullptr;
    living = world_.shrink();
  }
  return go_on(*living);
}

// Collective over `members`: the engine that takes this one's place. Ranks may die meanwhile, and MPI's calls then fail on
// some ranks and not on others, or wait for ever (MPI_Comm_create_group). So all agree on whether it is made, and the
// communicators of its groups are made here, by shrinking, which does neither.
std::shared_ptr<Engine> Engine::go_on(mpi::Communicator members) {
  constexpr int num_spare = 3;  // the groups of a trainer
  watch_->close();
  for (;;) {
    const mpi::Deadline deadline("the set-up of the ranks that live",
                                 mpi::Deadline::longest_of(members.rank(), members.size()));
    const mpi::Communicator control = members.shrink();
    std::shared_ptr<Engine> next;
    try {
      next.reset(new Engine(options_, members, control));
    } catch (const mpi::Error&) {
      members.revoke();  // others may wait for this rank
    }
    bool is_made = members.agree(next != nullptr);
    for (int i = 0; is_made && i < num_spare; ++i) {
      next->spare_communicators_.push_back(members.shrink());
      is_made = next->spare_communicators_.back().size() == members.size();
    }
    if (is_made) {
      next->replacement_ = std::move(replacement_);
      next->watch_->take_settings(*watch_);
      retire();
      next->start_thread();
      return next;
    }
    if (next) next->retire();
    members.await_failures(1);
    members = members.shrink();
  }
}

void Engine::start_replacement(const std::string& command, const std::vector<std::string>& arguments,
                               const std::string& folder) {
  replacement_ = std::make_shared<mpi::Replacement>(command, arguments, folder);
}

bool Engine::has_replacement() {
  if (replacement_ && replacement_->has_failed()) replacement_.reset();
  return replacement_ != nullptr;
}

bool Engine::has_ready_replacement() { return replacement_ && replacement_->is_ready(); }

std::shared_ptr<Engine> Engine::admit() {
  stop_thread();
  const std::shared_ptr<mpi::Replacement> own = std::move(replacement_);
  std::optional<mpi::Communicator> all;
  {
    const Watch::Waiting waiting(*watch_, watch_->living(), {.collective = Collective::set_up});
    all = mpi::admit(world_, own.get());
  }
  return go_on(*all);
}

std::shared_ptr<Engine> Engine::join() {
  stop_thread();
  const std::optional<mpi::Communicator> all = mpi::Replacement::join();
  return all ? go_on(*all) : nullptr;
}

// No communicator is freed: Open MPI gives its number to the next one. Agreements of that, between processes which were
// started at different times, may then meet what is left of the old one's, and never end.
void Engine::retire() {
  {
    const std::scoped_lock lock(inbox_mutex_);
    is_closed_ = true;
  }
  const std::scoped_lock lock(drive_mutex_);
  groups_.clear();
}

}  // namespace dtrain
