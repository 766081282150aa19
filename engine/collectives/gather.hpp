// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "collectives/prepared_call.hpp"

namespace dtrain {

// Fills outputs[r] of rank `root` with the `input` of rank r of `group` (exchange.hpp). Collective; all inputs have the
// same length. `outputs` are ignored on other ranks than the root.
PreparedCall gather(Group& group, std::span<const std::byte> input, std::vector<std::span<std::byte>> outputs, int root,
                    DataType dtype);

}  // namespace dtrain
