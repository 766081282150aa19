// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <span>

#include "collectives/prepared_call.hpp"

namespace dtrain {

// Reduces `buffer` over all ranks of `group` for rank `root`. Collective. It runs all_reduce, so every rank's buffer
// gets the result.
PreparedCall reduce(Group& group, std::span<std::byte> buffer, const Reduction& reduction, int root);

}  // namespace dtrain
