// SPDX-License-Identifier: Apache-2.0
// Local ranks of a group, divided into domains by the NUMA node whose processors they use. Memory of another NUMA node
// is slow to reach, so each domain reduces its own part first, and then the domains' partial results are reduced.
#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "kernels/reduce.hpp"

namespace dtrain {

// The local ranks of each domain, ascending; domains are in the order of their lowest rank. Empty where domains gain
// nothing: if a rank may use processors of several NUMA nodes, if there is one domain, or if each domain has one rank.
using NumaDomains = std::vector<std::vector<std::size_t>>;

// Returns the domains; `numa_nodes` has the NUMA node of each local rank, -1 for several.
NumaDomains find_numa_domains(std::span<const int> numa_nodes);

// Reduces one source from each local rank as reduce() does, in the order that all_reduce promises: the sources of each
// domain, then the partial results of the domains. Returns what reduce() returns for the result.
bool reduce_by_numa(const NumaDomains& domains, std::span<const std::byte* const> sources,
                    std::span<std::byte* const> destinations, std::size_t count, const Reduction& reduction);

}  // namespace dtrain
