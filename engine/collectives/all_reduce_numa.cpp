// SPDX-License-Identifier: Apache-2.0
#include "collectives/all_reduce_numa.hpp"

#include <algorithm>
#include <cstring>

#include "collectives/parts.hpp"

namespace dtrain {
namespace {

// Longer slices leave the cache between two stages, shorter ones take more barriers.
constexpr std::size_t slice_bytes = std::size_t{512} << 10;

// The part of a segment that this rank carries.
struct Slice {
  std::span<const std::byte> bytes;
  std::vector<std::size_t> carriers;  // in the order of the domains
};

}  // namespace

Task all_reduce_numa(Group& group, std::span<const std::byte> buffer, std::vector<std::byte*> places,
                     Reduction reduction) {
  LocalGroup& local = group.local();
  const NumaDomains& domains = local.numa_domains();
  const auto own = static_cast<std::size_t>(local.rank());
  std::size_t number = 0;
  while (!std::ranges::binary_search(domains[number], own)) ++number;
  const std::vector<std::size_t>& members = domains[number];
  std::size_t num_slices = 0;
  for (const auto& domain : domains) num_slices = std::max(num_slices, domain.size());

  const std::size_t width = element_bytes(reduction.dtype);
  const auto places_of = [&](const std::vector<std::size_t>& ranks, std::span<const std::byte> part) {
    std::vector<std::byte*> of_ranks;
    for (const std::size_t rank : ranks) of_ranks.push_back(places[rank] + (part.data() - buffer.data()));
    return of_ranks;
  };
  Reduction within = reduction;  // the last reduction of an element divides the average and checks it
  within.scale = 1.0;
  within.check_finite = false;
  bool found_nonfinite = false;

  const std::size_t segment_bytes = slice_bytes * num_slices;
  for (std::size_t start = 0; start < buffer.size(); start += segment_bytes) {
    const auto segment = buffer.subspan(start, std::min(segment_bytes, buffer.size() - start));
    std::vector<Slice> carried;
    for (std::size_t s = 0; s < num_slices; ++s) {
      if (members[s % members.size()] != own) continue;
      carried.push_back({part_of(segment, s, num_slices), {}});
      for (const auto& domain : domains) carried.back().carriers.push_back(domain[s % domain.size()]);
    }

    for (const Slice& slice : carried) {
      const auto sources = places_of(members, slice.bytes);
      const auto destination = places_of({own}, slice.bytes);
      reduce({sources.begin(), sources.end()}, destination, slice.bytes.size() / width, within);
    }
    auto domains_reduced = local.barrier();
    co_await domains_reduced;

    for (const Slice& slice : carried) {
      const auto piece = part_of(slice.bytes, number, domains.size());
      const auto partials = places_of(slice.carriers, piece);
      found_nonfinite |= reduce({partials.begin(), partials.end()}, partials, piece.size() / width, reduction);
    }
    auto reduced = local.barrier();
    co_await reduced;

    for (const Slice& slice : carried) {
      const std::byte* const source = places_of({own}, slice.bytes)[0];
      for (std::byte* place : places_of(members, slice.bytes)) {
        if (place != source) std::memcpy(place, source, slice.bytes.size());
      }
    }
  }
  auto copied = local.barrier(found_nonfinite);
  co_await copied;
  group.report_nonfinite(local.any_flag());
}

}  // namespace dtrain
