// SPDX-License-Identifier: Apache-2.0
#include "collectives/gather.hpp"

#include <utility>

#include "at.hpp"
#include "collectives/arguments.hpp"
#include "collectives/exchange.hpp"

namespace dtrain {

PreparedCall gather(Group& group, std::span<const std::byte> input, std::vector<std::span<std::byte>> outputs, int root,
                    DataType dtype) {
  check_rank("gather", "root", root, group);
  const auto size = static_cast<std::size_t>(group.size());
  if (group.rank() == root) check_parts("gather", "outputs", outputs, input, group);
  if (group.rank() != root) outputs.assign(size, {});
  std::vector<std::span<const std::byte>> sends(size);
  at(sends, root) = input;
  return {.group = group,
          .call = {.collective = Collective::gather,
                   .dtype = dtype,
                   .root = root,
                   .count = input.size() / element_bytes(dtype)},
          .start = [&group, sends = std::move(sends), outputs = std::move(outputs), dtype](Operation&) {
            return exchange(group, sends, outputs, element_bytes(dtype));
          }};
}

}  // namespace dtrain
