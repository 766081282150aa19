// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "ranks.hpp"

namespace dtrain {
namespace {

using namespace test;

const Test reduce_scatter("reduce_scatter: any count, also into the input", Runs::on_ranks, [] {
  for_each_layout([](const Layout& layout) {
    const auto size = static_cast<std::size_t>(layout.group.size());
    const auto own = static_cast<std::size_t>(layout.group.rank());
    for (const std::size_t count : {std::size_t{0}, std::size_t{1}, std::size_t{10007}, std::size_t{400000}}) {
      for (const DataType dtype : {DataType::float32, DataType::bfloat16, DataType::int64}) {
        if (count == 400000 && dtype != DataType::float32) continue;
        const ReduceOp op = dtype == DataType::int64 ? ReduceOp::sum : ReduceOp::average;
        const std::size_t num_bytes = count * element_bytes(dtype);
        std::vector<Bytes> inputs;
        std::vector<Bytes> own_blocks;
        for (int rank = 0; rank < layout.group.size(); ++rank) {
          inputs.push_back(contribution(rank, dtype, count * size));
          const auto block = std::span(inputs.back()).subspan(own * num_bytes, num_bytes);
          own_blocks.emplace_back(block.begin(), block.end());
        }
        const Bytes wanted = reduce_in_order(own_blocks, with_scale(dtype, op, layout.group.size()));
        Bytes output(num_bytes);
        Bytes input = inputs[own];
        const auto first = layout.engine.reduce_scatter(layout.group, inputs[own], output, {.dtype = dtype, .op = op});
        const auto place = std::span(input).subspan(own * num_bytes, num_bytes);
        const auto second = layout.engine.reduce_scatter(layout.group, input, place, {.dtype = dtype, .op = op});
        finish(layout.engine, first);
        finish(layout.engine, second);
        const std::string what = layout.name + ": " + std::to_string(count) + " " + name(dtype);
        expect(output == wanted, what);
        expect(std::ranges::equal(place, wanted), what + ", in place");
      }
    }
    Bytes output(4);
    expect_throws<std::invalid_argument>([&] { layout.engine.reduce_scatter(layout.group, {}, output, {}); }, "0 bytes");
  });
});

}  // namespace
}  // namespace dtrain
