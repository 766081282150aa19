// SPDX-License-Identifier: Apache-2.0
#include "kernels/reduce.hpp"

namespace dtrain {

using Kernel = bool (*)(std::span<const std::byte* const>, std::span<std::byte* const>, std::size_t, const Reduction&);
using Conversion = void (*)(std::span<const std::byte>, std::byte*, DataType);

// reduce_kernels.cpp is compiled once for each of these namespaces, with the flags of its instruction set.
namespace baseline {
bool reduce(std::span<const std::byte* const>, std::span<std::byte* const>, std::size_t, const Reduction&);
void narrow(std::span<const std::byte>, std::byte*, DataType);
void widen(std::span<const std::byte>, std::byte*, DataType);
}  // namespace baseline
#ifdef KERNELS_X86
namespace avx2 {
bool reduce(std::span<const std::byte* const>, std::span<std::byte* const>, std::size_t, const Reduction&);
void narrow(std::span<const std::byte>, std::byte*, DataType);
void widen(std::span<const std::byte>, std::byte*, DataType);
}  // namespace avx2
namespace avx512 {
bool reduce(std::span<const std::byte* const>, std::span<std::byte* const>, std::size_t, const Reduction&);
void narrow(std::span<const std::byte>, std::byte*, DataType);
void widen(std::span<const std::byte>, std::byte*, DataType);
}  // namespace avx512
#endif

namespace {

struct Choice {
  Kernel kernel;
  Conversion narrow;
  Conversion widen;
  const char* isa;
};

Choice choose() {
#ifdef KERNELS_X86
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return {avx512::reduce, avx512::narrow, avx512::widen, "avx512"};
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c")) {
    return {avx2::reduce, avx2::narrow, avx2::widen, "avx2"};
  }
#endif
  return {baseline::reduce, baseline::narrow, baseline::widen, "baseline"};
}

const Choice chosen = choose();

}  // namespace

bool reduce(std::span<const std::byte* const> sources, std::span<std::byte* const> destinations, std::size_t count,
            const Reduction& reduction) {
  return chosen.kernel(sources, destinations, count, reduction);
}

void narrow(std::span<const std::byte> source, std::byte* destination, DataType dtype) {
  chosen.narrow(source, destination, dtype);
}

void widen(std::span<const std::byte> source, std::byte* destination, DataType dtype) {
  chosen.widen(source, destination, dtype);
}

const char* kernel_isa() { return chosen.isa; }

}  // namespace dtrain
