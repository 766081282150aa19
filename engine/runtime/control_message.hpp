// SPDX-License-Identifier: Apache-2.0
// Messages between ranks on different nodes about a group that does not make progress.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <span>

#include "runtime/status.hpp"

namespace dtrain {

// `question` is answered by `answer`. `look` and `want` are answered by `seen`, the state of the sender and its
// neighbours; `want` also says that others wait for the receiver.
struct ControlMessage {
  enum class Kind : std::uint8_t {
    question,
    answer,  // the sender's last call in the group
    left,
    given_up,  // the sender has given up the group
    look,
    want,
    seen
  } kind{};
  std::uint64_t group = 0;
  int member = 0;  // the sender's rank in the group; in the last three kinds its rank in the job
  LastSeen last_seen{};
  Snapshot snapshot{};
  std::array<char, 1000> reason{};
};

// Returns the message in the bytes that another rank has sent; none if they are no such message: every rank that it
// names must exist, and the text must have an end. `num_ranks`: of the job. `size_of_group`: number of ranks of the
// group with that id; 0 if this rank is in no such group.
std::optional<ControlMessage> parse_control(std::span<const std::byte> bytes, int num_ranks,
                                            const std::function<int(std::uint64_t id)>& size_of_group);

}  // namespace dtrain
