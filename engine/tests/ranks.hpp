// SPDX-License-Identifier: Apache-2.0
// Helpers for tests on MPI ranks: engines over real and pretend nodes, and the expected results of collectives.
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
// Submits the call, waits until it is done, and rethrows its error.
void finish(Engine& engine, PreparedCall prepared);

// A group of some ranks in some order over some nodes. Each rank sees the groups of which it is a member.
struct Layout {
  Engine& engine;
  Group& group;
  std::vector<int> numa_nodes;  // pretended NUMA node of each rank of the engine; empty: all ranks are on one
  std::string name;
};

// Runs `body` over one node, several nodes, uneven nodes, nodes with interleaved ranks, groups of some ranks only, and
// several NUMA nodes.
void for_each_layout(const std::function<void(const Layout&)>& body);

// Returns the contribution of rank `rank` of a group: random values of `dtype`, so that an order or a rounding shows
// that is not the promised one.
Bytes contribution(int rank, DataType dtype, std::size_t count);

// Reduces `contributions`, one for each rank of the group, over each domain, each node and then the nodes; with a
// wire_dtype the results of the last two are rounded.
Bytes reduce_by_nodes(const Layout& layout, const std::vector<Bytes>& contributions, Reduction reduction);
// Reduces `contributions` in the order of the ranks.
Bytes reduce_in_order(const std::vector<Bytes>& contributions, const Reduction& reduction);

inline Reduction with_scale(DataType dtype, ReduceOp op, int size) {
  return {.dtype = dtype, .op = op, .scale = op == ReduceOp::average ? 1.0 / size : 1.0};
}

}  // namespace dtrain::test
