// SPDX-License-Identifier: Apache-2.0
#include "collectives/reduce_shards.hpp"

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "collectives/arguments.hpp"

namespace dtrain {
namespace {

Task run_reduce_shards(Group& group, std::span<std::byte> buffer, std::vector<Block> blocks, Reduction reduction) {
  // All ranks of the node have made the call, so their buffers are filled: no barrier is needed before reading.
  std::size_t num_bytes = 0;
  for (const Block& block : blocks) num_bytes = std::max<std::size_t>(num_bytes, block.offset_bytes + block.num_bytes);
  std::vector<std::byte*> places = group.shared_buffers(num_bytes);
  if (group.size() == 1) {
    if (!reduction.check_finite) co_return;
    places = {buffer.data()};
  }
  if (places.empty()) {
    throw std::invalid_argument("reduce_shards: the buffers do not lie in memory that all ranks allocated together");
  }
  const bool one_node = group.num_nodes() == 1;
  const std::size_t width = element_bytes(reduction.dtype);
  Reduction last = reduction;  // the last reduction of an element divides the average and checks it
  if (reduction.op == ReduceOp::average) last.scale = 1.0 / group.size();
  reduction.check_finite = false;
  bool found_nonfinite = false;

  std::vector<const std::byte*> sources(places.size());
  const auto reduce_node = [&](std::span<const std::byte> part, std::byte* result, const Reduction& how) {
    const auto offset = part.data() - buffer.data();
    std::ranges::transform(places, sources.begin(), [offset](const std::byte* place) { return place + offset; });
    return reduce_by_numa(group.local().numa_domains(), sources, {&result, 1}, part.size() / width, how);
  };

  const auto own = shards_of(group, group.rank(), buffer, blocks);
  std::vector<ShardMessage> outgoing = carried_messages(group, buffer, blocks);
  for (ShardMessage& out : outgoing) {
    std::byte* next = out.bytes.data();
    for (const auto& part : out.parts) {
      reduce_node(part, next, reduction);
      next += part.size();
    }
  }
  std::vector<ShardMessage> incoming = own_messages(group, buffer, blocks);
  std::vector<mpi::Transfer> transfers = exchange(group, incoming, outgoing);
  for (const auto& part : own) found_nonfinite |= reduce_node(part, part.data(), one_node ? last : reduction);
  group.report_nonfinite(found_nonfinite);
  if (one_node) co_return;

  auto exchanged = Until([&transfers] { return mpi::test_all(transfers); });
  co_await exchanged;
  std::size_t offset = 0;
  std::vector<const std::byte*> partials;
  for (const auto& part : own) {
    partials.clear();
    for (const ShardMessage& in : incoming) partials.push_back(in.bytes.data() + offset);
    partials.insert(partials.begin() + group.node(), part.data());
    std::byte* const result = part.data();
    found_nonfinite |= reduce(partials, {&result, 1}, part.size() / width, last);
    offset += part.size();
  }
  group.report_nonfinite(found_nonfinite);
}

}  // namespace

PreparedCall reduce_shards(Group& group, std::span<std::byte> buffer, std::vector<Block> blocks,
                           const Reduction& reduction) {
  check_reduction("reduce_shards", reduction);
  const std::size_t width = element_bytes(reduction.dtype);
  return {.group = group,
          .call = {.collective = Collective::reduce_shards,
                   .dtype = reduction.dtype,
                   .op = reduction.op,
                   .count = check_blocks("reduce_shards", buffer, blocks, width) / width,
                   .check_finite = reduction.check_finite},
          .start = [&group, buffer, blocks = std::move(blocks),
                    reduction](Operation&) { return run_reduce_shards(group, buffer, blocks, reduction); },
          .buffer = buffer};
}

}  // namespace dtrain
