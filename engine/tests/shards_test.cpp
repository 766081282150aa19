// SPDX-License-Identifier: Apache-2.0
#include "collectives/shards.hpp"

#include <algorithm>
#include <initializer_list>
#include <vector>

#include "collectives/parts.hpp"
#include "ranks.hpp"

namespace dtrain {
namespace {

using namespace test;

// Of no element, of less and more than a line for each rank, of many; with gaps, and not in order.
std::vector<Block> blocks_of(std::size_t width) {
  std::vector<Block> blocks;
  std::size_t offset = 64;
  for (const std::size_t count : std::initializer_list<std::size_t>{0, 1, 33, 100, 10007}) {
    blocks.push_back({offset, count * width});
    offset += (count * width + 127) / 64 * 64;
  }
  std::ranges::reverse(blocks);
  return blocks;
}

std::span<std::byte> shard(std::span<std::byte> buffer, const Block& block, int rank, int size) {
  return part_of(buffer.subspan(block.offset_bytes, block.num_bytes), static_cast<std::size_t>(rank),
                 static_cast<std::size_t>(size));
}

const Test reduces("reduce_shards: each rank gets its part of every block", Runs::on_ranks, [] {
  for_each_layout([](const Layout& layout) {
    Group& group = layout.group;
    constexpr std::size_t buffer_bytes = 100000;
    const auto memory = layout.engine.allocate(group, 3 * buffer_bytes);
    const auto all = (*memory)[static_cast<std::size_t>(group.local().rank())].bytes();
    for (const DataType dtype : {DataType::float32, DataType::float64, DataType::bfloat16}) {
      const std::size_t width = element_bytes(dtype);
      for (const ReduceOp op : {ReduceOp::sum, ReduceOp::average}) {
        std::vector<Bytes> contributions;
        for (int rank = 0; rank < group.size(); ++rank) {
          contributions.push_back(contribution(rank, dtype, buffer_bytes / width));
        }
        const Bytes& own = contributions[static_cast<std::size_t>(group.rank())];
        Bytes wanted = reduce_by_nodes(layout, contributions, with_scale(dtype, op, group.size()));
        // Two in flight, at places that differ between ranks.
        std::vector<std::span<std::byte>> buffers;
        std::vector<std::shared_ptr<Operation>> operations;
        for (const std::size_t place : {std::size_t{0}, std::size_t{1}}) {
          buffers.push_back(all.subspan(place * buffer_bytes + (group.rank() == 0 ? buffer_bytes : 0), buffer_bytes));
          std::ranges::copy(own, buffers.back().begin());
        }
        for (const auto buffer : buffers) {
          const Reduction reduction{.dtype = dtype, .op = op};
          operations.push_back(layout.engine.reduce_shards(group, buffer, blocks_of(width), reduction));
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
        Bytes last(8);  // until it is done, peers read the buffers
        finish(layout.engine, layout.engine.all_reduce(group, last, {}));
      }
    }
  });
});

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
      finish(layout.engine, layout.engine.gather_shards(group, buffer, blocks_of(4)));
      for (const Block& block : blocks_of(4)) {
        for (int rank = 0; rank < group.size(); ++rank) {
          const auto wanted = static_cast<std::byte>(10 * round + static_cast<unsigned>(rank));
          const auto got = shard(buffer, block, rank, group.size());
          expect(std::ranges::count(got, wanted) == static_cast<std::ptrdiff_t>(got.size()),
                 layout.name + ": part of rank " + std::to_string(rank));
        }
      }
      expect(std::ranges::count(buffer.first(64), std::byte{0}) == 64, "what lies before is left alone");
      Bytes last(8);  // no rank writes again before all have looked
      finish(layout.engine, layout.engine.all_reduce(group, last, {}));
    }
  });
});

const Test refuses("reduce_shards: what it does not take", Runs::on_ranks, [] {
  for_each_layout([](const Layout& layout) {
    const auto memory = layout.engine.allocate(layout.group, 4096);
    const auto buffer = (*memory)[static_cast<std::size_t>(layout.group.local().rank())].bytes();
    const auto call = [&](Block block) { layout.engine.reduce_shards(layout.group, buffer, {block}, {}); };
    expect_throws<std::invalid_argument>([&] { call({4096, 64}); }, "4096");
    expect_throws<std::invalid_argument>([&] { call({64, 4096}); }, "4096");
    expect_throws<std::invalid_argument>([&] { call({0, 6}); }, "element");
    if (layout.group.size() == 1) return;
    Bytes outside(4096);
    const auto operation = layout.engine.reduce_shards(layout.group, outside, {{0, 4096}}, {});
    expect_throws<std::invalid_argument>([&] { finish(layout.engine, operation); }, "allocated together");
  });
});

}  // namespace
}  // namespace dtrain
