// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <span>

#include "collectives/group.hpp"

namespace dtrain {

// Cuts `input` into size() blocks of output.size() bytes and leaves in `output` of rank r the reduction of everybody's
// block r, in rank order. Collective. `output` may be block rank() of `input`.
// On one node each rank lays a piece of every block into its scratch memory and reads its own block there; over
// several the pieces go straight to the rank that wants them.
Task reduce_scatter(Group& group, std::span<const std::byte> input, std::span<std::byte> output, Reduction reduction);

}  // namespace dtrain
