// SPDX-License-Identifier: Apache-2.0
// Function that libFuzzer calls, for the target that CMake names.
#include <cstdint>

#include "fuzz/targets.hpp"

extern "C" __attribute__((visibility("default"))) int LLVMFuzzerTestOneInput(const std::uint8_t* data,
                                                                             std::size_t size) {
  dtrain::fuzz::FUZZ_TARGET(std::as_bytes(std::span(data, size)));
  return 0;
}
