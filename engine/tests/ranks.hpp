// SPDX-License-Identifier: Apache-2.0
// For tests on MPI ranks: engines over real and pretend nodes, and what the collectives must give.
#pragma once

#include <chrono>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "runtime/engine.hpp"
#include "test.hpp"

namespace dtrain::test {

using Bytes = std::vector<std::byte>;

// An engine over all ranks, closed at the end.
struct Ranks {
  explicit Ranks(int max_ranks_per_node = 0, std::optional<int> numa_node = std::nullopt)
      : engine({.max_ranks_per_node = max_ranks_per_node, .numa_node = numa_node}) {}
  ~Ranks() { engine.close(); }
  Ranks(const Ranks&) = delete;
  Ranks& operator=(const Ranks&) = delete;

  std::shared_ptr<Group> all();

  Engine engine;
};

// Waits until `operation` is done, and rethrows its error.
void finish(Engine& engine, const std::shared_ptr<Operation>& operation);

// A group of some ranks in some order over some nodes. Each rank sees the ones it is a member of.
struct Layout {
  Engine& engine;
  Group& group;
  std::vector<int> numa_nodes;  // pretended, of each rank of the engine; empty: all are on one
  std::string name;
};

// One node, several, uneven ones, ranks of nodes interleaved, groups of some ranks only, several NUMA nodes.
void for_each_layout(const std::function<void(const Layout&)>& body);

// What rank `rank` of a group contributes: random values of `dtype`, so that an order or a rounding that is not the
// promised one shows.
Bytes contribution(int rank, DataType dtype, std::size_t count);

// The reduction of `contributions`, one for each rank of the group, over each domain, each node and then the nodes; with
// a wire_dtype rounded after the last two.
Bytes reduce_by_nodes(const Layout& layout, const std::vector<Bytes>& contributions, Reduction reduction);
// In the order of the ranks.
Bytes reduce_in_order(const std::vector<Bytes>& contributions, const Reduction& reduction);

inline Reduction with_scale(DataType dtype, ReduceOp op, int size) {
  return {.dtype = dtype, .op = op, .scale = op == ReduceOp::average ? 1.0 / size : 1.0};
}

}  // namespace dtrain::test
