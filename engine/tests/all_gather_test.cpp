// SPDX-License-Identifier: Apache-2.0
#include "collectives/all_gather.hpp"

#include <algorithm>

#include "at.hpp"
#include "collectives/parts.hpp"
#include "ranks.hpp"

namespace dtrain {
namespace {

using namespace test;

const Test any_count("all_gather: any count, also with the input in its place in the output", Runs::on_ranks, [] {
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
      const auto place = std::span(in_place).subspan(static_cast<std::size_t>(layout.group.rank()) * num_bytes,
                                                     num_bytes);
      std::ranges::copy(input, place.begin());
      const auto first = layout.engine.submit(
          all_gather(layout.group, input, even_parts<std::byte>(output, size), DataType::uint8));
      const auto second = layout.engine.submit(
          all_gather(layout.group, place, even_parts<std::byte>(in_place, size), DataType::uint8));
      finish(layout.engine, first);
      finish(layout.engine, second);
      expect(output == wanted, layout.name + ": " + std::to_string(num_bytes) + " bytes");
      expect(in_place == wanted, layout.name + ": " + std::to_string(num_bytes) + " bytes, in place");
    }
    const Bytes input(2);
    Bytes output(size * 3);
    const auto gather = [&](const auto& outputs) {
      layout.engine.submit(all_gather(layout.group, input, outputs, DataType::uint8));
    };
    expect_throws<std::invalid_argument>([&] { gather(std::vector<std::span<std::byte>>()); }, "0 outputs for");
    expect_throws<std::invalid_argument>([&] { gather(even_parts<std::byte>(output, size)); }, "should have 2");
  });
});

const Test uneven("all_gather: parts of different lengths, some empty", Runs::on_ranks, [] {
  for_each_layout([](const Layout& layout) {
    const auto length = [](int rank) { return static_cast<std::size_t>(rank) * 700001; };
    std::vector<Bytes> outputs;
    for (int rank = 0; rank < layout.group.size(); ++rank) outputs.emplace_back(length(rank), std::byte{0xa5});
    const Bytes input = contribution(layout.group.rank(), DataType::uint8, length(layout.group.rank()));
    finish(layout.engine, all_gather(layout.group, input, {outputs.begin(), outputs.end()}, DataType::uint8));
    for (int rank = 0; rank < layout.group.size(); ++rank) {
      expect(at(outputs, rank) == contribution(rank, DataType::uint8, length(rank)), layout.name);
    }
  });
});

}  // namespace
}  // namespace dtrain
