// SPDX-License-Identifier: Apache-2.0
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "at.hpp"
#include "fuzz/targets.hpp"
#include "runtime/control_message.hpp"

namespace dtrain::fuzz {
namespace {

void take(std::span<const std::byte> bytes) {
  constexpr std::size_t num_ranks = 4;
  constexpr std::size_t group_size = 2;
  const auto size_of_group = [](std::uint64_t id) { return static_cast<int>(id == 1 ? group_size : 0); };
  const auto parsed = parse_control(bytes, num_ranks, size_of_group);
  if (!parsed) return;
  const auto message = std::make_unique<ControlMessage>(
      *parsed);  // in its own allocation, so that a read past its end is seen
  const auto member = static_cast<std::size_t>(message->member);
  const std::vector<Origin> origins(num_ranks);
  std::vector<std::optional<LastSeen>> seen_of_group(group_size);
  std::vector<std::optional<Snapshot>> heard(num_ranks);
  std::vector<int> world_ranks(group_size);
  std::string said;
  switch (message->kind) {
    case ControlMessage::Kind::question: world_ranks.at(member) = 1; break;
    case ControlMessage::Kind::answer:
      seen_of_group[member] = message->last_seen;
      said = seen_of_group[member]->call.description();
      break;
    case ControlMessage::Kind::seen:
      at(heard, message->snapshot.rank) = message->snapshot;
      said = describe_stall({message->snapshot}, origins, "") + describe_places({message->snapshot});
      break;
    default: said = message->reason.data(); break;
  }
}

}  // namespace

void control(std::span<const std::byte> bytes) {
  take(bytes);
  std::vector<std::byte> whole(bytes.begin(), bytes.end());
  whole.resize(sizeof(ControlMessage));
  take(whole);
}

}  // namespace dtrain::fuzz
