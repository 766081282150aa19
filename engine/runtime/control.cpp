// SPDX-License-Identifier: Apache-2.0
// What ranks on different nodes say to each other when a group does not get on. Within a node they see it.
#include <algorithm>
#include <thread>

#include "collectives/errors.hpp"
#include "mpi/library.hpp"
#include "runtime/control_message.hpp"
#include "runtime/engine.hpp"

namespace dtrain {

namespace {

using Kind = ControlMessage::Kind;
using std::chrono::milliseconds;
using std::chrono::steady_clock;

constexpr milliseconds between_looks(10);  // a look takes a microsecond
constexpr milliseconds longest_answer(1000);

void post(mpi::Mailbox& control, const ControlMessage& message, int destination) {
  try {
    control.post(std::as_bytes(std::span(&message, 1)), destination);
  } catch (const mpi::Error&) {
    // A rank that can't be reached gives no answer, which is what will be said of it.
  }
}

}  // namespace

void Engine::start_watch(const AllGather& all_gather) {
  const Origin own = Origin::own();
  std::vector<Origin> origins(static_cast<std::size_t>(size()));
  all_gather(std::as_bytes(std::span(&own, 1)), std::as_writable_bytes(std::span(origins)));
  const auto ask = [this](int peer, bool is_wanted) {
    post(*control_, {.kind = is_wanted ? Kind::want : Kind::look, .member = rank()}, peer);
  };
  const auto fail = [this](const std::string& reason) {
    std::vector<std::shared_ptr<Group>> groups;
    {
      const std::scoped_lock lock(drive_mutex_);
      groups = groups_;
    }
    for (const auto& group : groups) give_up(*group, reason);
  };
  Watch::Engine engine{ask, fail};
  if (options_.survives_deaths) engine.lose_rank = [this] { lose_rank(); };
  watch_ = std::make_unique<Watch>(rank(), std::move(origins), status_of_rank_, std::move(engine));
}

// By the engine thread.
void Engine::answer_control() {
  if (!control_ || steady_clock::now() < next_control_) return;
  next_control_ = steady_clock::now() + between_looks;
  try {
    collect_control();
  } catch (const mpi::Error&) {
    if (!options_.survives_deaths) throw;  // else look_for_deaths() sees which rank has died
  }
}

void Engine::collect_control() {
  control_->is_flushed();
  const auto size_of_group = [this](std::uint64_t id) {
    const std::scoped_lock lock(drive_mutex_);
    const auto group = std::ranges::find(groups_, id, [](const auto& one) { return one->id(); });
    return group == groups_.end() ? 0 : (*group)->size();
  };
  while (const auto bytes = control_->collect()) {
    const auto parsed = parse_control(*bytes, size(), size_of_group);
    if (!parsed) continue;
    const ControlMessage& message = *parsed;
    switch (message.kind) {
      case Kind::want: watch_->note_wanted(); [[fallthrough]];
      case Kind::look:
        for (const Snapshot& seen : watch_->seen_here()) {
          post(*control_, {.kind = Kind::seen, .member = rank(), .snapshot = seen}, message.member);
        }
        continue;
      case Kind::seen: watch_->hear(message.snapshot); continue;
      default: break;
    }
    const std::scoped_lock lock(drive_mutex_);
    for (const auto& group : groups_) {
      if (group->id() != message.group) continue;
      switch (message.kind) {
        case Kind::question:
          post(*control_,
               {.kind = Kind::answer, .group = message.group, .member = group->rank(), .last_seen = group->last_seen()},
               group->world_ranks()[static_cast<std::size_t>(message.member)]);
          break;
        case Kind::answer: group->set_last_seen(message.member, message.last_seen); break;
        case Kind::left: group->note_left(message.member, message.last_seen.num_calls); break;
        case Kind::given_up:
          group->fail(std::make_exception_ptr(RankLeft("rank " + std::to_string(message.member) +
                                                       " has given up this group: " + message.reason.data())));
          break;
        default: break;
      }
    }
  }
}

void Engine::post_to_other_nodes(const Group& group, const ControlMessage& message) {
  if (!control_ || mpi::is_finalized()) return;
  for (const int peer : group.world_ranks()) {
    if (status_of_rank_[static_cast<std::size_t>(peer)] == nullptr) post(*control_, message, peer);
  }
}

std::string Engine::describe_wait(Group& group, const Operation& operation) {
  if (control_) {
    {
      const std::scoped_lock lock(drive_mutex_);
      group.forget_others();
      post_to_other_nodes(group, {.kind = Kind::question, .group = group.id(), .member = group.rank()});
    }
    const auto deadline = steady_clock::now() + longest_answer;
    while (steady_clock::now() < deadline) {
      {
        const std::scoped_lock lock(drive_mutex_);
        if (group.knows_all()) break;
      }
      std::this_thread::sleep_for(between_looks);
    }
  }
  const std::scoped_lock lock(drive_mutex_);
  return group.describe_wait(operation);
}

void Engine::give_up(Group& group, const std::string& reason) {
  ControlMessage message{.kind = Kind::given_up, .group = group.id(), .member = group.rank()};
  reason.copy(message.reason.data(), message.reason.size() - 1);
  post_to_other_nodes(group, message);
  const std::scoped_lock lock(drive_mutex_);
  fail(group, reason);
}

// With drive_mutex_ held.
void Engine::fail(Group& group, const std::string& reason) {
  group.local().leave(reason);
  take_inbox();
  group.fail(std::make_exception_ptr(RankLeft("this rank has given up the group: " + reason)));
}

// With drive_mutex_ held.
void Engine::tell_of_leaving(const Group& group) {
  ControlMessage message{.kind = Kind::left, .group = group.id(), .member = group.rank()};
  message.last_seen.num_calls = group.sequence();
  post_to_other_nodes(group, message);
}

// Open MPI aborts a rank that still sends to one that has ended. So all messages are received before any rank ends, which
// is no more to wait for than the end of MPI.
void Engine::meet_at_end() {
  if (!control_ || mpi::is_finalized()) return;
  const bool is_orderly = abandoned_groups_.empty();  // else some rank may never come
  const auto deadline = steady_clock::now() + longest_answer;
  std::optional<mpi::Transfer> others;
  try {
    while (is_orderly || steady_clock::now() < deadline) {
      collect_control();
      if (!others && control_->is_flushed()) others = control_->barrier();
      if (others && others->test()) return;
      std::this_thread::sleep_for(milliseconds(1));
    }
  } catch (const mpi::Error&) {
    // The job is in disorder already, and its end will show it.
  }
}

}  // namespace dtrain
