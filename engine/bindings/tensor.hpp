// SPDX-License-Identifier: Apache-2.0
// Access to the memory of a tensor for the time of a call, without any header of torch.
#pragma once

#include <nanobind/nanobind.h>

#include <cstddef>
#include <span>

#include "kernels/dtype.hpp"

namespace dtrain {

struct TensorMemory {
  std::span<std::byte> bytes;
  DataType dtype;
};

// Returns the memory of `tensor` (a torch.Tensor on the CPU, contiguous); the caller keeps it alive. Throws
// nb::type_error for any other object.
TensorMemory memory_of(nanobind::handle tensor);

// Returns the same as memory_of(); throws nb::type_error if reductions do not take the tensor's type.
TensorMemory reducible_memory_of(nanobind::handle tensor);

}  // namespace dtrain
