// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <optional>
#include <span>

#include "kernels/dtype.hpp"

namespace dtrain {

struct Reduction {
  DataType dtype = DataType::float32;
  ReduceOp op = ReduceOp::sum;
  double scale = 1.0;  // the result is multiplied by this; floating types only
  // Type in which float32 sums cross between nodes: bfloat16 or float16 halve their bytes; none means `dtype`.
  std::optional<DataType> wire_dtype = std::nullopt;
  bool check_finite = false;  // look for infinities and NaN in the result; in all_reduce and reduce_shards
};

// Reduces `count` elements of all `sources`, in their order, and writes the result to every destination. A destination
// may be a source; otherwise they must not overlap. 16-bit types accumulate in float32 and are rounded once (to nearest
// even); a NaN in any source gives NaN. The result does not depend on the instruction set that runs it. With
// `check_finite` there must be at least one destination, and the function returns whether an element of the result, as
// it is stored, is infinite or NaN. Otherwise it returns false.
bool reduce(std::span<const std::byte* const> sources, std::span<std::byte* const> destinations, std::size_t count,
            const Reduction& reduction);

// Rounds float32 values to bfloat16 or float16 (to nearest even; NaN stays NaN).
void narrow(std::span<const std::byte> source, std::byte* destination, DataType dtype);
// Converts bfloat16 or float16 values to float32.
void widen(std::span<const std::byte> source, std::byte* destination, DataType dtype);

// Returns the name of the instruction set chosen for this processor.
const char* kernel_isa();

}  // namespace dtrain
