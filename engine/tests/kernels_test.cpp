// SPDX-License-Identifier: Apache-2.0
// Tests of the kernels of each instruction set against a scalar reference that shares no code and no method with them.
#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <span>
#include <vector>

#include "kernels/reduce.hpp"
#include "test.hpp"

namespace dtrain {
namespace baseline {
bool reduce(std::span<const std::byte* const>, std::span<std::byte* const>, std::size_t, const Reduction&);
}
namespace avx2 {
bool reduce(std::span<const std::byte* const>, std::span<std::byte* const>, std::size_t, const Reduction&);
}
namespace avx512 {
bool reduce(std::span<const std::byte* const>, std::span<std::byte* const>, std::size_t, const Reduction&);
}

namespace {

using namespace test;

constexpr auto all_types = {DataType::float32, DataType::float64, DataType::bfloat16, DataType::float16,
                            DataType::int8,    DataType::int16,   DataType::int32,    DataType::int64,
                            DataType::uint8,   DataType::boolean};
constexpr auto all_ops = {ReduceOp::sum, ReduceOp::average, ReduceOp::product, ReduceOp::min,
                          ReduceOp::max, ReduceOp::bit_and, ReduceOp::bit_or,  ReduceOp::bit_xor};

struct Isa {
  const char* name;
  bool (*reduce)(std::span<const std::byte* const>, std::span<std::byte* const>, std::size_t, const Reduction&);
};

// Returns the instruction sets that this processor supports.
std::vector<Isa> isas() {
  std::vector<Isa> found;
  found.reserve(4);  // otherwise GCC 12 warns about the growth
  found.push_back({"chosen", dtrain::reduce});
  found.push_back({"baseline", baseline::reduce});
#ifdef KERNELS_X86
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c")) found.push_back({"avx2", avx2::reduce});
  if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    found.push_back({"avx512", avx512::reduce});
  }
#endif
  return found;
}

// A small binary format: 1 sign bit, `exponent` bits, `mantissa` bits.
struct Format {
  int exponent;
  int mantissa;

  int bias() const { return (1 << (exponent - 1)) - 1; }

  double decode(std::uint16_t bits) const {
    const int e = (bits >> mantissa) & ((1 << exponent) - 1);
    const int m = bits & ((1 << mantissa) - 1);
    const double sign = (bits >> 15) != 0 ? -1.0 : 1.0;
    if (e == (1 << exponent) - 1) return m != 0 ? std::nan("") : sign * INFINITY;
    if (e == 0) return sign * std::ldexp(m, 1 - bias() - mantissa);
    return sign * std::ldexp(m + (1 << mantissa), e - bias() - mantissa);
  }

