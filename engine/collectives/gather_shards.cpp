// SPDX-License-Identifier: Apache-2.0
#include "collectives/gather_shards.hpp"

#include <algorithm>
#include <cstring>
#include <utility>

namespace dtrain {
namespace {

Task run_gather_shards(Group& group, std::span<std::byte> buffer, std::vector<Block> blocks) {
  // This runs once every rank of the node has written its shards and made the call.
  if (group.num_nodes() == 1) co_return;
  std::vector<ShardMessage> outgoing = own_messages(group, buffer, blocks);
  for (ShardMessage& out : outgoing) {
    std::byte* next = out.bytes.data();
    for (const auto& part : out.parts) next = std::ranges::copy(part, next).out;
  }
  std::vector<ShardMessage> incoming = carried_messages(group, buffer, blocks);
  std::vector<mpi::Transfer> transfers = exchange(group, incoming, outgoing);
  auto exchanged = Until([&transfers] { return mpi::test_all(transfers); });
  co_await exchanged;
  for (const ShardMessage& in : incoming) {
    const std::byte* next = in.bytes.data();
    for (const auto& part : in.parts) {
      std::memcpy(part.data(), next, part.size());
      next += part.size();
    }
  }
  auto written = group.local().barrier();
  co_await written;
}

}  // namespace

PreparedCall gather_shards(Group& group, std::span<std::byte> buffer, std::vector<Block> blocks) {
  return {.group = group,
          .call = {.collective = Collective::gather_shards,
                   .dtype = DataType::uint8,
                   .count = check_blocks("gather_shards", buffer, blocks, 1)},
          .start = [&group, buffer,
                    blocks = std::move(blocks)](Operation&) { return run_gather_shards(group, buffer, blocks); },
          .buffer = buffer};
}

}  // namespace dtrain
