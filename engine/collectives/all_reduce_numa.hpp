// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "collectives/group.hpp"

namespace dtrain {

// Reduces in place over a group on one node whose ranks are in several domains (numa.hpp): `places` are the ranks'
// buffers, `buffer` is this rank's. A byte crosses between two domains once each way, however many ranks they have.
//
// The buffer is cut into segments, and a segment into as many slices as the largest domain has ranks. In a domain of P
// ranks, number s mod P carries slice s.
// 1. Each carrier reduces its slices over its domain, into its own buffer.
// 2. A slice is cut into a piece for each domain. The carrier there reduces it over the slice's carriers, in the order
//    of the domains, and writes it to their buffers.
// 3. Each carrier copies its slices to the other ranks of its domain.
// With check_finite, the findings of stage 2 travel with the last barrier. Segments are short, so that the output of a
// stage is still in the cache in the next stage.
// Invariant: every element is reduced in one fixed order (within each domain, then over the domains).
Task all_reduce_numa(Group& group, std::span<const std::byte> buffer, std::vector<std::byte*> places,
                     Reduction reduction);

}  // namespace dtrain
