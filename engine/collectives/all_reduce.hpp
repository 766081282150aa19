// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <span>

#include "collectives/prepared_call.hpp"

namespace dtrain {

// Reduces `buffer` over all ranks of `group`, in place. Collective; every rank ends with the same bits.
PreparedCall all_reduce(Group& group, std::span<std::byte> buffer, const Reduction& reduction);

// Runs an all_reduce once the calls of all ranks are known. The steps below are for a group on one node;
// all_reduce_nodes.hpp has the steps for several nodes.
//
// 1. Each rank's data is where its node can read it: in place if all ranks allocated the buffer together, else copied
//    piece by piece into the scratch memory of the group.
// 2. The data is cut into one slice for each rank, the slice's carrier. The carrier reduces its slice over all ranks,
//    in their order; where ranks are in several domains (numa.hpp), each domain reduces its own part first.
// 3. The carrier writes the result to all ranks' buffers, or each rank fetches it from the scratch memory.
// With check_finite, the carriers' findings travel with the barrier after step 2, so that all ranks report the same.
// Invariant: every element is reduced in one fixed order (within each domain, then over the domains).
Task run_all_reduce(Group& group, std::span<std::byte> buffer, Reduction reduction);

}  // namespace dtrain
