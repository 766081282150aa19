// SPDX-License-Identifier: Apache-2.0
#include "collectives/all_reduce.hpp"

#include <algorithm>
#include <cstring>
#include <utility>

#include "collectives/node_exchange.hpp"
#include "collectives/parts.hpp"

namespace dtrain {
namespace {

// Where the memory of all ranks is in reach, only the length of one MPI transfer bounds a piece of work.
constexpr std::size_t max_piece_bytes = std::size_t{1} << 29;

// Where `slice`, a part of the work at own_place, lies at every local rank.
std::vector<std::byte*> slice_places(const std::vector<std::byte*>& places, std::span<const std::byte> slice,
                                     const std::byte* own_place) {
  std::vector<std::byte*> of_slice;
  for (std::byte* place : places) of_slice.push_back(place + (slice.data() - own_place));
  return of_slice;
}

}  // namespace

Task all_reduce(Group& group, std::span<std::byte> buffer, Reduction reduction) {
  if (group.size() == 1 || buffer.empty()) co_return;
  LocalGroup& local = group.local();
  const auto own_local = static_cast<std::size_t>(local.rank());
  const auto num_local = static_cast<std::size_t>(local.size());
  const bool one_node = group.num_nodes() == 1;
  const std::size_t slice_count = num_slices(group);
  const std::size_t width = element_bytes(reduction.dtype);

  Reduction last = reduction;  // the average's division comes with the last reduction of an element
  if (reduction.op == ReduceOp::average) last.scale = 1.0 / group.size();

  const std::vector<std::byte*> shared = group.shared_buffers();
  const std::size_t step = shared.empty() ? LocalGroup::scratch_bytes : max_piece_bytes;
  for (std::size_t start = 0; start < buffer.size(); start += step) {
    const auto work = buffer.subspan(start, std::min(step, buffer.size() - start));
    std::vector<std::byte*> places = shared.empty() ? local.next_scratch() : shared;
    if (shared.empty()) {
      std::memcpy(places[own_local], work.data(), work.size());
    } else {
      for (std::byte*& place : places) place += start;
    }
    auto filled = local.barrier();
    co_await filled;

    const std::span<std::byte> own(places[own_local], work.size());
    std::vector<NodeExchange::Slice> carried;
    for (std::size_t s = own_local; s < slice_count; s += num_local) {
      const auto slice = part_of(own, s, slice_count);
      const auto sources = slice_places(places, slice, own.data());
      const auto destinations = one_node && !shared.empty() ? sources : std::vector<std::byte*>{slice.data()};
      reduce({sources.begin(), sources.end()}, destinations, slice.size() / width, one_node ? last : reduction);
      carried.push_back({s, slice});
    }

    if (!one_node) {
      NodeExchange exchange(group, carried);
      std::vector<mpi::Transfer> transfers = exchange.scatter();
      auto scattered = Until([&transfers] { return mpi::test_all(transfers); });
      co_await scattered;
      exchange.reduce(last);
      transfers = exchange.gather();
      auto gathered = Until([&transfers] { return mpi::test_all(transfers); });
      co_await gathered;
      for (const auto& [number, slice] : carried) {
        if (shared.empty()) break;
        for (std::byte* place : slice_places(places, slice, own.data())) {
          if (place != slice.data()) std::memcpy(place, slice.data(), slice.size());
        }
      }
    }

    auto reduced = local.barrier();
    co_await reduced;
    for (std::size_t s = 0; s < slice_count && shared.empty(); ++s) {
      const auto result = part_of(work, s, slice_count);
      std::memcpy(result.data(), places[s % num_local] + (result.data() - work.data()), result.size());
    }
  }
}

}  // namespace dtrain
