// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

namespace dtrain {

enum class DataType : std::uint8_t { float32, float64, bfloat16, float16, int32, int64, uint8, boolean };

// `average` is a sum, scaled at the end; the integer types do not have it. On booleans sum and max are "or", product
// and min are "and".
enum class ReduceOp : std::uint8_t { sum, average, product, min, max };

constexpr std::size_t element_bytes(DataType dtype) {
  switch (dtype) {
    case DataType::float64:
    case DataType::int64: return 8;
    case DataType::float32:
    case DataType::int32: return 4;
    case DataType::bfloat16:
    case DataType::float16: return 2;
    case DataType::uint8:
    case DataType::boolean: return 1;
  }
  return 0;
}

constexpr const char* name(DataType dtype) {
  switch (dtype) {
    case DataType::float32: return "float32";
    case DataType::float64: return "float64";
    case DataType::bfloat16: return "bfloat16";
    case DataType::float16: return "float16";
    case DataType::int32: return "int32";
    case DataType::int64: return "int64";
    case DataType::uint8: return "uint8";
    case DataType::boolean: return "bool";
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
  }
  return "?";
}

}  // namespace dtrain
