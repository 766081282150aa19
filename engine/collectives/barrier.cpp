// SPDX-License-Identifier: Apache-2.0
#include "collectives/barrier.hpp"

namespace dtrain {
namespace {

Task run_barrier() {
  co_return;  // an operation starts only when every rank is known to call it
}

}  // namespace

PreparedCall barrier(Group& group) {
  return {.group = group, .call = {.collective = Collective::barrier}, .start = [](Operation&) {
            return run_barrier();
          }};
}

}  // namespace dtrain
