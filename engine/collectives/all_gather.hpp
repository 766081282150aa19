// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "collectives/group.hpp"

namespace dtrain {

// Fills outputs[r] with the `input` of rank r of `group`. Collective; all ranks have outputs of the same lengths, which
// are those of the inputs. `input` may be this rank's output.
Task all_gather(Group& group, std::span<const std::byte> input, std::vector<std::span<std::byte>> outputs);

}  // namespace dtrain
