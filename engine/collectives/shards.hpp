// SPDX-License-Identifier: Apache-2.0
// A buffer that consists of blocks. Every rank of a group owns a part of each block: part r of R (parts.hpp) is rank
// r's shard. Bytes between blocks are left alone. The two collectives, reduce_shards and gather_shards, are each
// other's inverse: with an update of a rank's own shards in between they are a step of ZeRO stage 1 (Rajbhandari et
// al., 2020).
//
// A rank on another node than the owner of a shard has a carrier for it on its own node: the local rank whose number is
// the owner's number on its node, modulo the number of local ranks. A byte crosses to each other node once, in one
// message from carrier to owner, or back.
#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "collectives/group.hpp"

namespace dtrain {

struct Block {
  std::size_t offset_bytes;
  std::size_t num_bytes;
};

// Returns the number of bytes of all `blocks`. Throws std::invalid_argument, with the name of the `collective`, unless
// they lie in `buffer` and hold whole elements.
std::size_t check_blocks(const char* collective, std::span<const std::byte> buffer, std::span<const Block> blocks,
                         std::size_t element_bytes);

// Returns the shards of rank `owner` in `buffer`, one of each block; empty shards are left out.
std::vector<std::span<std::byte>> shards_of(const Group& group, int owner, std::span<std::byte> buffer,
                                            const std::vector<Block>& blocks);

// The shards of one owner, and room for them side by side.
struct ShardMessage {
  int peer;
  std::vector<std::span<std::byte>> parts;  // in the buffer
  std::vector<std::byte> bytes;
};

// Returns this rank's messages as a carrier: one for each shard owner on another node whose shards it carries.
std::vector<ShardMessage> carried_messages(const Group& group, std::span<std::byte> buffer,
                                           const std::vector<Block>& blocks);

// Returns this rank's messages as an owner: one for each other node, to or from the carrier of this rank's shards
// there; in the order of the nodes.
std::vector<ShardMessage> own_messages(Group& group, std::span<std::byte> buffer, const std::vector<Block>& blocks);

// Starts to transfer all `bytes` of the messages, which must stay where they are until the transfers are complete.
std::vector<mpi::Transfer> exchange(Group& group, std::vector<ShardMessage>& incoming,
                                    std::vector<ShardMessage>& outgoing);

}  // namespace dtrain
