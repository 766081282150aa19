// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "collectives/prepared_call.hpp"
#include "collectives/shards.hpp"

namespace dtrain {

// Ends on a rank when `buffer`, which the ranks of its node share (one block of Engine::allocate_shared), holds the
// shards of all ranks. Collective. Each rank has written its own shards before; no rank may read others' shards until
// the end. On one node this is a barrier: nothing is copied.
PreparedCall gather_shards(Group& group, std::span<std::byte> buffer, std::vector<Block> blocks);

}  // namespace dtrain
