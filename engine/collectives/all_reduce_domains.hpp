// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "collectives/group.hpp"

namespace dtrain {

// all_reduce of a group on one node whose ranks are in several domains (domains.hpp), in place: `places` are its
// ranks' buffers, `buffer` this rank's. A byte crosses between two domains once each way, whatever their ranks.
//
// The buffer is cut into segments, and a segment into as many slices as the largest domain has ranks. In a domain of P
// ranks, number s mod P carries slice s.
// 1. Each carrier reduces its slices over its domain, into its own buffer.
// 2. A slice is cut into a piece for each domain. The carrier there reduces it over the slice's carriers, in the order
//    of the domains, and writes it to their buffers.
// 3. Each carrier copies its slices to the others of its domain.
// With check_finite, what stage 2 finds travels with the last barrier.
// Segments are short, so that what a stage leaves is still in the cache in the next.
// Invariant: every element is reduced in one fixed order (of each domain, then of the domains).
Task all_reduce_domains(Group& group, std::span<const std::byte> buffer, std::vector<std::byte*> places,
                        Reduction reduction);

}  // namespace dtrain
