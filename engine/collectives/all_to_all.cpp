// SPDX-License-Identifier: Apache-2.0
#include "collectives/all_to_all.hpp"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

#include "at.hpp"
#include "collectives/arguments.hpp"
#include "collectives/exchange.hpp"

namespace dtrain {

PreparedCall all_to_all(Group& group, std::vector<std::span<const std::byte>> sends,
                        std::vector<std::span<std::byte>> receives, DataType dtype) {
  const auto size = static_cast<std::size_t>(group.size());
  if (sends.size() != size || receives.size() != size) {
    throw std::invalid_argument("all_to_all: " + std::to_string(sends.size()) + " inputs and " +
                                std::to_string(receives.size()) + " outputs for " + std::to_string(size) + " ranks");
  }
  check_parts("all_to_all", "outputs", receives, at(sends, group.rank()), group);
  Call call{.collective = Collective::all_to_all, .dtype = dtype};
  const auto is_even = [&](const auto part) { return part.size() == sends[0].size(); };
  if (std::ranges::all_of(sends, is_even) && std::ranges::all_of(receives, is_even)) {
    call.even_bytes = sends[0].size() + 1;
  }
  return {.group = group,
          .call = call,
          .start = [&group, sends = std::move(sends), receives = std::move(receives), dtype](Operation&) {
            return exchange(group, sends, receives, element_bytes(dtype));
          }};
}

}  // namespace dtrain
