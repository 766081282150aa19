// SPDX-License-Identifier: Apache-2.0
#include "collectives/reduce.hpp"

#include "at.hpp"
#include "ranks.hpp"

namespace dtrain {
namespace {

using namespace test;

const Test every_root("reduce: for every root", Runs::on_ranks, [] {
  for_each_layout([](const Layout& layout) {
    for (int root = 0; root < layout.group.size(); ++root) {
      for (const std::size_t count : {std::size_t{0}, std::size_t{1}, std::size_t{10007}}) {
        std::vector<Bytes> all;
        for (int rank = 0; rank < layout.group.size(); ++rank) {
          all.push_back(contribution(rank, DataType::float32, count));
        }
        Bytes buffer = at(all, layout.group.rank());
        finish(layout.engine, reduce(layout.group, buffer, {.op = ReduceOp::average}, root));
        const Reduction average = with_scale(DataType::float32, ReduceOp::average, layout.group.size());
        expect(buffer == reduce_by_nodes(layout, all, average), layout.name + ": for " + std::to_string(root));
      }
    }
  });
});

const Test refuses("reduce: a root outside of the group is refused", Runs::on_ranks, [] {
  Ranks ranks;
  const auto group = ranks.all();
  for (const int root : {-1, group->size()}) {
    expect_throws<std::invalid_argument>([&] { reduce(*group, {}, {}, root); }, "reduce: root is");
  }
});

}  // namespace
}  // namespace dtrain
