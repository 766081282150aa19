// SPDX-License-Identifier: Apache-2.0
#include "collectives/scatter.hpp"

#include <utility>

#include "at.hpp"
#include "collectives/arguments.hpp"
#include "collectives/exchange.hpp"

namespace dtrain {

PreparedCall scatter(Group& group, std::vector<std::span<const std::byte>> inputs, std::span<std::byte> output,
                     int root, DataType dtype) {
  check_rank("scatter", "root", root, group);
  const auto size = static_cast<std::size_t>(group.size());
  if (group.rank() == root) check_parts("scatter", "inputs", inputs, output, group);
  if (group.rank() != root) inputs.assign(size, {});
  std::vector<std::span<std::byte>> receives(size);
  at(receives, root) = output;
  return {.group = group,
          .call = {.collective = Collective::scatter,
                   .dtype = dtype,
                   .root = root,
                   .count = output.size() / element_bytes(dtype)},
          .start = [&group, inputs = std::move(inputs), receives = std::move(receives), dtype](Operation&) {
            return exchange(group, inputs, receives, element_bytes(dtype));
          }};
}

}  // namespace dtrain
