// SPDX-License-Identifier: Apache-2.0
#include "collectives/all_to_all.hpp"

#include "at.hpp"
#include "collectives/errors.hpp"
#include "ranks.hpp"

namespace dtrain {
namespace {

using namespace test;

using Sends = std::vector<std::span<const std::byte>>;
using Receives = std::vector<std::span<std::byte>>;

// Returns the message of `from` for `to`. Lengths vary from none to more than the scratch memory holds.
Bytes message(int from, int to) {
  return contribution(from * 10 + to, DataType::uint8, static_cast<std::size_t>((from * 3 + to) % 5) * 300007);
}

const Test any_length("all_to_all: messages of all lengths", Runs::on_ranks, [] {
  for_each_layout([](const Layout& layout) {
    std::vector<Bytes> inputs;
    std::vector<Bytes> outputs;
    for (int rank = 0; rank < layout.group.size(); ++rank) {
      inputs.push_back(message(layout.group.rank(), rank));
      outputs.emplace_back(message(rank, layout.group.rank()).size(), std::byte{0xa5});
    }
    for (int round = 0; round < 2; ++round) {
      finish(layout.engine, all_to_all(layout.group, Sends(inputs.begin(), inputs.end()),
                                       Receives(outputs.begin(), outputs.end()), DataType::uint8));
      for (int rank = 0; rank < layout.group.size(); ++rank) {
        Bytes& output = at(outputs, rank);
        expect(output == message(rank, layout.group.rank()), layout.name + ": of rank " + std::to_string(rank));
        output.assign(output.size(), std::byte{0});
      }
    }
  });
});

const Test lengths("all_to_all: lengths that differ are the same error on every rank", Runs::on_ranks, [] {
  for (const int max_ranks_per_node : {0, 1}) {
    Ranks ranks(max_ranks_per_node);
    const auto group = ranks.all();
    const int last = group->size() - 1;
    if (last == 0) return;
    Bytes buffer(100);
    const auto size = static_cast<std::size_t>(group->size());
    Sends sends(size, std::span(buffer).first(8));
    Receives receives(size, std::span(buffer).subspan(8, 8));
    if (group->rank() == last) receives[0] = std::span(buffer).subspan(8, 12);
    const auto operation = ranks.engine.submit(all_to_all(*group, sends, receives, DataType::int32));
    expect_throws<Mismatch>([&] { finish(ranks.engine, operation); },
                            "rank 0 has 2 elements for rank " + std::to_string(last) + ", which has room for 3");
  }
});

}  // namespace
}  // namespace dtrain
