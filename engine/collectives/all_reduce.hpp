// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <span>

#include "collectives/group.hpp"

namespace dtrain {

// Reduces `buffer` over all ranks of `group`, in place. Collective; every rank ends with the same bits. To be called
// once the calls of all ranks are known. What follows is for a group on one node; all_reduce_nodes.hpp has several.
//
// 1. Each rank's data is where its node can read it: in place if all allocated the buffer together, else copied piece
//    by piece into the scratch memory of the group.
// 2. It is cut into a slice for each rank, its carrier, which reduces it over all ranks, in their order; where ranks
//    are in several domains (domains.hpp), each reduces its own part first.
// 3. The result is written to all ranks' buffers by the carrier, or fetched by each rank from the scratch memory.
// With check_finite, the carriers' findings travel with the barrier after step 2, so that all ranks report the same.
// Invariant: every element is reduced in one fixed order (of each domain, then of the domains).
Task all_reduce(Group& group, std::span<std::byte> buffer, Reduction reduction);

}  // namespace dtrain
