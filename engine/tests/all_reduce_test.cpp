// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <vector>

#include "ranks.hpp"

namespace dtrain {
namespace {

using namespace test;

constexpr auto all_types = {DataType::float32, DataType::float64, DataType::bfloat16, DataType::float16,
                            DataType::int32,   DataType::int64,   DataType::uint8,    DataType::boolean};

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
    for (InFlight& one : all) one.operation = layout.engine.all_reduce(layout.group, one.buffer, one.reduction);
    for (const InFlight& one : all) {
      finish(layout.engine, one.operation);
      const Reduction scaled = with_scale(one.reduction.dtype, one.reduction.op, layout.group.size());
      const Bytes wanted = reduce_by_nodes(layout.group, contributions(layout.group, scaled.dtype, one.count), scaled);
      expect(one.buffer == wanted, what(layout, one.reduction, one.count));
    }
  });
});

const Test large("all_reduce: longer than the scratch memory", Runs::on_ranks, [] {
  for_each_layout([](const Layout& layout) {
    const std::size_t count = 2 * LocalGroup::scratch_bytes / 4 + 333;
    const auto all = contributions(layout.group, DataType::float32, count);
    for (const ReduceOp op : {ReduceOp::sum, ReduceOp::average}) {
      Bytes buffer = all[static_cast<std::size_t>(layout.group.rank())];
      finish(layout.engine, layout.engine.all_reduce(layout.group, buffer, {.op = op}));
      const Reduction scaled = with_scale(DataType::float32, op, layout.group.size());
      expect(buffer == reduce_by_nodes(layout.group, all, scaled), what(layout, scaled, count));
    }
  });
});

const Test in_place("all_reduce: in memory allocated together, at any place in it", Runs::on_ranks, [] {
  for_each_layout([](const Layout& layout) {
    Group& group = layout.group;
    const auto memory = layout.engine.allocate(group, 3 << 20);
    const auto block = (*memory)[static_cast<std::size_t>(group.local().rank())].bytes();
    expect(block.size() == 3 << 20 && std::ranges::count(block, std::byte{0}) == 3 << 20, "zeroed");
    const auto other_memory = layout.engine.allocate(group, 1);
    const Reduction reduction{.dtype = DataType::bfloat16};
    for (const std::size_t count : {std::size_t{1}, std::size_t{1000}, std::size_t{1} << 20}) {
      // On the last rank elsewhere, in the same memory or outside: the others may not notice.
      for (const bool last_is_outside : {false, true}) {
        const bool is_last = group.rank() == group.size() - 1;
        const auto all = contributions(group, DataType::bfloat16, count);
        Bytes outside(2 * count);
        auto buffer = block.subspan(is_last ? 128 : 2, 2 * count);
        if (last_is_outside && is_last) buffer = outside;
        std::ranges::copy(all[static_cast<std::size_t>(group.rank())], buffer.begin());
        finish(layout.engine, layout.engine.all_reduce(group, buffer, reduction));
        const Bytes wanted = reduce_by_nodes(group, all, reduction);
        expect(std::ranges::equal(buffer, wanted), what(layout, reduction, count) + (last_is_outside ? ", mixed" : ""));
        expect(block[0] == std::byte{0}, "what lies before is left alone");
      }
    }
    layout.engine.release(group, block);
    Bytes again = contribution(group.rank(), DataType::float32, 100);
    finish(layout.engine, layout.engine.all_reduce(group, again, {}));
    const Bytes wanted = reduce_by_nodes(group, contributions(group, DataType::float32, 100), {});
    expect(again == wanted, "after release");
  });
});

}  // namespace
}  // namespace dtrain
