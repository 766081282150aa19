// SPDX-License-Identifier: Apache-2.0
// Ranks without MPI: forked processes with an all_gather of their own.
#pragma once

#include <functional>

#include "memory/node.hpp"

namespace dtrain::test {

// Runs `body` in `size` forked children at once; a failure there is a failure here. `isolate`, if given, is called in
// each child before its process is made: it may change the namespaces in which that process will live.
void on_processes(int size, const std::function<void(int rank, const AllGather& all_gather)>& body,
                  const std::function<void(int rank)>& isolate = nullptr);

}  // namespace dtrain::test
