// SPDX-License-Identifier: Apache-2.0
#include "collectives/numa.hpp"

#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <initializer_list>
#include <string>
#include <vector>

#include "at.hpp"
#include "collectives/all_reduce.hpp"
#include "memory/node.hpp"
#include "ranks.hpp"

namespace dtrain {
namespace {

using namespace test;

const Test finds("numa: ranks by NUMA node, where domains gain something", Runs::alone, [] {
  const auto found = [](std::vector<int> numa_nodes) { return find_numa_domains(numa_nodes); };
  expect(found({3, 3, 1}) == NumaDomains{{0, 1}, {2}}, "2 + 1");
  expect(found({1, 0, 1, 0}) == NumaDomains{{0, 2}, {1, 3}}, "in turn");
  expect(found({2, 0, 1, 1}) == NumaDomains{{0}, {1}, {2, 3}}, "1 + 1 + 2");
  expect(found({0}).empty() && found({0, 0, 0}).empty(), "one NUMA node");
  expect(found({0, 1}).empty(), "a rank in each");
  expect(found({0, 0, -1}).empty(), "a rank of several");
});

const Test sysfs("numa: the NUMA node that has all cores of a rank", Runs::alone, [] {
  const auto root = std::filesystem::temp_directory_path() / ("numa-" + std::to_string(getpid()));
  for (const char* core : {"node0/cpu0", "node0/cpu10", "node4/cpu1", "node4/cpu2", "power/cpu5", "node7/memory1"}) {
    std::filesystem::create_directories(root / core);
  }
  expect_equal(find_numa_node({0, 10}, root), 0, "both of node 0");
  expect_equal(find_numa_node({2}, root), 4, "one of node 4");
  expect_equal(find_numa_node({0, 1}, root), -1, "of two nodes");
  expect_equal(find_numa_node({5}, root), -1, "of no node");
  expect_equal(find_numa_node({}, root), -1, "cores unknown");
  expect_equal(find_numa_node({0}, root / "none"), -1, "a system without the folder");
  std::filesystem::remove_all(root);
});

const Test in_place("all_reduce: every type in place, in domains", Runs::on_ranks, [] {
  for_each_layout([](const Layout& layout) {
    Group& group = layout.group;
    if (layout.numa_nodes.empty()) return;
    expect(!group.local().numa_domains().empty() || group.local().size() < 3, layout.name + ": has domains");
    const auto memory = layout.engine.allocate(group, 4 << 20);
    const auto block = at(*memory, group.local().rank()).bytes();
    for (const DataType dtype :
         {DataType::float32, DataType::float64, DataType::bfloat16, DataType::float16, DataType::int8, DataType::int16,
          DataType::int32, DataType::int64, DataType::uint8, DataType::boolean}) {
      for (const ReduceOp op : {ReduceOp::sum, ReduceOp::average, ReduceOp::product, ReduceOp::min}) {
        if (op == ReduceOp::average && !is_floating(dtype)) continue;
        // The last is longer than two segments.
        for (const std::size_t count : {std::size_t{1}, std::size_t{100}, std::size_t{10007}, std::size_t{700001}}) {
          if (count > 10007 && (dtype != DataType::float32 || op != ReduceOp::average)) continue;
          std::vector<Bytes> all;
          for (int rank = 0; rank < group.size(); ++rank) all.push_back(contribution(rank, dtype, count));
          const auto buffer = block.subspan(64, count * element_bytes(dtype));
          std::ranges::copy(at(all, group.rank()), buffer.begin());
          finish(layout.engine, all_reduce(group, buffer, {.dtype = dtype, .op = op}));
          expect(std::ranges::equal(buffer, reduce_by_nodes(layout, all, with_scale(dtype, op, group.size()))),
                 layout.name + ": " + std::to_string(count) + " " + name(dtype) + " " + name(op));
          expect(block[63] == std::byte{0}, "what lies before is left alone");
        }
      }
    }
  });
});

}  // namespace
}  // namespace dtrain
