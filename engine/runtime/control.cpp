// SPDX-License-Identifier: Apache-2.0
// What ranks on different nodes say to each other when a group does not get on. Within a node they see it.
#include <array>
#include <cstring>
#include <thread>

#include "collectives/errors.hpp"
#include "runtime/engine.hpp"

namespace dtrain {
namespace {

using std::chrono::milliseconds;
using std::chrono::steady_clock;

constexpr milliseconds between_looks(10);  // a look takes a microsecond
constexpr milliseconds longest_answer(1000);

struct Message {
  enum class Kind : std::uint8_t { question, answer, given_up } kind;
  std::uint64_t group;
  int member;  // who says it
  LastSeen seen;
  std::array<char, 1000> reason;
};

void post(mpi::Mailbox& control, const Message& message, int destination) {
  control.post(std::as_bytes(std::span(&message, 1)), destination);
}

}  // namespace

// By the engine thread.
void Engine::answer_control() {
  if (!control_ || steady_clock::now() < next_control_) return;
  next_control_ = steady_clock::now() + between_looks;
  control_->is_flushed();
  while (const auto bytes = control_->collect()) {
    Message message;
    std::memcpy(&message, bytes->data(), sizeof(message));
    const std::scoped_lock lock(drive_mutex_);
    for (const auto& group : groups_) {
      if (group->id() != message.group) continue;
      switch (message.kind) {
        case Message::Kind::question:
          post(*control_, {Message::Kind::answer, message.group, group->rank(), group->last_seen(), {}},
               group->world_ranks()[static_cast<std::size_t>(message.member)]);
          break;
        case Message::Kind::answer: group->set_last_seen(message.member, message.seen); break;
        case Message::Kind::given_up:
          group->fail(std::make_exception_ptr(RankLeft("rank " + std::to_string(message.member) +
                                                       " has given up this group: " + message.reason.data())));
          break;
      }
    }
  }
}

std::pair<std::string, bool> Engine::describe_wait(Group& group, const Operation& operation) {
  if (control_) {
    {
      const std::scoped_lock lock(drive_mutex_);
      group.forget_others();
      for (int member = 0; member < group.size(); ++member) {
        const int peer = group.world_ranks()[static_cast<std::size_t>(member)];
        if (doorbell_of_rank_[static_cast<std::size_t>(peer)] != nullptr) continue;  // on this node
        post(*control_, {Message::Kind::question, group.id(), group.rank(), {}, {}}, peer);
      }
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
  return {group.describe_wait(operation), operation.is_message() || group.is_first_here()};
}

void Engine::give_up(Group& group, const std::string& reason) {
  if (control_) {
    Message message{Message::Kind::given_up, group.id(), group.rank(), {}, {}};
    reason.copy(message.reason.data(), message.reason.size() - 1);
    for (const int peer : group.world_ranks()) {
      if (doorbell_of_rank_[static_cast<std::size_t>(peer)] == nullptr) post(*control_, message, peer);
    }
  }
  const std::scoped_lock lock(drive_mutex_);
  group.local().leave(reason);
  take_inbox();
  group.fail(std::make_exception_ptr(RankLeft("this rank has given up the group: " + reason)));
}

}  // namespace dtrain
