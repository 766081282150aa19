// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "collectives/group.hpp"

namespace dtrain {

// Fills receives[r] with the bytes that rank r of `group` has for this rank in its sends. Runs all_to_all, and, with
// empty spans, gather and scatter. Collective. Lengths are compared first, so that all ranks throw the same Mismatch if
// a rank sends another number of bytes than its peer receives. Buffers must not overlap. On one node each rank's
// messages go through its scratch memory, in a row and piece by piece; over several nodes through MPI.
Task exchange(Group& group, std::vector<std::span<const std::byte>> sends, std::vector<std::span<std::byte>> receives,
              std::size_t element_bytes);

}  // namespace dtrain
