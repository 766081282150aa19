// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "collectives/prepared_call.hpp"

namespace dtrain {

// Fills the `output` of rank r of `group` with inputs[r] of rank `root` (exchange.hpp). Collective; all outputs have
// the same length. `inputs` are ignored on other ranks than the root.
PreparedCall scatter(Group& group, std::vector<std::span<const std::byte>> inputs, std::span<std::byte> output,
                     int root, DataType dtype);

}  // namespace dtrain
