// SPDX-License-Identifier: Apache-2.0
#include "collectives/reduce_shards.hpp"

#include <algorithm>
#include <vector>

#include "at.hpp"
#include "blocks.hpp"
#include "collectives/all_reduce.hpp"
#include "ranks.hpp"

namespace dtrain {
namespace {

using namespace test;

const Test reduces("reduce_shards: each rank gets its part of every block", Runs::on_ranks, [] {
  for_each_layout([](const Layout& layout) {
    Group& group = layout.group;
    constexpr std::size_t buffer_bytes = 100000;
    const auto memory = layout.engine.allocate(group, 3 * buffer_bytes);
    const auto all = at(*memory, group.local().rank()).bytes();
    for (const DataType dtype : {DataType::float32, DataType::float64, DataType::bfloat16}) {
      const std::size_t width = element_bytes(dtype);
      for (const ReduceOp op : {ReduceOp::sum, ReduceOp::average}) {
        std::vector<Bytes> contributions;
        for (int rank = 0; rank < group.size(); ++rank) {
          contributions.push_back(contribution(rank, dtype, buffer_bytes / width));
        }
        const Bytes& own = at(contributions, group.rank());
        Bytes wanted = reduce_by_nodes(layout, contributions, with_scale(dtype, op, group.size()));
        // Two calls are in flight, at places that differ between ranks.
        std::vector<std::span<std::byte>> buffers;
        std::vector<std::shared_ptr<Operation>> operations;
        for (const std::size_t place : {std::size_t{0}, std::size_t{1}}) {
          buffers.push_back(all.subspan(place * buffer_bytes + (group.rank() == 0 ? buffer_bytes : 0), buffer_bytes));
          std::ranges::copy(own, buffers.back().begin());
        }
        for (const auto buffer : buffers) {
          const Reduction reduction{.dtype = dtype, .op = op};
          operations.push_back(layout.engine.submit(reduce_shards(group, buffer, blocks_of(width), reduction)));
        }
        for (std::size_t i = 0; i < buffers.size(); ++i) {
          finish(layout.engine, operations[i]);
          for (const Block& block : blocks_of(width)) {
            const auto got = shard(buffers[i], block, group.rank(), group.size());
            expect(std::ranges::equal(got, shard(wanted, block, group.rank(), group.size())),
                   layout.name + ": " + name(dtype) + " " + name(op) + ", block of " + std::to_string(block.num_bytes));
          }
          expect(std::equal(own.begin(), own.begin() + 64, buffers[i].begin()), "what lies before is left alone");
        }
        Bytes last(8);  // peers read the buffers until this is done
        finish(layout.engine, all_reduce(group, last, {}));
      }
    }
  });
});

const Test refuses("reduce_shards: arguments that it refuses", Runs::on_ranks, [] {
  for_each_layout([](const Layout& layout) {
    const auto memory = layout.engine.allocate(layout.group, 4096);
    const auto buffer = at(*memory, layout.group.local().rank()).bytes();
    const auto call = [&](Block block) { reduce_shards(layout.group, buffer, {block}, {}); };
    expect_throws<std::invalid_argument>([&] { call({4096, 64}); }, "4096");
    expect_throws<std::invalid_argument>([&] { call({64, 4096}); }, "4096");
    expect_throws<std::invalid_argument>([&] { call({0, 6}); }, "element");
    if (layout.group.size() == 1) return;
    Bytes outside(4096);
    const auto operation = layout.engine.submit(reduce_shards(layout.group, outside, {{0, 4096}}, {}));
    expect_throws<std::invalid_argument>([&] { finish(layout.engine, operation); }, "allocated together");
  });
});

}  // namespace
}  // namespace dtrain
