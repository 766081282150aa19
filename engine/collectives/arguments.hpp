// SPDX-License-Identifier: Apache-2.0
// Checks of arguments that several collectives have, and the numbers by which ranks compare them.
#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "collectives/group.hpp"

namespace dtrain {

// All checks throw std::invalid_argument with the name of the `collective`.

// Checks that the reduction's type has its operation.
void check_reduction(const char* collective, const Reduction& reduction);

// Checks that `rank`, which the caller knows as `what` ("root"), is a rank of the group.
void check_rank(const char* collective, const char* what, int rank, const Group& group);

// Checks that there is one part for each rank, and that this rank's part is as long as `own`. `Byte` is std::byte or
// const std::byte.
template <class Byte>
void check_parts(const char* collective, const char* what, const std::vector<std::span<Byte>>& parts,
                 std::span<const std::byte> own, const Group& group);

// Sets call.count and call.parts to the lengths of the ranks' parts.
template <class Byte>
void describe_parts(const std::vector<std::span<Byte>>& parts, Call& call);

}  // namespace dtrain
