// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "collectives/prepared_call.hpp"

namespace dtrain {

// Fills the `output` of rank r with the reduction of all ranks' inputs[r], in rank order. Collective. On every rank,
// inputs[r] is as long as rank r's output. `output` may be inputs[rank()]. On one node each rank copies a piece of
// every block into its scratch memory, and reads its own block in all ranks' scratch memory; over several nodes the
// pieces go directly to the rank whose output they are.
PreparedCall reduce_scatter(Group& group, std::vector<std::span<const std::byte>> inputs, std::span<std::byte> output,
                            const Reduction& reduction);

}  // namespace dtrain
