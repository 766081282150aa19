// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <span>

#include "collectives/group.hpp"

namespace dtrain {

// Reduces `buffer` over all ranks of `group`, in place. Collective; every rank ends with the same bits. To be called
// once the calls of all ranks are known.
//
// P local ranks on this node, N nodes, L = the largest P of any node.
// 1. Each rank's data is where its node can read it: in place if all allocated the buffer together, else copied piece
//    by piece into the scratch memory of the group.
// 2. It is cut into L slices; slice s belongs to local rank s mod P, its carrier, on each node. The carrier reduces
//    the slice over its node's ranks, in their order.
// 3. With N > 1 the carriers of a slice cut it into N pieces and send piece n to node n, whose carrier reduces the N
//    partial results in the order of the nodes and sends the piece to all. So each byte crosses once each way.
// 4. The result is written to all ranks' buffers by the carrier, or fetched by each rank from the scratch memory.
// Invariant: every element is reduced by one rank in one fixed order (of each node, then of the nodes).
Task all_reduce(Group& group, std::span<std::byte> buffer, Reduction reduction);

}  // namespace dtrain
