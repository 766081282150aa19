// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <span>

namespace dtrain {

// Part number `index` of `bytes` cut into `num_parts` at multiples of a cache line, so that no element is cut and no
// two writers share a line. Parts differ by at most a line; some are empty where there is less.
template <class Byte>
std::span<Byte> part_of(std::span<Byte> bytes, std::size_t index, std::size_t num_parts) {
  constexpr std::size_t line_bytes = 64;
  const std::size_t num_lines = (bytes.size() + line_bytes - 1) / line_bytes;
  const auto boundary = [&](std::size_t i) { return std::min(bytes.size(), num_lines * i / num_parts * line_bytes); };
  return bytes.subspan(boundary(index), boundary(index + 1) - boundary(index));
}

}  // namespace dtrain
