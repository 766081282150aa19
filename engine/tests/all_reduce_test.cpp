// SPDX-License-Identifier: Apache-2.0
#include "collectives/all_reduce.hpp"

#include <algorithm>
#include <array>
#include <utility>
#include <vector>

#include "at.hpp"
#include "collectives/messages.hpp"
#include "collectives/node_exchange.hpp"
#include "ranks.hpp"

namespace dtrain {
namespace {

using namespace test;

constexpr auto all_types = {DataType::float32, DataType::float64, DataType::bfloat16, DataType::float16,
                            DataType::int8,    DataType::int16,   DataType::int32,    DataType::int64,
                            DataType::uint8,   DataType::boolean};

std::vector<Bytes> contributions(const Group& group, DataType dtype, std::size_t count) {
  std::vector<Bytes> all;
  for (int rank = 0; rank < group.size(); ++rank) all.push_back(contribution(rank, dtype, count));
  return all;
}

std::string what(const Layout& layout, const Reduction& reduction, std::size_t count) {
  return layout.name + ": " + std::to_string(count) + " " + name(reduction.dtype) + " " + name(reduction.op);
}

const Test types("all_reduce: every type, any count, several in flight", Runs::on_ranks, [] {
  for_each_layout([](const Layout& layout) {
    const auto own = static_cast<std::size_t>(layout.group.rank());
    const auto size = static_cast<std::size_t>(layout.group.size());
    struct InFlight {
      Reduction reduction;
      std::size_t count;
      Bytes buffer;
      std::shared_ptr<Operation> operation;
    };
    std::vector<InFlight> all;
    for (const DataType dtype : all_types) {
      const bool is_float = dtype <= DataType::float16;
      for (const std::size_t count : {std::size_t{0}, std::size_t{1}, size - 1, size, size + 1, std::size_t{10007}}) {
        for (const ReduceOp op : {ReduceOp::sum, ReduceOp::average, ReduceOp::product, ReduceOp::max}) {
          if (op == ReduceOp::average && !is_float) continue;
          if (op != ReduceOp::sum && count != 10007) continue;
          all.push_back({{.dtype = dtype, .op = op}, count, contribution(static_cast<int>(own), dtype, count), {}});
        }
      }
    }
    for (InFlight& one : all) one.operation = layout.engine.submit(all_reduce(layout.group, one.buffer, one.reduction));
    for (const InFlight& one : all) {
      finish(layout.engine, one.operation);
      const Reduction scaled = with_scale(one.reduction.dtype, one.reduction.op, layout.group.size());
      const Bytes wanted = reduce_by_nodes(layout, contributions(layout.group, scaled.dtype, one.count), scaled);
      expect(one.buffer == wanted, what(layout, one.reduction, one.count));
    }
  });
});

const Test large("all_reduce: longer than the scratch memory", Runs::on_ranks, [] {
  for_each_layout([](const Layout& layout) {
    const std::size_t count = 2 * LocalGroup::scratch_bytes / 4 + 333;
    const auto all = contributions(layout.group, DataType::float32, count);
    for (const ReduceOp op : {ReduceOp::sum, ReduceOp::average}) {
      Bytes buffer = at(all, layout.group.rank());
      finish(layout.engine, all_reduce(layout.group, buffer, {.op = op}));
      const Reduction scaled = with_scale(DataType::float32, op, layout.group.size());
      expect(buffer == reduce_by_nodes(layout, all, scaled), what(layout, scaled, count));
    }
  });
});

const Test in_place("all_reduce: in memory allocated together, at any place in it", Runs::on_ranks, [] {
  for_each_layout([](const Layout& layout) {
    Group& group = layout.group;
    const auto memory = layout.engine.allocate(group, 3 << 20);
    const auto block = at(*memory, group.local().rank()).bytes();
    expect(block.size() == 3 << 20 && std::ranges::count(block, std::byte{0}) == 3 << 20, "zeroed");
    const auto other_memory = layout.engine.allocate(group, 1);
    const Reduction reduction{.dtype = DataType::bfloat16};
    for (const std::size_t count : {std::size_t{1}, std::size_t{1000}, std::size_t{1} << 20}) {
      // On the last rank the buffer is elsewhere, in the same memory or outside: the result must not change.
      for (const bool last_is_outside : {false, true}) {
        const bool is_last = group.rank() == group.size() - 1;
        const auto all = contributions(group, DataType::bfloat16, count);
        Bytes outside(2 * count);
        auto buffer = block.subspan(is_last ? 128 : 2, 2 * count);
        if (last_is_outside && is_last) buffer = outside;
        std::ranges::copy(at(all, group.rank()), buffer.begin());
        finish(layout.engine, all_reduce(group, buffer, reduction));
        const Bytes wanted = reduce_by_nodes(layout, all, reduction);
        expect(std::ranges::equal(buffer, wanted), what(layout, reduction, count) + (last_is_outside ? ", mixed" : ""));
        expect(block[0] == std::byte{0}, "what lies before is left alone");
      }
    }
    layout.engine.release(group, block);
    Bytes again = contribution(group.rank(), DataType::float32, 100);
    finish(layout.engine, all_reduce(group, again, {}));
    const Bytes wanted = reduce_by_nodes(layout, contributions(group, DataType::float32, 100), {});
    expect(again == wanted, "after release");
  });
});

// Lengths of one message, of one segment, of all segments under way at a time, and more, each give or take an element.
const Test segments("all_reduce: lengths around those of messages and segments", Runs::on_ranks, [] {
  for_each_layout([](const Layout& layout) {
    Group& group = layout.group;
    if (group.num_nodes() == 1) return;
    const std::size_t message = message_bytes / 4;
    const std::size_t in_place_segment = message * num_slices(group);
    const std::size_t scratch_segment = 2 * LocalGroup::scratch_bytes / 4 / 4;
    const auto memory = layout.engine.allocate(group, 8 << 20);
    const auto block = at(*memory, group.local().rank()).bytes();
    for (const std::size_t length :
         {message, in_place_segment, 17 * in_place_segment, scratch_segment, 4 * scratch_segment}) {
      for (const std::size_t count : {length - 1, length, length + 1}) {
        const auto all = contributions(group, DataType::float32, count);
        const Bytes wanted = reduce_by_nodes(layout, all, {});
        Bytes ordinary = at(all, group.rank());
        const auto registered = block.first(4 * count);
        std::ranges::copy(ordinary, registered.begin());
        const auto first = layout.engine.submit(all_reduce(group, ordinary, {}));
        const auto second = layout.engine.submit(all_reduce(group, registered, {}));
        finish(layout.engine, first);
        finish(layout.engine, second);
        expect(ordinary == wanted, what(layout, {}, count) + ", ordinary memory");
        expect(std::ranges::equal(registered, wanted), what(layout, {}, count) + ", in place");
      }
    }
  });
});

const Test wire("all_reduce: sums that cross between nodes in 16 bits", Runs::on_ranks, [] {
  for_each_layout([](const Layout& layout) {
    Group& group = layout.group;
    const auto memory = layout.engine.allocate(group, 4 << 20);
    const auto block = at(*memory, group.local().rank()).bytes();
    for (const DataType wire_dtype : {DataType::bfloat16, DataType::float16}) {
      for (const ReduceOp op : {ReduceOp::sum, ReduceOp::average, ReduceOp::max}) {
        for (const std::size_t count : {std::size_t{1}, std::size_t{10007}, std::size_t{300001}}) {
          if (count > 10007 && op != ReduceOp::sum) continue;
          Reduction reduction = with_scale(DataType::float32, op, group.size());
          if (op != ReduceOp::max) reduction.wire_dtype = wire_dtype;  // only sums are rounded
          const auto all = contributions(group, DataType::float32, count);
          const Bytes wanted = reduce_by_nodes(layout, all, reduction);
          Bytes ordinary = at(all, group.rank());
          const auto registered = block.first(4 * count);
          std::ranges::copy(ordinary, registered.begin());
          const Reduction asked{.op = op, .wire_dtype = wire_dtype};
          const auto first = layout.engine.submit(all_reduce(group, ordinary, asked));
          const auto second = layout.engine.submit(all_reduce(group, registered, asked));
          finish(layout.engine, first);
          finish(layout.engine, second);
          const std::string text = what(layout, reduction, count) + " as " + name(wire_dtype);
          expect(ordinary == wanted, text);
          expect(std::ranges::equal(registered, wanted), text + ", in place");
        }
      }
    }
  });
});

// Returns the bytes that all ranks of `layout` together have sent and received so far.
std::pair<std::uint64_t, std::uint64_t> bytes_of_all(const Layout& layout) {
  const Counters& counters = layout.engine.counters();
  std::array<std::uint64_t, 2> sums{counters.bytes_sent, counters.bytes_received};
  const Reduction reduction{.dtype = DataType::int64};
  finish(layout.engine, all_reduce(layout.group, std::as_writable_bytes(std::span(sums)), reduction));
  return {sums[0], sums[1]};
}

// With one hop, every node sends each byte of the buffer to each other node; with two hops, its part of the buffer, and
// then that part's result.
const Test counted("all_reduce: bytes between nodes, as counted", Runs::on_ranks, [] {
  for_each_layout([](const Layout& layout) {
    const auto nodes = static_cast<std::uint64_t>(layout.group.num_nodes());
    for (const std::size_t count : {std::size_t{1000}, std::size_t{1} << 20}) {
      for (const bool is_narrow : {false, true}) {
        Bytes buffer = contribution(layout.group.rank(), DataType::float32, count);
        const auto before = bytes_of_all(layout);
        const auto cost_of_asking = bytes_of_all(layout);
        Reduction reduction{};
        if (is_narrow) reduction.wire_dtype = DataType::bfloat16;
        const std::uint64_t collectives = layout.engine.counters().collectives;
        finish(layout.engine, all_reduce(layout.group, buffer, reduction));
        expect_equal(layout.engine.counters().collectives.load() - collectives, std::uint64_t{1}, "collectives");
        const auto after = bytes_of_all(layout);
        const std::uint64_t bytes = (is_narrow ? 2 : 4) * count;
        const bool one_hop = nodes < 3 || bytes <= 16384;
        const std::uint64_t wanted = one_hop ? nodes * (nodes - 1) * bytes : 2 * (nodes - 1) * bytes;
        const std::uint64_t asking = cost_of_asking.first - before.first;
        expect_equal(after.first - cost_of_asking.first - asking, wanted, layout.name + ": bytes sent");
        expect_equal(after.second - cost_of_asking.second - asking, wanted, layout.name + ": bytes received");
      }
    }
  });
});

}  // namespace
}  // namespace dtrain
