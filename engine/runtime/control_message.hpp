// SPDX-License-Identifier: Apache-2.0
// What ranks on different nodes say to each other when a group does not get on.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <span>

#include "runtime/status.hpp"

namespace dtrain {

struct ControlMessage {
  enum class Kind : std::uint8_t {
    question, answer,  // where the sender is in the group
    left, given_up,    // it takes part in nothing more of the group
    look, want, seen   // how the sender and its neighbours are, whatever the group; `want`: others wait for it, too
  } kind{};
  std::uint64_t group = 0;
  int member = 0;  // who says it; of the last three its number among all ranks
  LastSeen last_seen{};
  Snapshot snapshot{};
  std::array<char, 1000> reason{};
};

// Bytes that another rank has sent, if they are such a message: ranks that it names exist, and the text has an end.
// `num_ranks`: of the job. `size_of_group`: ranks of the group with that id; 0 where this rank is in no such group.
std::optional<ControlMessage> parse_control(std::span<const std::byte> bytes, int num_ranks,
                                            const std::function<int(std::uint64_t id)>& size_of_group);

}  // namespace dtrain
