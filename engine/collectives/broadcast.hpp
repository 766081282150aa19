// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <span>

#include "collectives/prepared_call.hpp"

namespace dtrain {

// Copies rank `root`'s `buffer` to that of every rank of `group`. Collective. On one node the bytes go through the
// scratch memory, piece by piece; over several nodes through MPI's broadcast.
PreparedCall broadcast(Group& group, std::span<std::byte> buffer, int root, DataType dtype);

}  // namespace dtrain
