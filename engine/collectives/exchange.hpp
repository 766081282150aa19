// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "collectives/group.hpp"

namespace dtrain {

// Fills receives[r] with what rank r of `group` has for this rank in its sends: all_to_all, and with spans that are
// empty gather and scatter. Collective. Lengths are compared first, so that all ranks throw the same Mismatch where a
// rank sends another number of bytes than its peer has room for. Buffers must not overlap.
// On one node each rank's messages go through its scratch memory, in a row and piece by piece; over several by MPI.
Task exchange(Group& group, std::vector<std::span<const std::byte>> sends, std::vector<std::span<std::byte>> receives,
              std::size_t element_bytes);

}  // namespace dtrain
