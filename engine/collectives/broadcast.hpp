// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <span>

#include "collectives/group.hpp"

namespace dtrain {

// Copies rank `root`'s `buffer` to that of every rank of `group`. Collective.
// On one node through the scratch memory, piece by piece; over several by MPI's broadcast.
Task broadcast(Group& group, std::span<std::byte> buffer, int root);

}  // namespace dtrain
