// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "collectives/prepared_call.hpp"
#include "collectives/shards.hpp"

namespace dtrain {

// Reduces every block over all ranks; rank r gets the result for its own shards only, in place. Collective. `buffer`
// lies in memory that the ranks allocated together, at a place that may differ between ranks. After the call, the other
// shards of `buffer` hold nothing useful, and peers may still read them: `buffer` may be written again when a later
// all_reduce of the group is done.
//
// 1. The owner on its node, or the carrier on another node, reads its node's buffers in place and adds them in
//    all_reduce's order.
// 2. With several nodes, carriers send these sums to the owner, which adds the nodes' sums in the order of the nodes.
// With check_finite a rank reports the findings in its own shards.
// Invariant: the bits are the same as all_reduce gives.
PreparedCall reduce_shards(Group& group, std::span<std::byte> buffer, std::vector<Block> blocks,
                           const Reduction& reduction);

}  // namespace dtrain
