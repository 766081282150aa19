// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <span>
#include <vector>

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

// Where `slice`, a part of the work at own_place, lies at every local rank.
inline std::vector<std::byte*> slice_places(const std::vector<std::byte*>& places, std::span<const std::byte> slice,
                                            const std::byte* own_place) {
  std::vector<std::byte*> of_slice;
  for (std::byte* place : places) of_slice.push_back(place + (slice.data() - own_place));
  return of_slice;
}

}  // namespace dtrain