  // Rounds to nearest, ties to even. Not for NaN.
  std::uint16_t encode(double value) const {
    const int sign = std::signbit(value) ? 0x8000 : 0;
    const int infinity = ((1 << exponent) - 1) << mantissa;
    const double magnitude = std::abs(value);
    if (std::isinf(magnitude)) return static_cast<std::uint16_t>(sign | infinity);
    const int smallest = 1 - bias();
    const int e = magnitude == 0 ? smallest : std::max(smallest, std::ilogb(magnitude));
    const double units = std::nearbyint(std::ldexp(magnitude, mantissa - e));  // may be 2^(mantissa + 1): carries
    const int bits = ((e + bias() - 1) << mantissa) + static_cast<int>(units);
    return static_cast<std::uint16_t>(sign | std::min(bits, infinity));
  }
};

constexpr Format float16{5, 10};
constexpr Format bfloat16{8, 7};

template <class T>
T combine(ReduceOp op, T a, T b) {
  if constexpr (std::is_floating_point_v<T>) {
    if (std::isnan(a) || std::isnan(b)) return std::numeric_limits<T>::quiet_NaN();
  }
  switch (op) {
    case ReduceOp::sum:
    case ReduceOp::average:
      if constexpr (std::is_integral_v<T>) {
        return static_cast<T>(static_cast<std::uint64_t>(a) + static_cast<std::uint64_t>(b));
      } else {
        return a + b;
      }
    case ReduceOp::product:
      if constexpr (std::is_integral_v<T>) {
        return static_cast<T>(static_cast<std::uint64_t>(a) * static_cast<std::uint64_t>(b));
      } else {
        return a * b;
      }
    case ReduceOp::min: return std::min(a, b);
    case ReduceOp::max: return std::max(a, b);
    default: break;
  }
  if constexpr (std::is_integral_v<T>) {
    if (op == ReduceOp::bit_and) return static_cast<T>(a & b);
    if (op == ReduceOp::bit_or) return static_cast<T>(a | b);
    return static_cast<T>(a ^ b);
  }
  return a;
}

template <class T, class Load, class Store>
bool agrees(const std::vector<std::vector<std::byte>>& sources, const std::vector<std::byte>& result,
            const Reduction& reduction, const Load& load, const Store& store) {
  using Stored = decltype(store(T{}));
  for (std::size_t i = 0; (i + 1) * sizeof(Stored) <= result.size(); ++i) {
    const auto element = [i](const std::vector<std::byte>& from) {
      Stored value{};
      std::memcpy(&value, from.data() + i * sizeof(Stored), sizeof(Stored));
      return value;
    };
    T wanted = load(element(sources[0]));
    for (std::size_t s = 1; s < sources.size(); ++s)
      wanted = combine<T>(reduction.op, wanted, load(element(sources[s])));
    if constexpr (std::is_floating_point_v<T>) {
      if (reduction.scale != 1.0) wanted *= static_cast<T>(reduction.scale);
      if (std::isnan(wanted)) {
        if (std::isnan(load(element(result)))) continue;
        return false;
      }
    }
    const Stored found = element(result);
    const Stored stored = store(wanted);
    const bool same_bits = std::memcmp(&found, &stored, sizeof(Stored)) == 0;
    const bool both_zero = std::is_floating_point_v<T> && load(found) == 0 && load(stored) == 0;
    const bool any_zero = both_zero && (reduction.op == ReduceOp::min || reduction.op == ReduceOp::max);
    if (!same_bits && !any_zero) return false;  // min and max of 0 and -0 may be either
  }
  return true;
}

bool agrees(const std::vector<std::vector<std::byte>>& sources, const std::vector<std::byte>& result,
            const Reduction& reduction) {
  const auto small = [&](const Format& format) {
    return agrees<float>(
        sources, result, reduction, [&](std::uint16_t bits) { return static_cast<float>(format.decode(bits)); },
        [&](float value) { return format.encode(value); });
  };
  const auto same = [](auto value) { return value; };
  switch (reduction.dtype) {
    case DataType::float32: return agrees<float>(sources, result, reduction, same, same);
    case DataType::float64: return agrees<double>(sources, result, reduction, same, same);
    case DataType::bfloat16: return small(bfloat16);
    case DataType::float16: return small(float16);
    case DataType::int8: return agrees<std::int8_t>(sources, result, reduction, same, same);
    case DataType::int16: return agrees<std::int16_t>(sources, result, reduction, same, same);
    case DataType::int32: return agrees<std::int32_t>(sources, result, reduction, same, same);
    case DataType::int64: return agrees<std::int64_t>(sources, result, reduction, same, same);
    case DataType::uint8: return agrees<std::uint8_t>(sources, result, reduction, same, same);
    case DataType::boolean: {
      const bool is_all = reduction.op == ReduceOp::product || reduction.op == ReduceOp::min;
      const Reduction logic{.dtype = DataType::uint8,
                            .op = is_bitwise(reduction.op) ? reduction.op
                                  : is_all                 ? ReduceOp::min
                                                           : ReduceOp::max};
      const auto truth = [](std::uint8_t value) { return static_cast<std::uint8_t>(value != 0 ? 1 : 0); };
      return agrees<std::uint8_t>(sources, result, logic, truth, truth);
    }
    default: return false;
  }
}

bool has_nonfinite(const std::vector<std::byte>& values, DataType dtype) {
  const auto any = [&]<class T>(T, const auto& load) {
    for (std::size_t i = 0; i < values.size() / sizeof(T); ++i) {
      T value{};
      std::memcpy(&value, values.data() + i * sizeof(T), sizeof(T));
      if (!std::isfinite(load(value))) return true;
    }
    return false;
  };
  const auto same = [](auto value) { return value; };
  switch (dtype) {
    case DataType::float32: return any(0.0F, same);
    case DataType::float64: return any(0.0, same);
    case DataType::bfloat16: return any(std::uint16_t{}, [](std::uint16_t bits) { return bfloat16.decode(bits); });
    case DataType::float16: return any(std::uint16_t{}, [](std::uint16_t bits) { return float16.decode(bits); });
    default: return false;
  }
}

// Reduces on every instruction set: the bits must be the same, and agree with the reference. The same holds when the
// result is checked and written to two destinations, one of them off the cache line.
void check(const std::vector<std::vector<std::byte>>& sources, const Reduction& reduction, const std::string& what) {
  std::vector<const std::byte*> places;
  for (const auto& source : sources) places.push_back(source.data());
  std::vector<std::byte> first;
  for (const Isa& isa : isas()) {
    std::vector<std::byte> result(sources[0].size(), std::byte{0xa5});
    std::byte* const destination = result.data();
    isa.reduce(places, {&destination, 1}, result.size() / element_bytes(reduction.dtype), reduction);
    const std::string label = what + ", " + name(reduction.dtype) + " " + name(reduction.op) + ", " + isa.name;
    expect(agrees(sources, result, reduction), label);
    if (first.empty()) first = result;
    expect(result == first, label + " differs from the chosen instruction set");
    Reduction checked = reduction;
    checked.check_finite = true;
    std::vector<std::byte> copies[2]{std::vector<std::byte>(result.size()), std::vector<std::byte>(result.size() + 8)};
    const std::array<std::byte*, 2> copy_places{copies[0].data(), copies[1].data() + 8};
    const bool found = isa.reduce(places, copy_places, result.size() / element_bytes(reduction.dtype), checked);
    expect(copies[0] == result && std::equal(result.begin(), result.end(), copies[1].begin() + 8), label + " checked");
    expect(found == has_nonfinite(result, reduction.dtype), label + " found");
  }
}

std::vector<std::byte> random_bytes(std::size_t num_bytes, std::mt19937_64& random) {
  std::vector<std::byte> bytes(num_bytes);
  for (std::byte& byte : bytes) byte = static_cast<std::byte>(random());
  return bytes;
}

// Returns values at which errors are likely, between random ones.
template <class T>
std::vector<std::byte> floats(std::size_t count, std::mt19937_64& random) {
  using Limits = std::numeric_limits<T>;
  const T special[] = {0,
                       T{-0.0},
                       1,
                       -1,
                       Limits::infinity(),
                       -Limits::infinity(),
                       Limits::quiet_NaN(),
                       Limits::denorm_min(),
                       -Limits::denorm_min(),
                       Limits::min(),
                       Limits::max(),
                       Limits::lowest(),
                       Limits::epsilon(),
                       T(0.1),
                       T(1) + Limits::epsilon()};
  std::normal_distribution<double> normal;
  std::vector<std::byte> bytes(count * sizeof(T));
  for (std::size_t i = 0; i < count; ++i) {
    const T value = random() % 4 == 0 ? special[random() % std::size(special)] : static_cast<T>(normal(random));
    std::memcpy(bytes.data() + i * sizeof(T), &value, sizeof(T));
  }
  return bytes;
}

const Test every_type_and_operation("kernels: every type and operation", Runs::alone, [] {
  std::mt19937_64 random(1);
  for (const DataType dtype : all_types) {
    for (const ReduceOp op : all_ops) {
      if (is_bitwise(op) && is_floating(dtype)) continue;
      for (const std::size_t num_sources : {1U, 2U, 3U, 5U}) {
        for (const std::size_t count : {0U, 1U, 7U, 63U, 2047U, 2048U, 2049U, 4099U}) {
          std::vector<std::vector<std::byte>> sources;
          for (std::size_t s = 0; s < num_sources; ++s) {
            if (dtype == DataType::float32) {
              sources.push_back(floats<float>(count, random));
            } else if (dtype == DataType::float64) {
              sources.push_back(floats<double>(count, random));
            } else {
              sources.push_back(random_bytes(count * element_bytes(dtype), random));
            }
          }
          const double scale = op == ReduceOp::average ? 1.0 / static_cast<double>(num_sources) : 1.0;
          check(sources, {.dtype = dtype, .op = op, .scale = scale}, std::to_string(num_sources) + " sources");
        }
      }
    }
  }
});

std::vector<std::byte> bytes_of(const std::vector<std::uint16_t>& values) {
  const auto bytes = std::as_bytes(std::span(values));
  return {bytes.begin(), bytes.end()};
}

const Test every_pattern("kernels: all 65536 patterns of the 16-bit types", Runs::alone, [] {
  std::mt19937_64 random(2);
  std::vector<std::uint16_t> patterns(65536);
  for (std::size_t i = 0; i < patterns.size(); ++i) patterns[i] = static_cast<std::uint16_t>(i);
  for (const DataType dtype : {DataType::bfloat16, DataType::float16}) {
    check({bytes_of(patterns)}, {.dtype = dtype}, "alone");
    // Products of two patterns reach every kind of rounding, including halfway and subnormal ones; a sum of neighbours
    // lies halfway whenever it needs one more bit.
    std::vector<std::uint16_t> next(patterns);
    std::ranges::rotate(next, next.begin() + 1);
    check({bytes_of(patterns), bytes_of(next)}, {.dtype = dtype}, "with its neighbour");
    for (int round = 0; round < 8; ++round) {
      std::vector<std::uint16_t> others(patterns);
      std::ranges::shuffle(others, random);
      for (const ReduceOp op : all_ops) {
        if (is_bitwise(op)) continue;
        check({bytes_of(patterns), bytes_of(others)}, {.dtype = dtype, .op = op}, "pairs");
      }
      check({bytes_of(patterns)}, {.dtype = dtype, .op = ReduceOp::average, .scale = std::exp2(-round) / 3}, "scaled");
    }
  }
});

const Test halfway("kernels: rounding to nearest, ties to even", Runs::alone, [] {
  const auto sum = [](DataType dtype, std::vector<std::uint16_t> values) {
    std::vector<const std::byte*> sources;
    for (const auto& value : values) sources.push_back(reinterpret_cast<const std::byte*>(&value));
    std::uint16_t result = 0;
    auto* const destination = reinterpret_cast<std::byte*>(&result);
    reduce(sources, {&destination, 1}, 1, {.dtype = dtype});
    return result;
  };
  expect_equal(sum(DataType::bfloat16, {0x3f80, 0x3b80}), 0x3f80, "1 + 2^-8 is halfway and goes to the even 1");
  expect_equal(sum(DataType::bfloat16, {0x3f81, 0x3b80}), 0x3f82, "1 + 2^-7 + 2^-8 goes up to the even one");
  expect_equal(sum(DataType::bfloat16, {0x3f80, 0x3b80, 0x3b80}), 0x3f81, "two halves are kept in float32");
  expect_equal(sum(DataType::float16, {0x3c00, 0x1000}), 0x3c00, "1 + 2^-11");
  expect_equal(sum(DataType::float16, {0x3c01, 0x1000}), 0x3c02, "1 + 2^-10 + 2^-11");
  expect_equal(sum(DataType::float16, {0x7bff, 0x4bff}), 0x7bff, "65504 + 15.99 is below halfway to infinity");
  expect_equal(sum(DataType::float16, {0x7bff, 0x4c00}), 0x7c00, "65504 + 16 is halfway, and infinity is even");
  expect_equal(sum(DataType::float16, {0x7bff, 0x7bff, 0xfbff}), 0x7bff, "an overflow on the way does no harm");
  expect_equal(sum(DataType::float16, {0x0001, 0x0001}), 0x0002, "subnormal numbers");
  expect_equal(sum(DataType::float16, {0x03ff, 0x0001}), 0x0400, "the largest subnormal and one more");
});

// Values of a type as bits: 1, the largest, infinity, a quiet NaN, and the NaN with the fewest bits.
struct Patterns {
  DataType dtype;
  std::uint64_t one, largest, infinity, quiet, loud;
};
constexpr Patterns patterns[] = {
    {DataType::float32, 0x3f800000, 0x7f7fffff, 0x7f800000, 0x7fc00000, 0x7f800001},
    {DataType::float64, 0x3ff0000000000000, 0x7fefffffffffffff, 0x7ff0000000000000, 0x7ff8000000000000,
     0x7ff0000000000001},
    {DataType::bfloat16, 0x3f80, 0x7f7f, 0x7f80, 0x7fc0, 0x7f81},
    {DataType::float16, 0x3c00, 0x7bff, 0x7c00, 0x7e00, 0x7c01},
};

// Reduces two sources of `count` ones, except that element `position` has `values`; returns whether the check found
// something.
bool found(const Isa& isa, const Reduction& reduction, std::uint64_t one, std::size_t count, std::size_t position,
           std::array<std::uint64_t, 2> values) {
  const std::size_t width = element_bytes(reduction.dtype);
  std::array<std::vector<std::byte>, 2> sources;
  for (std::size_t s = 0; s < 2; ++s) {
    sources[s].resize(count * width);
    for (std::size_t i = 0; i < count; ++i) {
      std::memcpy(sources[s].data() + i * width, i == position ? &values[s] : &one, width);  // little endian
    }
  }
  const std::array<const std::byte*, 2> places{sources[0].data(), sources[1].data()};
  std::byte* const destination = sources[0].data();
  return isa.reduce(places, {&destination, 1}, count, reduction);
}

const Test nonfinite("kernels: an infinity or a NaN at any place is found, if asked for", Runs::alone, [] {
  for (const Isa& isa : isas()) {
    for (const auto& [dtype, one, largest, infinity, quiet, loud] : patterns) {
      const std::string label = std::string(name(dtype)) + ", " + isa.name;
      const std::uint64_t minus = std::uint64_t{1} << (8 * element_bytes(dtype) - 1);
      const Reduction checked{.dtype = dtype, .check_finite = true};
      constexpr std::size_t count = 2048 + 67;  // a block and a tail
      for (std::size_t position = 0; position < count; ++position) {
        const std::uint64_t values[] = {infinity, infinity | minus, quiet, loud, quiet | minus};
        const std::uint64_t value = values[position % 5];
        expect(found(isa, checked, one, count, position, {one, value}), label + " at " + std::to_string(position));
      }
      for (const std::size_t length : {1U, 2U, 7U, 15U, 16U, 33U, 2047U, 2048U, 2049U, 6000U}) {
        for (const std::size_t position : {std::size_t{0}, length / 2, length - 1}) {
          for (const std::uint64_t value : {infinity, infinity | minus, quiet, loud}) {
            expect(found(isa, checked, one, length, position, {value, one}), label + ", short");
            const Reduction unasked{.dtype = dtype};
            expect(!found(isa, unasked, one, length, position, {value, one}), label + ", not asked for");
          }
          for (const std::uint64_t value : {largest, largest | minus, minus, minus | 1, std::uint64_t{1}}) {
            expect(!found(isa, checked, one, length, position, {value, 0}), label + ", finite");
          }
        }
      }
      const auto of_two = [&](ReduceOp op, std::uint64_t a, std::uint64_t b) {
        const Reduction how{.dtype = dtype,
                            .op = op,
                            .scale = op == ReduceOp::average ? 0.5 : 1.0,
                            .check_finite = true};
        return found(isa, how, one, 100, 50, {a, b});
      };
      expect(of_two(ReduceOp::sum, largest, largest), label + ": a sum of finite values that overflows");
      expect(of_two(ReduceOp::sum, infinity, infinity | minus), label + ": infinity minus infinity");
      expect(!of_two(ReduceOp::sum, largest, largest | minus), label + ": a sum of zero");
      const bool wide = dtype == DataType::float16;  // float32, in which it is added, holds the sum of two of them
      expect_equal(of_two(ReduceOp::average, largest, largest), !wide, label + ": an average whose sum overflows");
      expect(of_two(ReduceOp::average, infinity, one), label + ": an average");
      expect(of_two(ReduceOp::product, largest, largest), label + ": a product");
      expect(of_two(ReduceOp::product, infinity, 0), label + ": infinity times zero");
      expect(!of_two(ReduceOp::min, infinity, one) && of_two(ReduceOp::min, infinity | minus, one), label + ": min");
      expect(of_two(ReduceOp::max, infinity, one) && !of_two(ReduceOp::max, infinity | minus, one), label + ": max");
      expect(of_two(ReduceOp::min, quiet, one) && of_two(ReduceOp::max, one, quiet), label + ": NaN goes through");
    }
    for (const DataType dtype : {DataType::int32, DataType::int64, DataType::uint8, DataType::boolean}) {
      expect(!found(isa, {.dtype = dtype, .check_finite = true}, ~0ULL, 100, 0, {~0ULL, 0}), "integers are finite");
    }
  }
});

const Test destinations("kernels: several destinations, one of them a source", Runs::alone, [] {
  std::vector<float> a(5000, 1.5F);
  std::vector<float> b(5001, 2.0F);
  std::vector<float> c(5000, 0.0F);
  const auto bytes = [](float* values) { return reinterpret_cast<std::byte*>(values); };
  for (const Isa& isa : isas()) {
    std::ranges::fill(a, 1.5F);
    std::ranges::fill(b, 2.0F);
    const std::vector<const std::byte*> sources{bytes(a.data()), bytes(b.data() + 1)};  // off the cache line
    const std::vector<std::byte*> results{bytes(a.data()), bytes(b.data() + 1), bytes(c.data())};
    isa.reduce(sources, results, a.size(), {});
    expect(std::ranges::count(a, 3.5F) == 5000 && std::ranges::count(c, 3.5F) == 5000, isa.name);
    expect(std::ranges::count(b, 3.5F) == 5000 && b[0] == 2.0F, std::string("beside the destination, ") + isa.name);
  }
});

}  // namespace
}  // namespace dtrain
