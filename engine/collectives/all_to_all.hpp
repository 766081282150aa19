// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "collectives/prepared_call.hpp"

namespace dtrain {

// Fills receives[r] with the bytes that rank r of `group` has for this rank in its `sends` (exchange.hpp). Collective.
// Lengths may differ; if a rank sends another length than its peer receives, all ranks get the same Mismatch. Buffers
// must not overlap.
PreparedCall all_to_all(Group& group, std::vector<std::span<const std::byte>> sends,
                        std::vector<std::span<std::byte>> receives, DataType dtype);

}  // namespace dtrain
