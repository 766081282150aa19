// SPDX-License-Identifier: Apache-2.0
// Helpers for tests of collectives on blocks of a buffer (collectives/shards.hpp).
#pragma once

#include <algorithm>
#include <initializer_list>
#include <span>
#include <vector>

#include "collectives/parts.hpp"
#include "collectives/shards.hpp"

namespace dtrain::test {

// Returns blocks of no element, of less and more than a line for each rank, and of many lines; with gaps, and not in
// order.
inline std::vector<Block> blocks_of(std::size_t width) {
  std::vector<Block> blocks;
  std::size_t offset = 64;
  for (const std::size_t count : std::initializer_list<std::size_t>{0, 1, 33, 100, 10007}) {
    blocks.push_back({offset, count * width});
    offset += (count * width + 127) / 64 * 64;
  }
  std::ranges::reverse(blocks);
  return blocks;
}

inline std::span<std::byte> shard(std::span<std::byte> buffer, const Block& block, int rank, int size) {
  return part_of(buffer.subspan(block.offset_bytes, block.num_bytes), static_cast<std::size_t>(rank),
                 static_cast<std::size_t>(size));
}

}  // namespace dtrain::test
