// SPDX-License-Identifier: Apache-2.0
#include "collectives/arguments.hpp"

#include <cstdint>
#include <stdexcept>
#include <string>

#include "at.hpp"

namespace dtrain {

void check_reduction(const char* collective, const Reduction& reduction) {
  const auto refuse = [&](const char* who) {
    throw std::invalid_argument(std::string(collective) + ": " + name(reduction.op) + " of " + name(reduction.dtype) +
                                ": only " + who + " have it");
  };
  if (reduction.op == ReduceOp::average && !is_floating(reduction.dtype)) refuse("floating types");
  if (is_bitwise(reduction.op) && is_floating(reduction.dtype)) refuse("integers and booleans");
}

void check_rank(const char* collective, const char* what, int rank, const Group& group) {
  if (rank >= 0 && rank < group.size()) return;
  throw std::invalid_argument(std::string(collective) + ": " + what + " is " + std::to_string(rank) +
                              ", the group has ranks 0 to " + std::to_string(group.size() - 1));
}

template <class Byte>
void check_parts(const char* collective, const char* what, const std::vector<std::span<Byte>>& parts,
                 std::span<const std::byte> own, const Group& group) {
  const auto size = static_cast<std::size_t>(group.size());
  if (parts.size() == size && at(parts, group.rank()).size() == own.size()) return;
  std::string problem = std::string(collective) + ": " + std::to_string(parts.size()) + " " + what + " for " +
                        std::to_string(size) + " ranks";
  if (parts.size() == size) {
    problem += "; this rank's has " + std::to_string(at(parts, group.rank()).size()) + " bytes and should have " +
               std::to_string(own.size());
  }
  throw std::invalid_argument(problem);
}

template <class Byte>
void describe_parts(const std::vector<std::span<Byte>>& parts, Call& call) {
  bool is_even = true;
  std::uint64_t hash = 14695981039346656037U;  // FNV-1a
  std::uint64_t num_bytes = 0;
  for (const auto part : parts) {
    is_even = is_even && part.size() == parts[0].size();
    hash = (hash ^ part.size()) * 1099511628211U;
    num_bytes += part.size();
  }
  call.count = (is_even ? parts[0].size() : num_bytes) / element_bytes(call.dtype);
  call.parts = is_even ? 0 : hash;
}

template void check_parts(const char*, const char*, const std::vector<std::span<std::byte>>&,
                          std::span<const std::byte>, const Group&);
template void check_parts(const char*, const char*, const std::vector<std::span<const std::byte>>&,
                          std::span<const std::byte>, const Group&);
template void describe_parts(const std::vector<std::span<std::byte>>&, Call&);
template void describe_parts(const std::vector<std::span<const std::byte>>&, Call&);

}  // namespace dtrain
