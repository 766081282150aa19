// SPDX-License-Identifier: Apache-2.0
#include "collectives/numa.hpp"

#include <algorithm>

#include "at.hpp"

namespace dtrain {

NumaDomains find_numa_domains(std::span<const int> numa_nodes) {
  NumaDomains domains;
  std::vector<int> numbers;
  for (std::size_t rank = 0; rank < numa_nodes.size(); ++rank) {
    if (numa_nodes[rank] < 0) return {};
    auto number = std::ranges::find(numbers, numa_nodes[rank]);
    if (number == numbers.end()) {
      number = numbers.insert(number, numa_nodes[rank]);
      domains.emplace_back();
    }
    at(domains, number - numbers.begin()).push_back(rank);
  }
  if (domains.size() == 1 || domains.size() == numa_nodes.size()) return {};
  return domains;
}

bool reduce_by_numa(const NumaDomains& domains, std::span<const std::byte* const> sources,
                    std::span<std::byte* const> destinations, std::size_t count, const Reduction& reduction) {
  if (domains.empty()) return reduce(sources, destinations, count, reduction);
  Reduction within = reduction;
  within.scale = 1.0;
  within.check_finite = false;
  bool found_nonfinite = false;
  constexpr std::size_t block_bytes = std::size_t{16} << 10;  // per domain, so that all fit the cache
  const std::size_t width = element_bytes(reduction.dtype);
  std::vector<std::byte> memory(domains.size() * block_bytes);
  std::vector<const std::byte*> of_domain;
  std::vector<const std::byte*> partials(domains.size());
  std::vector<std::byte*> results(destinations.size());
  for (std::size_t start = 0; start < count * width; start += block_bytes) {
    const std::size_t num_elements = std::min(block_bytes, count * width - start) / width;
    for (std::size_t domain = 0; domain < domains.size(); ++domain) {
      of_domain.clear();
      for (const std::size_t rank : domains[domain]) of_domain.push_back(sources[rank] + start);
      std::byte* const place = memory.data() + domain * block_bytes;
      reduce(of_domain, {&place, 1}, num_elements, within);
      partials[domain] = place;
    }
    std::ranges::transform(destinations, results.begin(), [start](std::byte* place) { return place + start; });
    found_nonfinite |= reduce(partials, results, num_elements, reduction);
  }
  return found_nonfinite;
}

}  // namespace dtrain
