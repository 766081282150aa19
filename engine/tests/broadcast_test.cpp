// SPDX-License-Identifier: Apache-2.0
#include "collectives/broadcast.hpp"

#include "ranks.hpp"

namespace dtrain {
namespace {

using namespace test;

const Test any_count("broadcast: from every root, any count", Runs::on_ranks, [] {
  for_each_layout([](const Layout& layout) {
    for (int root = 0; root < layout.group.size(); ++root) {
      for (const std::size_t num_bytes : {std::size_t{0}, std::size_t{1}, std::size_t{10007}, std::size_t{2500000}}) {
        const Bytes wanted = contribution(root, DataType::uint8, num_bytes);
        Bytes buffer = layout.group.rank() == root ? wanted : Bytes(num_bytes, std::byte{0xa5});
        finish(layout.engine, broadcast(layout.group, buffer, root, DataType::uint8));
        expect(buffer == wanted, layout.name + ": " + std::to_string(num_bytes) + " bytes of " + std::to_string(root));
      }
    }
    for (const int root : {-1, layout.group.size()}) {
      expect_throws<std::invalid_argument>([&] { broadcast(layout.group, {}, root, DataType::uint8); }, "root is");
    }
  });
});

}  // namespace
}  // namespace dtrain
