// SPDX-License-Identifier: Apache-2.0
#include "collectives/barrier.hpp"

namespace dtrain {

Task barrier(Group& group) {
  // An operation starts only when every rank of the node has called it, which on one node is all there is to do.
  if (group.num_nodes() == 1) co_return;
  mpi::Transfer transfer = group.barrier();
  auto all_called = Until([&transfer] { return transfer.test(); });
  co_await all_called;
}

}  // namespace dtrain
