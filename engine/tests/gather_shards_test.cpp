// SPDX-License-Identifier: Apache-2.0
#include "collectives/gather_shards.hpp"

#include <algorithm>

#include "blocks.hpp"
#include "collectives/all_reduce.hpp"
#include "ranks.hpp"

namespace dtrain {
namespace {

using namespace test;

const Test gathers("gather_shards: every node has all ranks' parts", Runs::on_ranks, [] {
  for_each_layout([](const Layout& layout) {
    Group& group = layout.group;
    const auto memory = layout.engine.allocate_shared(group, 100000);
    const auto buffer = memory->bytes();
    for (const unsigned round : {1U, 2U}) {
      for (const Block& block : blocks_of(4)) {
        std::ranges::fill(shard(buffer, block, group.rank(), group.size()),
                          static_cast<std::byte>(10 * round + static_cast<unsigned>(group.rank())));
      }
      finish(layout.engine, gather_shards(group, buffer, blocks_of(4)));
      for (const Block& block : blocks_of(4)) {
        for (int rank = 0; rank < group.size(); ++rank) {
          const auto wanted = static_cast<std::byte>(10 * round + static_cast<unsigned>(rank));
          const auto got = shard(buffer, block, rank, group.size());
          expect(std::ranges::count(got, wanted) == static_cast<std::ptrdiff_t>(got.size()),
                 layout.name + ": part of rank " + std::to_string(rank));
        }
      }
      expect(std::ranges::count(buffer.first(64), std::byte{0}) == 64, "what lies before is left alone");
      Bytes last(8);  // no rank writes again before all ranks have looked
      finish(layout.engine, all_reduce(group, last, {}));
    }
  });
});

}  // namespace
}  // namespace dtrain
