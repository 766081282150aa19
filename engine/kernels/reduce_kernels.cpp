// SPDX-License-Identifier: Apache-2.0
// Plain loops over blocks that fit the first-level cache; the compiler vectorises them. Compiled once per instruction
// set, in the namespace KERNEL_ISA. Everything here except reduce(), narrow() and widen() has internal linkage, or the
// linker would merge code of different instruction sets.
#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "kernels/reduce.hpp"

namespace dtrain::KERNEL_ISA {
namespace {

constexpr std::size_t block_elements = 2048;

struct BFloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};
struct Boolean {
  std::uint8_t value;
};

template <class T>
struct Stored {  // stored as T, reduced as T
  using Accumulator = T;
  static T load(T value) { return value; }
  static constexpr T store(T value) { return value; }
};

template <>
struct Stored<BFloat16> {
  using Accumulator = float;
  static float load(BFloat16 value) { return std::bit_cast<float>(std::uint32_t{value.bits} << 16); }
  static constexpr BFloat16 store(float value) {
    const auto bits = std::bit_cast<std::uint32_t>(value);
    const std::uint32_t rounded = (bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16;
    const std::uint32_t quiet_nan = (bits >> 16) | 0x40U;
    return {static_cast<std::uint16_t>((bits & 0x7fffffffU) > 0x7f800000U ? quiet_nan : rounded)};
  }
};

template <>
struct Stored<Float16> {
  using Accumulator = float;
  static float load(Float16 value) {
    // A float16's fields, moved to the places of float32's, are the value times 2^-112, subnormals included.
    const std::uint32_t shifted = (std::uint32_t{value.bits} & 0x7fffU) << 13;
    const auto scaled = std::bit_cast<std::uint32_t>(std::bit_cast<float>(shifted) * 0x1p112F);
    const std::uint32_t magnitude = shifted >= 0x0f800000U ? shifted | 0x7f800000U : scaled;
    return std::bit_cast<float>(magnitude | (std::uint32_t{value.bits} & 0x8000U) << 16);
  }
  static constexpr Float16 store(float value) {
    const auto bits = std::bit_cast<std::uint32_t>(value);
    const std::uint32_t magnitude = bits & 0x7fffffffU;
    const std::uint32_t sign = (bits >> 16) & 0x8000U;
    // Adding 0.5 rounds a value below 2^-14 to a multiple of 2^-24, float16's smallest subnormal.
    const std::uint32_t subnormal = std::bit_cast<std::uint32_t>(std::bit_cast<float>(magnitude) + 0.5F) -
                                    std::bit_cast<std::uint32_t>(0.5F);
    const std::uint32_t normal = (magnitude - (112U << 23) + 0xfffU + ((magnitude >> 13) & 1U)) >> 13;
    const std::uint32_t not_finite = magnitude > 0x7f800000U ? 0x7e00U : 0x7c00U;
    const std::uint32_t finite = magnitude < 0x38800000U ? subnormal : normal;
    return {static_cast<std::uint16_t>(sign | (magnitude >= 0x47800000U ? not_finite : finite))};
  }
};

template <>
struct Stored<Boolean> {
  using Accumulator = std::uint8_t;
  static std::uint8_t load(Boolean value) { return value.value != 0 ? 1 : 0; }
  static Boolean store(std::uint8_t value) { return {value}; }
};

template <class T>
T minimum(T a, T b) {
  // NOLINTNEXTLINE(misc-redundant-expression): only a NaN differs from itself
  if constexpr (std::is_floating_point_v<T>) return a != a || a < b ? a : b;
  return a < b ? a : b;
}

template <class T>
T maximum(T a, T b) {
  // NOLINTNEXTLINE(misc-redundant-expression): only a NaN differs from itself
  if constexpr (std::is_floating_point_v<T>) return a != a || a > b ? a : b;
  return a > b ? a : b;
}

// Signed overflow wraps, as in torch.
template <class T>
T add(T a, T b) {
  if constexpr (std::is_integral_v<T>) {
    using U = std::make_unsigned_t<T>;
    return static_cast<T>(static_cast<U>(a) + static_cast<U>(b));
  } else {
    return a + b;
  }
}

template <class T>
T multiply(T a, T b) {
  if constexpr (std::is_integral_v<T>) {
    using Wide = std::uint64_t;  // avoids promotion to a signed int
    return static_cast<T>(static_cast<Wide>(a) * static_cast<Wide>(b));
  } else {
    return a * b;
  }
}

template <class T>
constexpr auto bits_of(T value) {
  if constexpr (sizeof(T) == 2) {
    return value.bits;
  } else {
    return std::bit_cast<std::conditional_t<sizeof(T) == 4, std::uint32_t, std::uint64_t>>(value);
  }
}

// Copies values, and returns whether any of them is infinite or NaN. The exponent of such a value is all ones, so that
// adding a one to its lowest bit carries into the sign's place. In a copy, which waits for memory, the check takes no
// additional time.
template <class T>
bool copy_and_check(const T* values, T* __restrict copy, std::size_t count) {
  using Bits = decltype(bits_of(T{}));
  constexpr auto infinity = std::numeric_limits<typename Stored<T>::Accumulator>::infinity();
  constexpr Bits exponent = bits_of(Stored<T>::store(infinity));
  constexpr Bits sign = Bits{1} << (8 * sizeof(T) - 1);
  constexpr Bits lowest = sign - exponent;
  Bits carries = 0;
  for (std::size_t i = 0; i < count; ++i) {
    const Bits bits = bits_of(values[i]);
    copy[i] = std::bit_cast<T>(bits);
    carries = static_cast<Bits>(carries | ((bits & exponent) + lowest));
  }
  return (carries & sign) != 0;
}

template <class T, class Combine>
bool reduce_blocks(std::span<const std::byte* const> sources, std::span<std::byte* const> destinations,
                   std::size_t count, const Reduction& reduction, Combine combine) {
  using Accumulator = typename Stored<T>::Accumulator;
  const double scale = reduction.scale;
  bool found_nonfinite = false;
  alignas(64) Accumulator accumulator[block_elements];
  alignas(64) T result[block_elements];
  for (std::size_t start = 0; start < count; start += block_elements) {
    const std::size_t n = std::min(block_elements, count - start);
    const auto block = [start](const std::byte* base) { return reinterpret_cast<const T*>(base) + start; };
    const T* first = block(sources[0]);
    if (sources.size() == 1) {
      for (std::size_t i = 0; i < n; ++i) accumulator[i] = Stored<T>::load(first[i]);
    } else {
      const T* second = block(sources[1]);
      for (std::size_t i = 0; i < n; ++i) {
        accumulator[i] = combine(Stored<T>::load(first[i]), Stored<T>::load(second[i]));
      }
    }
    for (std::size_t s = 2; s < sources.size(); ++s) {
      const T* source = block(sources[s]);
      for (std::size_t i = 0; i < n; ++i) accumulator[i] = combine(accumulator[i], Stored<T>::load(source[i]));
    }
    if constexpr (std::is_floating_point_v<Accumulator>) {
      if (scale != 1.0) {
        for (std::size_t i = 0; i < n; ++i) accumulator[i] *= static_cast<Accumulator>(scale);
      }
    }
    const void* finished = accumulator;
    if constexpr (!std::is_same_v<T, Accumulator>) {
      for (std::size_t i = 0; i < n; ++i) result[i] = Stored<T>::store(accumulator[i]);
      finished = result;
    }
    auto places = destinations;
    if constexpr (std::is_floating_point_v<Accumulator>) {
      if (reduction.check_finite) {
        auto* const copy = reinterpret_cast<T*>(places[0]) + start;
        found_nonfinite |= copy_and_check(static_cast<const T*>(finished), copy, n);
        places = places.subspan(1);
      }
    }
    for (std::byte* place : places) std::memcpy(place + start * sizeof(T), finished, n * sizeof(T));
  }
  return found_nonfinite;
}

template <class T>
bool reduce_type(std::span<const std::byte* const> sources, std::span<std::byte* const> destinations, std::size_t count,
                 const Reduction& reduction) {
  using A = typename Stored<T>::Accumulator;
  const auto run = [&](auto combine) { return reduce_blocks<T>(sources, destinations, count, reduction, combine); };
  const bool boolean = std::is_same_v<T, Boolean>;
  switch (reduction.op) {
    case ReduceOp::sum:
    case ReduceOp::average:
      if constexpr (boolean) return run([](A a, A b) { return maximum(a, b); });
      return run([](A a, A b) { return add(a, b); });
    case ReduceOp::product: return run([](A a, A b) { return multiply(a, b); });
    case ReduceOp::min: return run([](A a, A b) { return minimum(a, b); });
    case ReduceOp::max: return run([](A a, A b) { return maximum(a, b); });
    default: break;
  }
  if constexpr (std::is_integral_v<A>) {
    switch (reduction.op) {
      case ReduceOp::bit_and: return run([](A a, A b) { return static_cast<A>(a & b); });
      case ReduceOp::bit_or: return run([](A a, A b) { return static_cast<A>(a | b); });
      case ReduceOp::bit_xor: return run([](A a, A b) { return static_cast<A>(a ^ b); });
      default: break;
    }
  }
  return false;
}

template <class T>
void narrow(const float* source, T* destination, std::size_t count) {
  for (std::size_t i = 0; i < count; ++i) destination[i] = Stored<T>::store(source[i]);
}

template <class T>
void widen(const T* source, float* destination, std::size_t count) {
  for (std::size_t i = 0; i < count; ++i) destination[i] = Stored<T>::load(source[i]);
}

}  // namespace

void narrow(std::span<const std::byte> source, std::byte* destination, DataType dtype);
void widen(std::span<const std::byte> source, std::byte* destination, DataType dtype);

void narrow(std::span<const std::byte> source, std::byte* destination, DataType dtype) {
  const auto* from = reinterpret_cast<const float*>(source.data());
  const std::size_t count = source.size() / sizeof(float);
  if (dtype == DataType::bfloat16) return narrow(from, reinterpret_cast<BFloat16*>(destination), count);
  narrow(from, reinterpret_cast<Float16*>(destination), count);
}

void widen(std::span<const std::byte> source, std::byte* destination, DataType dtype) {
  auto* const to = reinterpret_cast<float*>(destination);
  const std::size_t count = source.size() / element_bytes(dtype);
  if (dtype == DataType::bfloat16) return widen(reinterpret_cast<const BFloat16*>(source.data()), to, count);
  widen(reinterpret_cast<const Float16*>(source.data()), to, count);
}

bool reduce(std::span<const std::byte* const> sources, std::span<std::byte* const> destinations, std::size_t count,
            const Reduction& reduction);

bool reduce(std::span<const std::byte* const> sources, std::span<std::byte* const> destinations, std::size_t count,
            const Reduction& reduction) {
  switch (reduction.dtype) {
    case DataType::float32: return reduce_type<float>(sources, destinations, count, reduction);
    case DataType::float64: return reduce_type<double>(sources, destinations, count, reduction);
    case DataType::bfloat16: return reduce_type<BFloat16>(sources, destinations, count, reduction);
    case DataType::float16: return reduce_type<Float16>(sources, destinations, count, reduction);
    case DataType::int8: return reduce_type<std::int8_t>(sources, destinations, count, reduction);
    case DataType::int16: return reduce_type<std::int16_t>(sources, destinations, count, reduction);
    case DataType::int32: return reduce_type<std::int32_t>(sources, destinations, count, reduction);
    case DataType::int64: return reduce_type<std::int64_t>(sources, destinations, count, reduction);
    case DataType::uint8: return reduce_type<std::uint8_t>(sources, destinations, count, reduction);
    case DataType::boolean: return reduce_type<Boolean>(sources, destinations, count, reduction);
    default: return false;  // callers refuse what is_reducible() refuses
  }
  return false;
}

}  // namespace dtrain::KERNEL_ISA
