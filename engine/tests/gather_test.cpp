// SPDX-License-Identifier: Apache-2.0
#include "collectives/gather.hpp"

#include "ranks.hpp"

namespace dtrain {
namespace {

using namespace test;

const Test every_root("gather: to every root", Runs::on_ranks, [] {
  for_each_layout([](const Layout& layout) {
    const auto size = static_cast<std::size_t>(layout.group.size());
    const int own = layout.group.rank();
    for (int root = 0; root < layout.group.size(); ++root) {
      const std::size_t num_bytes = root == 0 ? 1500000 : 1000 * static_cast<std::size_t>(root) + 1;
      const auto of = [num_bytes](int rank) { return contribution(rank, DataType::uint8, num_bytes); };
      const Bytes input = of(own);
      std::vector<Bytes> outputs(own == root ? size : 0, Bytes(num_bytes));
      finish(layout.engine, gather(layout.group, input, {outputs.begin(), outputs.end()}, root, DataType::uint8));
      for (std::size_t rank = 0; rank < outputs.size(); ++rank) {
        expect(outputs[rank] == of(static_cast<int>(rank)), layout.name + ": gathered on " + std::to_string(root));
      }
    }
  });
});

const Test refuses("gather: a root outside of the group, or too few outputs, is refused", Runs::on_ranks, [] {
  Ranks ranks;
  const auto group = ranks.all();
  const Bytes input(8);
  for (const int root : {-1, group->size()}) {
    expect_throws<std::invalid_argument>([&] { gather(*group, input, {}, root, DataType::uint8); }, "gather: root is");
  }
  expect_throws<std::invalid_argument>([&] { gather(*group, input, {}, group->rank(), DataType::uint8); },
                                       "gather: 0 outputs for");
});

}  // namespace
}  // namespace dtrain
