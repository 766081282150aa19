// SPDX-License-Identifier: Apache-2.0
#include "runtime/control_message.hpp"

#include <algorithm>
#include <cstring>

namespace dtrain {

std::optional<ControlMessage> parse_control(std::span<const std::byte> bytes, int num_ranks,
                                            const std::function<int(std::uint64_t id)>& size_of_group) {
  using Kind = ControlMessage::Kind;
  ControlMessage message;
  if (bytes.size() != sizeof(message)) return std::nullopt;
  std::memcpy(&message, bytes.data(), sizeof(message));
  if (message.kind > Kind::seen) return std::nullopt;
  const bool is_of_group = message.kind < Kind::look;
  const int num_members = is_of_group ? size_of_group(message.group) : num_ranks;
  if (message.member < 0 || message.member >= num_members) return std::nullopt;
  if (message.kind == Kind::seen &&
      (message.snapshot.rank < 0 || message.snapshot.rank >= num_ranks || message.snapshot.state < State::running ||
       message.snapshot.state > State::silent)) {
    return std::nullopt;
  }
  if (std::ranges::find(message.reason, '\0') == message.reason.end()) return std::nullopt;
  return message;
}

}  // namespace dtrain
