// SPDX-License-Identifier: Apache-2.0
// A call of a collective whose arguments this rank has checked.
//
// A collective is a function that returns a PreparedCall, in a pair of files named after it; Engine::submit() runs the
// call. The function throws std::invalid_argument at once for mistakes that a rank can see alone. Ranks that call
// different things at the same place of a group's sequence all get the same Mismatch from the operation. Buffers must
// stay valid until the operation is done.
#pragma once

#include <cstddef>
#include <functional>
#include <span>

#include "collectives/group.hpp"

namespace dtrain {

struct PreparedCall {
  Group& group;
  Call call;
  // Makes the task. It is called once all ranks are known to make the same call, so it may look at their calls.
  std::function<Task(Operation&)> start;
  // The buffer that the operation uses in place where it lies in memory that all ranks allocated together; empty if
  // there is no such buffer.
  std::span<const std::byte> buffer = {};
};

}  // namespace dtrain
