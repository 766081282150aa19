// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

namespace dtrain {

// Reductions take the types up to `boolean`; the others are only moved. `other` is any type that is not named, with one
// byte for an element.
enum class DataType : std::uint8_t {
  float32,
  float64,
  bfloat16,
  float16,
  int8,
  int16,
  int32,
  int64,
  uint8,
  boolean,
  uint16,
  uint32,
  uint64,
  complex64,
  complex128,
  other
};

// `average` is a sum that is scaled at the end; only floating types support it. Only integers and booleans support the
// bitwise operations. On booleans sum, max and bit_or are "or"; product, min and bit_and are "and".
enum class ReduceOp : std::uint8_t { sum, average, product, min, max, bit_and, bit_or, bit_xor };

constexpr std::size_t element_bytes(DataType dtype) {
  switch (dtype) {
    case DataType::complex128: return 16;
    case DataType::float64:
    case DataType::int64:
    case DataType::uint64:
    case DataType::complex64: return 8;
    case DataType::float32:
    case DataType::int32:
    case DataType::uint32: return 4;
    case DataType::bfloat16:
    case DataType::float16:
    case DataType::int16:
    case DataType::uint16: return 2;
    case DataType::int8:
    case DataType::uint8:
    case DataType::boolean:
    case DataType::other: return 1;
  }
  return 0;
}

constexpr bool is_floating(DataType dtype) {
  return dtype == DataType::float32 || dtype == DataType::float64 || dtype == DataType::bfloat16 ||
         dtype == DataType::float16;
}

constexpr bool is_reducible(DataType dtype) { return dtype <= DataType::boolean; }

constexpr bool is_bitwise(ReduceOp op) { return op >= ReduceOp::bit_and; }

constexpr const char* name(DataType dtype) {
  switch (dtype) {
    case DataType::float32: return "float32";
    case DataType::float64: return "float64";
    case DataType::bfloat16: return "bfloat16";
    case DataType::float16: return "float16";
    case DataType::int8: return "int8";
    case DataType::int16: return "int16";
    case DataType::int32: return "int32";
    case DataType::int64: return "int64";
    case DataType::uint8: return "uint8";
    case DataType::boolean: return "bool";
    case DataType::uint16: return "uint16";
    case DataType::uint32: return "uint32";
    case DataType::uint64: return "uint64";
    case DataType::complex64: return "complex64";
    case DataType::complex128: return "complex128";
    case DataType::other: return "bytes";
  }
  return "?";
}

constexpr const char* name(ReduceOp op) {
  switch (op) {
    case ReduceOp::sum: return "sum";
    case ReduceOp::average: return "average";
    case ReduceOp::product: return "product";
    case ReduceOp::min: return "min";
    case ReduceOp::max: return "max";
    case ReduceOp::bit_and: return "band";
    case ReduceOp::bit_or: return "bor";
    case ReduceOp::bit_xor: return "bxor";
  }
  return "?";
}

}  // namespace dtrain
