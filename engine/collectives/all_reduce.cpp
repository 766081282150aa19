// SPDX-License-Identifier: Apache-2.0
#include "collectives/all_reduce.hpp"

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

#include "collectives/all_reduce_nodes.hpp"
#include "collectives/all_reduce_numa.hpp"
#include "collectives/arguments.hpp"
#include "collectives/parts.hpp"

namespace dtrain {
namespace {

// Reduces on one node, in memory that all members allocated together: each carrier reads and writes all ranks' buffers.
// These are filled, since all members have made the call.
Task reduce_in_place(Group& group, std::span<const std::byte> buffer, std::vector<std::byte*> places,
                     Reduction reduction) {
  LocalGroup& local = group.local();
  const auto slice = part_of(buffer, static_cast<std::size_t>(local.rank()), places.size());
  const auto of_slice = slice_places(places, slice, buffer.data());
  const bool found_nonfinite = reduce({of_slice.begin(), of_slice.end()}, of_slice,
                                      slice.size() / element_bytes(reduction.dtype), reduction);
  auto reduced = local.barrier(found_nonfinite);
  co_await reduced;
  group.report_nonfinite(local.any_flag());
}

// Reduces on one node, in any memory: a rank copies the slices of other carriers to the scratch memory, and their
// results from there. The slice that it carries itself it reads and writes in place.
Task reduce_through_scratch(Group& group, std::span<std::byte> buffer, Reduction reduction) {
  LocalGroup& local = group.local();
  const auto own = static_cast<std::size_t>(local.rank());
  const auto num_local = static_cast<std::size_t>(local.size());
  bool found_nonfinite = false;
  for (std::size_t start = 0; start < buffer.size(); start += LocalGroup::scratch_bytes) {
    const auto work = buffer.subspan(start, std::min(LocalGroup::scratch_bytes, buffer.size() - start));
    const std::vector<std::byte*> scratch = local.next_scratch();
    const auto slice_of = [&](std::size_t carrier) { return part_of(work, carrier, num_local); };
    const auto in_scratch = [&](std::size_t rank, std::span<std::byte> slice) {
      return scratch[rank] + (slice.data() - work.data());
    };
    for (std::size_t peer = 0; peer < num_local; ++peer) {
      const auto slice = slice_of(peer);
      if (peer != own) std::memcpy(in_scratch(own, slice), slice.data(), slice.size());
    }
    auto filled = local.barrier();
    co_await filled;

    const auto carried = slice_of(own);
    std::vector<const std::byte*> sources;
    for (std::size_t rank = 0; rank < num_local; ++rank) {
      sources.push_back(rank == own ? carried.data() : in_scratch(rank, carried));
    }
    const std::array<std::byte*, 2> destinations{carried.data(), in_scratch(own, carried)};
    found_nonfinite |= reduce_by_numa(local.numa_domains(), sources, destinations,
                                      carried.size() / element_bytes(reduction.dtype), reduction);
    auto reduced = local.barrier(found_nonfinite);
    co_await reduced;

    for (std::size_t peer = 0; peer < num_local; ++peer) {
      const auto slice = slice_of(peer);
      if (peer != own) std::memcpy(slice.data(), in_scratch(peer, slice), slice.size());
    }
  }
  group.report_nonfinite(local.any_flag());
}

// Leaves the buffer as it is: with one rank it is the result.
Task reduce_alone(Group& group, std::span<std::byte> buffer, Reduction reduction) {
  const std::byte* const source = buffer.data();
  std::byte* const result = buffer.data();
  const std::size_t count = buffer.size() / element_bytes(reduction.dtype);
  if (reduction.check_finite) group.report_nonfinite(reduce({&source, 1}, {&result, 1}, count, reduction));
  co_return;
}

}  // namespace

PreparedCall all_reduce(Group& group, std::span<std::byte> buffer, const Reduction& reduction) {
  check_reduction("all_reduce", reduction);
  return {.group = group,
          .call = {.collective = Collective::all_reduce,
                   .dtype = reduction.dtype,
                   .op = reduction.op,
                   .wire_dtype = reduction.wire_dtype.value_or(reduction.dtype),
                   .count = buffer.size() / element_bytes(reduction.dtype),
                   .check_finite = reduction.check_finite},
          .start = [&group, buffer, reduction](Operation&) { return run_all_reduce(group, buffer, reduction); },
          .buffer = buffer};
}

Task run_all_reduce(Group& group, std::span<std::byte> buffer, Reduction reduction) {
  if (group.size() == 1 || buffer.empty()) return reduce_alone(group, buffer, reduction);
  if (group.num_nodes() > 1) return all_reduce_nodes(group, buffer, reduction);
  if (reduction.op == ReduceOp::average) reduction.scale = 1.0 / group.size();
  std::vector<std::byte*> shared = group.shared_buffers(buffer.size());
  if (shared.empty()) return reduce_through_scratch(group, buffer, reduction);
  if (!group.local().numa_domains().empty()) return all_reduce_numa(group, buffer, std::move(shared), reduction);
  return reduce_in_place(group, buffer, std::move(shared), reduction);
}

}  // namespace dtrain
