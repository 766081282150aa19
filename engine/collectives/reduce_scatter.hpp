// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "collectives/group.hpp"

namespace dtrain {

// Leaves in `output` of rank r the reduction of everybody's inputs[r], in rank order. Collective; all ranks have inputs
// of the same lengths, which are those of the outputs. `output` may be inputs[rank()].
// On one node each rank lays a piece of every block into its scratch memory and reads its own block there; over
// several the pieces go straight to the rank that wants them.
Task reduce_scatter(Group& group, std::vector<std::span<const std::byte>> inputs, std::span<std::byte> output,
                    Reduction reduction);

}  // namespace dtrain
