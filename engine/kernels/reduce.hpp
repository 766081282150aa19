// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <span>

#include "kernels/dtype.hpp"

namespace dtrain {

struct Reduction {
  DataType dtype = DataType::float32;
  ReduceOp op = ReduceOp::sum;
  double scale = 1.0;  // the result is multiplied by this; floating types only
};

// Reduces `count` elements of all `sources`, in their order, and writes the result to every destination. A destination
// may be a source, else they must not overlap. 16-bit types accumulate in float32 and are rounded once (to nearest
// even); a NaN in any source gives NaN. The result does not depend on the instruction set that runs it.
void reduce(std::span<const std::byte* const> sources, std::span<std::byte* const> destinations, std::size_t count,
            const Reduction& reduction);

// Name of the instruction set chosen for this processor.
const char* kernel_isa();

}  // namespace dtrain
