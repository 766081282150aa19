// SPDX-License-Identifier: Apache-2.0
// A buffer that consists of blocks, of each of which every rank of a group owns a part: part r of R (parts.hpp) is rank
// r's shard. What lies between blocks is left alone. The two collectives are each other's inverse: with an update of
// the own shards in between they are a step of ZeRO stage 1 (Rajbhandari et al. 2020).
//
// A rank on another node than the owner of a shard has a carrier for it on its own node: the local rank with the
// owner's number on its node, modulo how many there are. A byte crosses to each other node once, in one message from
// carrier to owner, or back.
#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "collectives/group.hpp"

namespace dtrain {

struct Block {
  std::size_t offset_bytes;
  std::size_t num_bytes;
};

// Reduces every block over all ranks; rank r gets the result for its shards alone, in place. Collective. `buffer` lies
// in memory that the ranks allocated together, at a place that may differ. After the call, other shards of `buffer`
// hold nothing of use, and peers may read it: it may be written again when a later all_reduce of the group is done.
//
// 1. The owner on each node, or the carrier, reads its node's buffers in place and adds them in all_reduce's order.
// 2. With several nodes, carriers send that to the owner, which adds the nodes' sums in the order of the nodes.
// With check_finite the rank reports what it finds in its own shards.
// Invariant: the same bits as all_reduce gives.
Task reduce_shards(Group& group, std::span<std::byte> buffer, std::vector<Block> blocks, Reduction reduction);

// Ends on a rank when its node's `buffer`, which its ranks share (one block of Engine::allocate_shared), holds the
// shards of all ranks. Collective. Each rank has written its own before; no rank may read others' until the end.
// On one node this is a barrier: nothing is copied.
Task gather_shards(Group& group, std::span<std::byte> buffer, std::vector<Block> blocks);

}  // namespace dtrain
