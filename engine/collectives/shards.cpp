// SPDX-License-Identifier: Apache-2.0
#include "collectives/shards.hpp"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

#include "collectives/node_exchange.hpp"
#include "collectives/parts.hpp"

namespace dtrain {
namespace {

ShardMessage message(int peer, std::vector<std::span<std::byte>> parts) {
  std::size_t num_bytes = 0;
  for (const auto& part : parts) num_bytes += part.size();
  return {peer, std::move(parts), std::vector<std::byte>(num_bytes)};
}

}  // namespace

std::size_t check_blocks(const char* collective, std::span<const std::byte> buffer, std::span<const Block> blocks,
                         std::size_t element_bytes) {
  std::size_t num_bytes = 0;
  for (const Block& block : blocks) {
    if (block.offset_bytes > buffer.size() || block.num_bytes > buffer.size() - block.offset_bytes ||
        block.num_bytes % element_bytes != 0) {
      throw std::invalid_argument(std::string(collective) + ": a block of " + std::to_string(block.num_bytes) +
                                  " bytes at " + std::to_string(block.offset_bytes) + " is not within the buffer of " +
                                  std::to_string(buffer.size()) + " bytes, or cuts an element of " +
                                  std::to_string(element_bytes) + " bytes");
    }
    num_bytes += block.num_bytes;
  }
  return num_bytes;
}

std::vector<std::span<std::byte>> shards_of(const Group& group, int owner, std::span<std::byte> buffer,
                                            const std::vector<Block>& blocks) {
  std::vector<std::span<std::byte>> shards;
  for (const Block& block : blocks) {
    const auto shard = part_of(buffer.subspan(block.offset_bytes, block.num_bytes), static_cast<std::size_t>(owner),
                               static_cast<std::size_t>(group.size()));
    if (!shard.empty()) shards.push_back(shard);
  }
  return shards;
}

std::vector<ShardMessage> carried_messages(const Group& group, std::span<std::byte> buffer,
                                           const std::vector<Block>& blocks) {
  std::vector<ShardMessage> messages;
  for (int node = 0; node < group.num_nodes(); ++node) {
    if (node == group.node()) continue;
    const std::vector<int>& owners = group.ranks_of_node(node);
    for (std::size_t i = 0; i < owners.size(); ++i) {
      if (carrier(group, i, group.node()) != group.rank()) continue;
      messages.push_back(message(owners[i], shards_of(group, owners[i], buffer, blocks)));
    }
  }
  return messages;
}

std::vector<ShardMessage> own_messages(Group& group, std::span<std::byte> buffer, const std::vector<Block>& blocks) {
  std::vector<ShardMessage> messages;
  for (int node = 0; node < group.num_nodes(); ++node) {
    if (node == group.node()) continue;
    const int peer = carrier(group, static_cast<std::size_t>(group.local().rank()), node);
    messages.push_back(message(peer, shards_of(group, group.rank(), buffer, blocks)));
  }
  return messages;
}

std::vector<mpi::Transfer> exchange(Group& group, std::vector<ShardMessage>& incoming,
                                    std::vector<ShardMessage>& outgoing) {
  std::vector<mpi::Transfer> transfers;
  const auto in_pieces = [](std::span<std::byte> bytes, auto&& transfer) {
    for (std::size_t start = 0; start < bytes.size(); start += mpi::max_transfer_bytes) {
      transfer(bytes.subspan(start, std::min(mpi::max_transfer_bytes, bytes.size() - start)));
    }
  };
  for (ShardMessage& in : incoming) {
    in_pieces(in.bytes, [&](auto piece) { transfers.push_back(group.receive(piece, in.peer, 0)); });
  }
  for (ShardMessage& out : outgoing) {
    in_pieces(out.bytes, [&](auto piece) { transfers.push_back(group.send(piece, out.peer, 0)); });
  }
  return transfers;
}

}  // namespace dtrain
