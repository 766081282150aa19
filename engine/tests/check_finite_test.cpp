// SPDX-License-Identifier: Apache-2.0
// Tests of the reports of all_reduce and reduce_shards on infinities and NaN in their results, on every rank.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "at.hpp"
#include "collectives/all_reduce.hpp"
#include "collectives/barrier.hpp"
#include "collectives/errors.hpp"
#include "collectives/parts.hpp"
#include "collectives/reduce_shards.hpp"
#include "ranks.hpp"

namespace dtrain {
namespace {

using namespace test;

constexpr float infinity = std::numeric_limits<float>::infinity();

std::span<std::byte> bytes_of(std::span<float> values) { return std::as_writable_bytes(values); }

std::span<std::byte> own_block(const Layout& layout, const std::shared_ptr<const Allocation>& memory) {
  return at(*memory, layout.group.local().rank()).bytes();
}

// Fills a rank's float32 buffer with finite values, except `value` of rank `culprit` at `position`.
void fill(std::span<std::byte> buffer, const Group& group, int culprit, std::size_t position, float value) {
  std::ranges::copy(contribution(group.rank(), DataType::float32, buffer.size() / 4), buffer.begin());
  if (group.rank() == culprit) std::memcpy(buffer.data() + 4 * position, &value, 4);
}

const Test everywhere("check_finite: one rank's value at any place is known to all", Runs::on_ranks, [] {
  for_each_layout([](const Layout& layout) {
    Group& group = layout.group;
    // The counts are one element; less than a line for each rank; two scratch pieces; small enough for one hop, and
    // not.
    for (const std::size_t count : {1U, 7U, 1000U, 300001U}) {
      const auto memory = layout.engine.allocate(group, 4 * count);
      const auto registered = own_block(layout, memory).first(4 * count);
      Bytes ordinary(4 * count);
      const std::size_t num_parts = count < 1000 ? count
                                                 : (count > 1000 ? 1U : 2U) * static_cast<std::size_t>(group.size());
      for (std::size_t part = 0; part <= num_parts; ++part) {
        const std::size_t position = std::min(count - 1, count * part / num_parts);
        const int culprit = static_cast<int>(part) % group.size();
        const float value = part % 3 == 0 ? infinity : part % 3 == 1 ? -infinity : std::nanf("");
        const bool is_clean = part == num_parts;
        for (const auto buffer : {std::span<std::byte>(ordinary), registered}) {
          for (const bool is_narrow : {false, true}) {
            fill(buffer, group, is_clean ? -1 : culprit, position, value);
            Reduction reduction{.op = part % 2 == 0 ? ReduceOp::sum : ReduceOp::average, .check_finite = true};
            if (is_narrow) reduction.wire_dtype = DataType::bfloat16;
            const auto operation = layout.engine.submit(all_reduce(group, buffer, reduction));
            finish(layout.engine, operation);
            expect_equal(operation->found_nonfinite(), !is_clean,
                         layout.name + ": " + std::to_string(count) + ", at " + std::to_string(position) +
                             (buffer.data() == ordinary.data() ? "" : ", in place") + (is_narrow ? ", narrow" : ""));
          }
        }
      }
      layout.engine.release(group, registered);
    }
  });
});

const Test same_bits("check_finite: changes nothing in the result", Runs::on_ranks, [] {
  for_each_layout([](const Layout& layout) {
    for (const DataType dtype : {DataType::float32, DataType::float64, DataType::bfloat16, DataType::float16}) {
      for (const std::size_t count : {1U, 10007U, 600000U}) {
        if (count == 600000 && dtype != DataType::float32) continue;
        const auto memory = layout.engine.allocate(layout.group, count * element_bytes(dtype));
        const auto registered = own_block(layout, memory).first(count * element_bytes(dtype));
        const Bytes own = contribution(layout.group.rank(), dtype, count);
        Bytes wanted = own;
        finish(layout.engine, all_reduce(layout.group, wanted, {.dtype = dtype}));
        Bytes ordinary = own;
        std::ranges::copy(own, registered.begin());
        for (const auto buffer : {std::span<std::byte>(ordinary), registered}) {
          const auto operation = layout.engine.submit(
              all_reduce(layout.group, buffer, {.dtype = dtype, .check_finite = true}));
          finish(layout.engine, operation);
          expect(std::ranges::equal(buffer, wanted), layout.name + ": " + name(dtype));
          expect(!operation->found_nonfinite(), layout.name + ": " + name(dtype) + " is finite");
        }
        layout.engine.release(layout.group, registered);
      }
    }
  });
});

// The values are finite on every rank, and on every node: only the result that all ranks get is checked.
const Test overflow("check_finite: sums that overflow, also on their way between nodes", Runs::on_ranks, [] {
  for_each_layout([](const Layout& layout) {
    Group& group = layout.group;
    const auto sum_of = [&](float value, const Reduction& reduction) {
      std::vector<float> values(5000, 1.0F);
      values[4321] = value;
      const auto operation = layout.engine.submit(all_reduce(group, bytes_of(values), reduction));
      finish(layout.engine, operation);
      const bool is_finite = std::isfinite(values[4321]);
      expect_equal(operation->found_nonfinite(), !is_finite, layout.name + ": as the result is");
      return is_finite;
    };
    const float largest = std::numeric_limits<float>::max();
    expect_equal(sum_of(largest, {.check_finite = true}), group.size() == 1, layout.name + ": float32");
    expect(sum_of(group.rank() % 2 == 0 ? largest : -largest / 2, {.check_finite = true}) || group.size() > 2,
           "cancels");
    const Reduction narrow{.wire_dtype = DataType::float16, .check_finite = true};
    const float share = 60000.0F / static_cast<float>(group.size());
    expect(sum_of(share, narrow), layout.name + ": fits float16");
    expect_equal(sum_of(2 * share, narrow), group.num_nodes() == 1, layout.name + ": does not");
  });
});

// Ranks run ahead of each other: the findings of one operation must not appear in another.
const Test in_flight("check_finite: many operations in flight, of all kinds", Runs::on_ranks, [] {
  for_each_layout([](const Layout& layout) {
    Group& group = layout.group;
    constexpr std::size_t num_operations = 150;
    constexpr std::size_t count = 200;
    const auto memory = layout.engine.allocate(group, num_operations * 4 * count);
    const auto block = own_block(layout, memory);
    std::vector<float> ordinary(num_operations * count);
    const auto has = [&](std::size_t i) { return i % 3 == 1 || i % 7 == 0; };
    std::vector<std::shared_ptr<Operation>> operations;
    std::minstd_rand random(static_cast<unsigned>(group.rank()));
    for (std::size_t i = 0; i < num_operations; ++i) {
      const bool in_place = i % 2 == 0;
      const auto buffer = in_place ? block.subspan(4 * i * count, 4 * count)
                                   : bytes_of(std::span(ordinary).subspan(i * count, count));
      const int culprit = has(i) ? static_cast<int>(i) % group.size() : -1;
      fill(buffer, group, culprit, i, infinity);
      const Reduction reduction{.check_finite = i % 5 != 0};
      operations.push_back(layout.engine.submit(i % 4 == 0 ? reduce_shards(group, buffer, {{0, 4 * count}}, reduction)
                                                           : all_reduce(group, buffer, reduction)));
      if (i % 6 == 0) finish(layout.engine, barrier(group));
      if (random() % 8 == 0) finish(layout.engine, operations.back());
    }
    for (std::size_t i = 0; i < num_operations; ++i) {
      finish(layout.engine, operations[i]);
      if (i % 5 == 0) {
        expect_throws<std::invalid_argument>([&] { operations[i]->found_nonfinite(); }, "not asked to check");
      } else if (i % 4 != 0) {
        expect_equal(operations[i]->found_nonfinite(), has(i), layout.name + ": operation " + std::to_string(i));
      }
    }
    Bytes last(8);  // peers read the buffers until this is done
    finish(layout.engine, all_reduce(group, last, {}));
  });
});

const Test shards("check_finite: reduce_shards tells the owner", Runs::on_ranks, [] {
  for_each_layout([](const Layout& layout) {
    Group& group = layout.group;
    constexpr std::size_t count = 1003;
    const auto memory = layout.engine.allocate(group, 8 * count);
    const auto buffer = own_block(layout, memory).first(8 * count);
    const std::vector<Block> blocks{{4 * count / 64 * 64 + 64, 900}, {64, 4 * count - 64}};
    for (const std::size_t position : {0U, 15U, 16U, 300U, 700U, 1002U, 1020U, 1100U, 1200U, 1240U}) {
      for (int culprit = -1; culprit < group.size(); ++culprit) {
        fill(buffer, group, culprit, position, std::nanf(""));
        const auto operation = layout.engine.submit(reduce_shards(group, buffer, blocks, {.check_finite = true}));
        finish(layout.engine, operation);
        bool owns = false;
        for (const Block& block : blocks) {
          const auto own = part_of(buffer.subspan(block.offset_bytes, block.num_bytes),
                                   static_cast<std::size_t>(group.rank()), static_cast<std::size_t>(group.size()));
          const auto start = static_cast<std::size_t>(own.data() - buffer.data());
          owns = owns || (4 * position >= start && 4 * position < start + own.size());
        }
        expect_equal(operation->found_nonfinite(), owns && culprit >= 0,
                     layout.name + ": element " + std::to_string(position) + " of rank " + std::to_string(culprit));
        Bytes last(8);
        finish(layout.engine, all_reduce(group, last, {}));
      }
    }
  });
});

const Test disagreement("check_finite: ranks that disagree get the same error", Runs::on_ranks, [] {
  for (const int max_ranks_per_node : {0, 1, 2}) {
    Ranks ranks(max_ranks_per_node);
    if (ranks.engine.size() == 1) return;
    const auto group = ranks.all();
    std::vector<float> values(3);
    const bool is_odd = ranks.engine.rank() == ranks.engine.size() - 1;
    const auto operation = ranks.engine.submit(all_reduce(*group, bytes_of(values), {.check_finite = is_odd}));
    const std::string last = std::to_string(ranks.engine.size() - 1);
    expect_throws<Mismatch>([&] { finish(ranks.engine, operation); }, "rank 0 calls all_reduce(sum, 3 float32), rank " +
                                                                          last +
                                                                          " calls all_reduce(sum, 3 float32, checked)");
    expect_throws<std::invalid_argument>([&] { operation->found_nonfinite(); }, "not done, or was not asked");
  }
});

}  // namespace
}  // namespace dtrain
