// SPDX-License-Identifier: Apache-2.0
#include "runtime/control_channel.hpp"

#include <algorithm>
#include <optional>
#include <span>
#include <thread>
#include <utility>

#include "at.hpp"
#include "collectives/errors.hpp"
#include "mpi/library.hpp"
#include "runtime/control_message.hpp"

namespace dtrain {
namespace {

using Kind = ControlMessage::Kind;
using std::chrono::milliseconds;
using std::chrono::steady_clock;

constexpr milliseconds between_looks(10);  // a look takes a microsecond
constexpr milliseconds longest_answer(1000);

}  // namespace

ControlChannel::ControlChannel(Driver& driver, std::unique_ptr<mpi::Mailbox> mailbox, std::vector<int> node_of_rank,
                               bool survives_deaths)
    : driver_(driver),
      mailbox_(std::move(mailbox)),
      node_of_rank_(std::move(node_of_rank)),
      survives_deaths_(survives_deaths) {}

void ControlChannel::ask(int peer, bool is_wanted) {
  post({.kind = is_wanted ? Kind::want : Kind::look, .member = mailbox_->rank()}, peer);
}

void ControlChannel::answer(StallMonitor& monitor) {
  if (!mailbox_ || steady_clock::now() < next_look_) return;
  next_look_ = steady_clock::now() + between_looks;
  try {
    collect(monitor);
  } catch (const mpi::Error&) {
    if (!survives_deaths_) throw;  // otherwise Recovery::look_for_deaths() finds the rank that has died
  }
}

void ControlChannel::collect(StallMonitor& monitor) {
  mailbox_->is_flushed();
  const auto size_of_group = [this](std::uint64_t id) {
    const Driver::Pause pause(driver_);
    const auto group = std::ranges::find(pause.groups(), id, [](const auto& one) { return one->id(); });
    return group == pause.groups().end() ? 0 : (*group)->size();
  };
  while (const auto bytes = mailbox_->collect()) {
    const auto message = parse_control(*bytes, mailbox_->size(), size_of_group);
    if (!message) continue;
    switch (message->kind) {
      case Kind::want: monitor.note_wanted(); [[fallthrough]];
      case Kind::look:
        for (const Snapshot& seen : monitor.seen_here()) {
          post({.kind = Kind::seen, .member = mailbox_->rank(), .snapshot = seen}, message->member);
        }
        break;
      case Kind::seen: monitor.hear(message->snapshot); break;
      default: answer_about_group(*message);
    }
  }
}

void ControlChannel::answer_about_group(const ControlMessage& message) {
  const Driver::Pause pause(driver_);
  for (const auto& group : pause.groups()) {
    if (group->id() != message.group) continue;
    switch (message.kind) {
      case Kind::question:
        post({.kind = Kind::answer, .group = message.group, .member = group->rank(), .last_seen = group->last_seen()},
             at(group->world_ranks(), message.member));
        break;
      case Kind::answer: group->set_last_seen(message.member, message.last_seen); break;
      case Kind::left: group->note_left(message.member, message.last_seen.num_calls); break;
      case Kind::given_up:
        group->fail(std::make_exception_ptr(
            RankLeft("rank " + std::to_string(message.member) + " has given up this group: " + message.reason.data())));
        break;
      default: break;
    }
  }
}

void ControlChannel::post(const ControlMessage& message, int destination) {
  try {
    mailbox_->post(std::as_bytes(std::span(&message, 1)), destination);
  } catch (const mpi::Error&) {
    // A rank that cannot be reached gives no answer, and the report says so.
  }
}

void ControlChannel::post_to_other_nodes(const Group& group, const ControlMessage& message) {
  if (!mailbox_ || mpi::is_finalized()) return;
  const int own_node = at(node_of_rank_, mailbox_->rank());
  for (const int peer : group.world_ranks()) {
    if (at(node_of_rank_, peer) != own_node) post(message, peer);
  }
}

std::string ControlChannel::describe_wait(Group& group, const Operation& operation) {
  if (mailbox_) {
    {
      const Driver::Pause pause(driver_);
      group.forget_others();
      post_to_other_nodes(group, {.kind = Kind::question, .group = group.id(), .member = group.rank()});
    }
    const auto deadline = steady_clock::now() + longest_answer;
    while (steady_clock::now() < deadline) {
      {
        const Driver::Pause pause(driver_);
        if (group.knows_all()) break;
      }
      std::this_thread::sleep_for(between_looks);
    }
  }
  const Driver::Pause pause(driver_);
  return group.describe_wait(operation);
}

void ControlChannel::give_up(Group& group, const std::string& reason) {
  ControlMessage message{.kind = Kind::given_up, .group = group.id(), .member = group.rank()};
  reason.copy(message.reason.data(), message.reason.size() - 1);
  post_to_other_nodes(group, message);
  Driver::Pause pause(driver_);
  pause.fail(group, reason);
}

void ControlChannel::announce_leaving(const Driver::Pause& pause, const Group& group) {
  static_cast<void>(pause);
  ControlMessage message{.kind = Kind::left, .group = group.id(), .member = group.rank()};
  message.last_seen.num_calls = group.sequence();
  post_to_other_nodes(group, message);
}

void ControlChannel::meet_at_end(StallMonitor& monitor, bool is_orderly) {
  if (!mailbox_ || mpi::is_finalized()) return;
  const auto deadline = steady_clock::now() + longest_answer;
  std::optional<mpi::Transfer> others;
  try {
    while (is_orderly || steady_clock::now() < deadline) {
      collect(monitor);
      if (!others && mailbox_->is_flushed()) others = mailbox_->barrier();
      if (others && others->test()) return;
      std::this_thread::sleep_for(milliseconds(1));
    }
  } catch (const mpi::Error&) {
    // The job has failed already, and its end will show that.
  }
}

void ControlChannel::revoke() {
  if (mailbox_) mailbox_->revoke();
}

}  // namespace dtrain
