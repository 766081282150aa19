// SPDX-License-Identifier: Apache-2.0
// The local ranks of a group by the NUMA node whose processors they use. Memory of another NUMA node is slow to reach,
// so each of these domains reduces its own part first, and the domains' partial results are reduced then.
#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "kernels/reduce.hpp"

namespace dtrain {

// The local ranks of each domain, ascending; domains are in the order of their lowest rank. Empty where they gain
// nothing: if a rank may use processors of several NUMA nodes, or with one domain, or with one rank in each.
using Domains = std::vector<std::vector<std::size_t>>;

// `numa_nodes`: of each local rank, -1 for several.
Domains find_domains(std::span<const int> numa_nodes);

// reduce() of one source from each local rank in the order that all_reduce promises: those of each domain, then the
// partial results of the domains. Returns what reduce() does, of the result.
bool reduce_by_domains(const Domains& domains, std::span<const std::byte* const> sources,
                       std::span<std::byte* const> destinations, std::size_t count, const Reduction& reduction);

}  // namespace dtrain
