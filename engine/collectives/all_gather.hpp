// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "collectives/prepared_call.hpp"

namespace dtrain {

// Fills outputs[r] with the `input` of rank r of `group`. Collective. On every rank, outputs[r] is as long as rank r's
// input. `input` may be this rank's output.
PreparedCall all_gather(Group& group, std::span<const std::byte> input, std::vector<std::span<std::byte>> outputs,
                        DataType dtype);

}  // namespace dtrain
