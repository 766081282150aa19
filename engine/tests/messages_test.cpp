// SPDX-License-Identifier: Apache-2.0
#include "collectives/messages.hpp"

#include "at.hpp"
#include "collectives/all_reduce.hpp"
#include "collectives/barrier.hpp"
#include "collectives/errors.hpp"
#include "ranks.hpp"

namespace dtrain {
namespace {

using namespace test;

const Test messages("messages: tags out of order, beside collectives, from any rank", Runs::on_ranks, [] {
  for_each_layout([](const Layout& layout) {
    Engine& engine = layout.engine;
    Group& group = layout.group;
    const int size = group.size();
    const int next = (group.rank() + 1) % size;
    const int previous = (group.rank() + size - 1) % size;
    const auto content = [](int rank, int tag) {
      return contribution(rank, DataType::uint8, tag == 2 ? 3000001 : static_cast<std::size_t>(tag) * 10);
    };
    std::vector<Bytes> received;
    std::vector<Bytes> sent;
    for (const int tag : {0, 1, 2}) {
      received.emplace_back(content(previous, tag).size());
      sent.push_back(content(group.rank(), tag));
    }
    std::vector<std::shared_ptr<Operation>> operations;
    for (const int tag : {2, 0, 1}) {
      operations.push_back(engine.submit(receive(group, at(received, tag), previous, tag, DataType::uint8)));
    }
    std::vector<std::int64_t> ones(5, 1);
    finish(engine, all_reduce(group, std::as_writable_bytes(std::span(ones)), {.dtype = DataType::int64}));
    expect_equal(ones[0], std::int64_t{size}, layout.name);
    for (const int tag : {0, 1, 2}) {
      operations.push_back(engine.submit(send(group, at(sent, tag), next, tag, DataType::uint8)));
    }
    for (const auto& operation : operations) finish(engine, operation);
    for (const int tag : {0, 1, 2}) {
      expect(at(received, tag) == content(previous, tag), layout.name + ": tag " + std::to_string(tag));
    }

    if (group.rank() > 0) {
      finish(engine, send(group, sent[1], 0, 7, DataType::uint8));
      return;
    }
    int sum = 0;
    for (int peer = 1; peer < size; ++peer) {
      const auto operation = engine.submit(receive(group, received[1], mpi::any_source, 7, DataType::uint8));
      finish(engine, operation);
      expect(received[1] == content(operation->source(), 1), layout.name + ": any source");
      sum += operation->source();
    }
    expect_equal(sum, size * (size - 1) / 2, layout.name + ": each once");
  });
});

const Test of_one_tag("messages: long messages of one tag keep their order, all under way at once", Runs::on_ranks, [] {
  for_each_layout([](const Layout& layout) {
    Engine& engine = layout.engine;
    Group& group = layout.group;
    const int next = (group.rank() + 1) % group.size();
    const int previous = (group.rank() + group.size() - 1) % group.size();
    const auto content = [](int rank, int number) { return contribution(4 * rank + number, DataType::uint8, 1500001); };
    for (const bool receives_first : {true, false}) {
      std::vector<Bytes> received(4, Bytes(content(0, 0).size()));
      std::vector<Bytes> sent;
      for (const int number : {0, 1, 2, 3}) sent.push_back(content(group.rank(), number));
      std::vector<std::shared_ptr<Operation>> operations;
      const auto receive_all = [&] {
        for (Bytes& bytes : received) {
          operations.push_back(engine.submit(receive(group, bytes, previous, 5, DataType::uint8)));
        }
      };
      if (receives_first) receive_all();
      finish(engine, barrier(group));
      for (Bytes& bytes : sent) operations.push_back(engine.submit(send(group, bytes, next, 5, DataType::uint8)));
      if (!receives_first) receive_all();
      for (const auto& operation : operations) finish(engine, operation);
      for (const int number : {0, 1, 2, 3}) {
        expect(at(received, number) == content(previous, number), layout.name + ": number " + std::to_string(number));
      }
    }
  });
});

const Test given_up("messages: MPI may still hold a message that was given up, also on one machine", Runs::on_ranks,
                    [] {
                      Ranks ranks;
                      const auto group = ranks.all();
                      Bytes bytes(8);
                      const auto operation = ranks.engine.submit(
                          receive(*group, bytes, 0, 9, DataType::uint8));  // nobody sends this message
                      expect(!group->has_abandoned(), "before");
                      ranks.engine.close_group(*group);
                      expect_throws<std::runtime_error>([&] { finish(ranks.engine, operation); },
                                                        "has closed the group");
                      expect(group->has_abandoned(), "after");
                    });

const Test lengths("messages: a length that differs is an error, and the group continues", Runs::on_ranks, [] {
  for (const int max_ranks_per_node : {0, 1}) {
    Ranks ranks(max_ranks_per_node);
    const auto group = ranks.all();
    if (group->size() == 1) return;
    Bytes bytes(100);
    if (group->rank() == 0) {
      finish(ranks.engine, send(*group, std::span(bytes).first(8), 1, 0, DataType::uint8));
    } else if (group->rank() == 1) {
      const auto operation = ranks.engine.submit(receive(*group, bytes, 0, 0, DataType::uint8));
      expect_throws<Mismatch>([&] { finish(ranks.engine, operation); },
                              "rank 1 receives 100 bytes with tag 0, but rank 0 sent 8");
    }
    for (const auto& [sent, expected] : {std::pair{32, 200000}, {50, 32}}) {
      Bytes message(static_cast<std::size_t>(group->rank() == 0 ? sent : expected));
      if (group->rank() == 0) {
        ranks.engine.submit(send(*group, message, 1, 1, DataType::uint8));
        finish(ranks.engine, barrier(*group));
      } else {
        if (group->rank() == 1) {
          const auto operation = ranks.engine.submit(receive(*group, message, 0, 1, DataType::uint8));
          const std::string what = sent > expected ? "" : "rank 0 sent " + std::to_string(sent);  // MPI's words
          expect_throws<Mismatch>([&] { finish(ranks.engine, operation); },
                                  "receives " + std::to_string(expected) + " bytes with tag 1, but " + what);
        }
        finish(ranks.engine, barrier(*group));
      }
    }
    expect_throws<std::invalid_argument>(
        [&] { ranks.engine.submit(send(*group, bytes, group->size(), 0, DataType::uint8)); }, "destination is");
    expect_throws<std::invalid_argument>([&] { ranks.engine.submit(receive(*group, bytes, 0, -1, DataType::uint8)); },
                                         "the tag is -1");
  }
});

}  // namespace
}  // namespace dtrain
