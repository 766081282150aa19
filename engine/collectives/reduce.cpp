// SPDX-License-Identifier: Apache-2.0
#include "collectives/reduce.hpp"

#include "collectives/all_reduce.hpp"
#include "collectives/arguments.hpp"

namespace dtrain {

PreparedCall reduce(Group& group, std::span<std::byte> buffer, const Reduction& reduction, int root) {
  check_reduction("reduce", reduction);
  check_rank("reduce", "root", root, group);
  return {.group = group,
          .call = {.collective = Collective::reduce,
                   .dtype = reduction.dtype,
                   .op = reduction.op,
                   .wire_dtype = reduction.dtype,
                   .root = root,
                   .count = buffer.size() / element_bytes(reduction.dtype)},
          .start = [&group, buffer, reduction](Operation&) { return run_all_reduce(group, buffer, reduction); },
          .buffer = buffer};
}

}  // namespace dtrain
