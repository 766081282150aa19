// SPDX-License-Identifier: Apache-2.0
#include "collectives/scatter.hpp"

#include "ranks.hpp"

namespace dtrain {
namespace {

using namespace test;

const Test every_root("scatter: from every root", Runs::on_ranks, [] {
  for_each_layout([](const Layout& layout) {
    const int own = layout.group.rank();
    for (int root = 0; root < layout.group.size(); ++root) {
      const std::size_t num_bytes = root == 0 ? 1500000 : 1000 * static_cast<std::size_t>(root) + 1;
      const auto of = [num_bytes](int rank) { return contribution(rank, DataType::uint8, num_bytes); };
      std::vector<Bytes> inputs;
      for (int rank = 0; own == root && rank < layout.group.size(); ++rank) inputs.push_back(of(rank));
      Bytes output(num_bytes);
      finish(layout.engine, scatter(layout.group, {inputs.begin(), inputs.end()}, output, root, DataType::uint8));
      expect(output == of(own), layout.name + ": scattered from " + std::to_string(root));
    }
  });
});

const Test refuses("scatter: a root outside of the group, or too few inputs, is refused", Runs::on_ranks, [] {
  Ranks ranks;
  const auto group = ranks.all();
  Bytes output(8);
  for (const int root : {-1, group->size()}) {
    expect_throws<std::invalid_argument>([&] { scatter(*group, {}, output, root, DataType::uint8); },
                                         "scatter: root is");
  }
  expect_throws<std::invalid_argument>([&] { scatter(*group, {}, output, group->rank(), DataType::uint8); },
                                       "scatter: 0 inputs for");
});

}  // namespace
}  // namespace dtrain
