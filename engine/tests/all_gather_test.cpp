// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "ranks.hpp"

namespace dtrain {
namespace {

using namespace test;

const Test all_gather("all_gather: any count, also from the place in the output", Runs::on_ranks, [] {
  for_each_layout([](const Layout& layout) {
    const auto size = static_cast<std::size_t>(layout.group.size());
    for (const std::size_t num_bytes : {std::size_t{0}, std::size_t{1}, std::size_t{10007}, std::size_t{1500000}}) {
      Bytes wanted;
      for (int rank = 0; rank < layout.group.size(); ++rank) {
        const Bytes of_rank = contribution(rank, DataType::uint8, num_bytes);
        wanted.insert(wanted.end(), of_rank.begin(), of_rank.end());
      }
      const Bytes input = contribution(layout.group.rank(), DataType::uint8, num_bytes);
      Bytes output(size * num_bytes);
      Bytes in_place(size * num_bytes);
      const auto place = std::span(in_place).subspan(static_cast<std::size_t>(layout.group.rank()) * num_bytes, num_bytes);
      std::ranges::copy(input, place.begin());
      const auto first = layout.engine.all_gather(layout.group, input, output);
      const auto second = layout.engine.all_gather(layout.group, place, in_place);
      finish(layout.engine, first);
      finish(layout.engine, second);
      expect(output == wanted, layout.name + ": " + std::to_string(num_bytes) + " bytes");
      expect(in_place == wanted, layout.name + ": " + std::to_string(num_bytes) + " bytes, in place");
    }
    Bytes input(2);
    expect_throws<std::invalid_argument>([&] { layout.engine.all_gather(layout.group, input, {}); }, "0 bytes");
  });
});

}  // namespace
}  // namespace dtrain
