// SPDX-License-Identifier: Apache-2.0
// The memory of a tensor, for the time of a call, without any header of torch.
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

// What `tensor` (a torch.Tensor on the CPU, contiguous) holds; the caller keeps it alive. Throws nb::type_error for
// anything else.
TensorMemory memory_of(nanobind::handle tensor);

// The same, of a type that reductions take.
TensorMemory reducible_memory_of(nanobind::handle tensor);

}  // namespace dtrain
