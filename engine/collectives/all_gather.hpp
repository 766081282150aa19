// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <span>

#include "collectives/group.hpp"

namespace dtrain {

// Fills `output` with the `input` of every rank of `group`, in rank order. Collective; all inputs have the same length
// and `output` has size() times that. `input` may be this rank's place in `output`.
Task all_gather(Group& group, std::span<const std::byte> input, std::span<std::byte> output);

}  // namespace dtrain
