// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <span>
#include <vector>

namespace dtrain {

// Returns part number `index` of `bytes`, cut into `num_parts` at multiples of a cache line, so that no element is cut
// and no two writers share a line. Parts differ by at most a line; some are empty where `bytes` has fewer lines than
// parts.
template <class Byte>
std::span<Byte> part_of(std::span<Byte> bytes, std::size_t index, std::size_t num_parts) {
  constexpr std::size_t line_bytes = 64;
  const std::size_t num_lines = (bytes.size() + line_bytes - 1) / line_bytes;
  const auto boundary = [&](std::size_t i) { return std::min(bytes.size(), num_lines * i / num_parts * line_bytes); };
  return bytes.subspan(boundary(index), boundary(index + 1) - boundary(index));
}

// Cuts `bytes` into `num_parts` parts of the same length.
template <class Byte>
std::vector<std::span<Byte>> even_parts(std::span<Byte> bytes, std::size_t num_parts) {
  std::vector<std::span<Byte>> parts;
  const std::size_t num_bytes = bytes.size() / num_parts;
  for (std::size_t i = 0; i < num_parts; ++i) parts.push_back(bytes.subspan(i * num_bytes, num_bytes));
  return parts;
}

// Returns the bytes from `start` on, at most `length` of them; none if `bytes` ends before.
template <class Byte>
std::span<Byte> window(std::span<Byte> bytes, std::size_t start, std::size_t length) {
  const std::size_t begin = std::min(start, bytes.size());
  return bytes.subspan(begin, std::min(length, bytes.size() - begin));
}

// Copies `from` to `to`. std::memcpy takes no null pointer, and an empty span may have one.
inline void copy(std::span<const std::byte> from, std::byte* to) {
  if (!from.empty()) std::memcpy(to, from.data(), from.size());
}

// Returns where `slice`, a part of the work at own_place, lies at every local rank.
inline std::vector<std::byte*> slice_places(const std::vector<std::byte*>& places, std::span<const std::byte> slice,
                                            const std::byte* own_place) {
  std::vector<std::byte*> of_slice;
  for (std::byte* place : places) of_slice.push_back(place + (slice.data() - own_place));
  return of_slice;
}

}  // namespace dtrain
