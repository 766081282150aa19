// SPDX-License-Identifier: Apache-2.0
#include "collectives/reduce_scatter.hpp"

#include <algorithm>

#include "collectives/parts.hpp"
#include "ranks.hpp"

namespace dtrain {
namespace {

using namespace test;

const Test any_count("reduce_scatter: any count, also into the input", Runs::on_ranks, [] {
  for_each_layout([](const Layout& layout) {
    const auto size = static_cast<std::size_t>(layout.group.size());
    const auto own = static_cast<std::size_t>(layout.group.rank());
    const auto parts = [size](const Bytes& input) { return even_parts<const std::byte>(input, size); };
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
        const Reduction reduction{.dtype = dtype, .op = op};
        const auto first = layout.engine.submit(reduce_scatter(layout.group, parts(inputs[own]), output, reduction));
        const auto place = std::span(input).subspan(own * num_bytes, num_bytes);
        const auto second = layout.engine.submit(reduce_scatter(layout.group, parts(input), place, reduction));
        finish(layout.engine, first);
        finish(layout.engine, second);
        const std::string what = layout.name + ": " + std::to_string(count) + " " + name(dtype);
        expect(output == wanted, what);
        expect(std::ranges::equal(place, wanted), what + ", in place");
      }
    }
    Bytes output(4);
    expect_throws<std::invalid_argument>([&] { reduce_scatter(layout.group, {}, output, {}); }, "0 inputs for");
  });
});

const Test uneven("reduce_scatter: parts of different lengths, some empty", Runs::on_ranks, [] {
  for_each_layout([](const Layout& layout) {
    const auto own = static_cast<std::size_t>(layout.group.rank());
    const auto count = [](std::size_t rank) { return rank * 100003; };
    std::vector<std::vector<Bytes>> inputs;  // indexed by source rank, then by target rank
    for (int rank = 0; rank < layout.group.size(); ++rank) {
      inputs.emplace_back();
      for (std::size_t part = 0; part < static_cast<std::size_t>(layout.group.size()); ++part) {
        inputs.back().push_back(contribution(rank * 10 + static_cast<int>(part), DataType::float32, count(part)));
      }
    }
    std::vector<Bytes> own_parts;
    for (const auto& of_rank : inputs) own_parts.push_back(of_rank[own]);
    Bytes output(count(own) * 4);
    const std::vector<std::span<const std::byte>> spans(inputs[own].begin(), inputs[own].end());
    finish(layout.engine, reduce_scatter(layout.group, spans, output, {}));
    expect(output == reduce_in_order(own_parts, {}), layout.name);
  });
});

}  // namespace
}  // namespace dtrain
