// SPDX-License-Identifier: Apache-2.0
#include "collectives/all_reduce_nodes.hpp"

#include <algorithm>
#include <cstring>
#include <optional>
#include <utility>
#include <vector>

#include "at.hpp"
#include "collectives/messages.hpp"
#include "collectives/node_exchange.hpp"
#include "collectives/parts.hpp"

namespace dtrain {
namespace {

using Route = NodeExchange::Route;

// Number of messages of one stage that a carrier has under way, where the data is in place: enough to keep the network
// busy while this rank or its peer does something else.
constexpr std::size_t messages_under_way = 16;
// Number of segments in the scratch memory: the fewest that overlap, since each segment takes two barriers.
constexpr std::size_t num_scratch_segments = 4;
// Largest difference between the lengths of two slices of one segment.
constexpr std::size_t max_rounding_bytes = 64;

// Decisions that must be the same on all ranks of the group.
struct Plan {
  Route route;
  bool in_place;
  std::size_t segment_bytes;
  std::size_t turn_lag;  // number of later segments that begin before the turn of a segment
  std::size_t end_lag;   // number of later segments that begin before the end of a segment
  std::size_t num_slots;  // segments under way

  Plan(const Group& group, bool is_shared, std::size_t num_bytes, std::size_t element_bytes, std::size_t wire_bytes) {
    const std::size_t slices = num_slices(group);
    route = NodeExchange::choose_route(group, num_bytes / element_bytes * wire_bytes / slices);
    in_place = is_shared || slices == 1;
    const auto peers = static_cast<std::size_t>(group.num_nodes() - 1);
    const std::size_t hops = route == Route::one_hop ? 1 : 2;
    turn_lag = in_place ? std::max(messages_under_way / peers, std::size_t{2}) : num_scratch_segments / 2 / hops;
    end_lag = hops * turn_lag;
    num_slots = end_lag + (in_place ? 1 : 2);  // another rank may still fetch the segment that ended last
    const std::size_t pieces = slices * (hops == 1 ? 1 : peers + 1);
    segment_bytes = in_place ? message_bytes * pieces * element_bytes / wire_bytes
                             : 2 * LocalGroup::scratch_bytes / num_scratch_segments;
  }
};

// The stages of each segment; the caller waits between them.
class SegmentedReduction {
 public:
  SegmentedReduction(Group& group, std::span<std::byte> buffer, const Reduction& reduction);

  const Plan& plan() const { return plan_; }
  std::size_t num_segments() const { return num_segments_; }
  // With one segment the scratch memory takes turns as in other collectives, which saves two barriers.
  bool takes_all_scratch() const { return !plan_.in_place && num_segments_ > 1; }

  void fill(std::size_t number);  // the node may read it after a barrier
  void begin(std::size_t number);
  void turn(std::size_t number);
  void end(std::size_t number);  // the node has the result after a barrier
  void fetch(std::size_t number);

  // Whether this rank's slices that have ended hold an infinity or NaN.
  bool found_nonfinite() const { return found_nonfinite_; }

  // Whether the transfers for which segment `number` waits are complete.
  bool has_arrived(std::size_t number) { return mpi::test_all(slot(number).transfers); }
  // Drives the transfers of all segments while something else is waited for.
  void drive() {
    for (Slot& slot : slots_) mpi::test_all(slot.transfers);
  }

 private:
  struct Slot {
    std::vector<std::byte*> places;  // where every local rank has the segment or its copy
    std::vector<std::span<std::byte>> carried;  // this rank's slices, in its own place
    std::vector<NodeExchange::Slice> wire;  // the bytes of each slice that cross between nodes
    std::optional<NodeExchange> exchange;
    std::vector<mpi::Transfer> transfers;
    std::span<std::byte> memory;
  };

  Slot& slot(std::size_t number) { return slots_[number % slots_.size()]; }
  std::span<std::byte> work(std::size_t number) const {
    const std::size_t start = number * plan_.segment_bytes;
    return buffer_.subspan(start, std::min(plan_.segment_bytes, buffer_.size() - start));
  }
  bool is_narrow() const { return between_.dtype != within_.dtype; }
  std::size_t num_elements(std::span<const std::byte> bytes) const {
    return bytes.size() / element_bytes(within_.dtype);
  }

  Group& group_;
  std::span<std::byte> buffer_;
  bool check_finite_;
  bool found_nonfinite_ = false;
  Reduction within_;
  Reduction between_;
  std::vector<std::byte*> shared_;
  Plan plan_;
  std::size_t num_segments_;
  std::size_t num_slices_;
  std::vector<Slot> slots_;
};

Reduction within_nodes(Reduction reduction) {
  const bool is_sum = reduction.op == ReduceOp::sum || reduction.op == ReduceOp::average;
  if (reduction.dtype != DataType::float32 || !is_sum) reduction.wire_dtype.reset();
  reduction.check_finite = false;  // only the final result is checked
  return reduction;
}

// The average is divided in the last reduction of an element.
Reduction between_nodes(const Group& group, Reduction reduction) {
  if (reduction.op == ReduceOp::average) reduction.scale = 1.0 / group.size();
  reduction.dtype = reduction.wire_dtype.value_or(reduction.dtype);
  return reduction;
}

SegmentedReduction::SegmentedReduction(Group& group, std::span<std::byte> buffer, const Reduction& reduction)
    : group_(group),
      buffer_(buffer),
      check_finite_(reduction.check_finite),
      within_(within_nodes(reduction)),
      between_(between_nodes(group, within_)),
      shared_(group.shared_buffers(buffer.size())),
      plan_(group, !shared_.empty(), buffer.size(), element_bytes(within_.dtype), element_bytes(between_.dtype)),
      num_segments_((buffer.size() + plan_.segment_bytes - 1) / plan_.segment_bytes),
      num_slices_(num_slices(group)),
      slots_(plan_.num_slots) {
  if (plan_.in_place && shared_.empty()) shared_ = {buffer.data()};
  const auto own_slices = num_slices_ / static_cast<std::size_t>(group.local().size()) + 1;
  // Room for each slice of the first segment, which is the longest: its 16-bit copy, and the slices that the other
  // nodes send.
  const std::size_t slice_bytes = part_of(work(0), num_slices_ - 1, num_slices_).size() + max_rounding_bytes;
  const std::size_t copies = plan_.route == Route::one_hop ? static_cast<std::size_t>(group.num_nodes()) : 2;
  const std::size_t slot_bytes = own_slices * slice_bytes * copies;
  const auto memory = group.staging(slot_bytes * slots_.size());
  for (std::size_t i = 0; i < slots_.size(); ++i) slots_[i].memory = memory.subspan(i * slot_bytes, slot_bytes);
}

void SegmentedReduction::fill(std::size_t number) {
  Slot& to = slot(number);
  if (plan_.in_place) {
    to.places = shared_;
    for (std::byte*& place : to.places) place += number * plan_.segment_bytes;
    return;
  }
  to.places = takes_all_scratch() ? group_.local().all_scratch() : group_.local().next_scratch();
  for (std::byte*& place : to.places) place += number % num_scratch_segments * plan_.segment_bytes;
  std::memcpy(at(to.places, group_.local().rank()), work(number).data(), work(number).size());
}

void SegmentedReduction::begin(std::size_t number) {
  Slot& current = slot(number);
  const auto own_local = static_cast<std::size_t>(group_.local().rank());
  const auto num_local = static_cast<std::size_t>(group_.local().size());
  const std::span<std::byte> own(current.places[own_local], work(number).size());
  auto free = current.memory;
  current.carried.clear();
  current.wire.clear();
  for (std::size_t s = own_local; s < num_slices_; s += num_local) {
    const auto slice = part_of(own, s, num_slices_);
    if (num_local > 1) {
      const auto sources = slice_places(current.places, slice, own.data());
      std::byte* const destination = slice.data();
      reduce_by_numa(group_.local().numa_domains(), {sources.begin(), sources.end()}, {&destination, 1},
                     num_elements(slice), within_);
    }
    auto wire = slice;
    if (is_narrow()) {
      wire = free.first(num_elements(slice) * element_bytes(between_.dtype));
      free = free.subspan(wire.size());
      narrow(slice, wire.data(), between_.dtype);
    }
    current.carried.push_back(slice);
    current.wire.push_back({s, wire});
  }
  current.exchange.emplace(group_, current.wire, plan_.route, free);
  current.transfers = current.exchange->scatter();
}

void SegmentedReduction::turn(std::size_t number) {
  slot(number).exchange->reduce(between_);
  slot(number).transfers = slot(number).exchange->gather();
}

void SegmentedReduction::end(std::size_t number) {
  Slot& current = slot(number);
  const std::byte* const own = at(current.places, group_.local().rank());
  for (std::size_t i = 0; i < current.carried.size(); ++i) {
    const auto slice = current.carried[i];
    if (is_narrow()) widen(current.wire[i].bytes, slice.data(), between_.dtype);
    if (!plan_.in_place && !check_finite_) continue;
    const auto copies = plan_.in_place ? slice_places(current.places, slice, own) : std::vector{slice.data()};
    if (check_finite_) {  // a reduction of one source is a copy that looks at the values
      const std::byte* const source = slice.data();
      found_nonfinite_ |= reduce({&source, 1}, copies, num_elements(slice),
                                 {.dtype = within_.dtype, .check_finite = true});
      continue;
    }
    for (std::byte* copy : copies) {
      if (copy != slice.data()) std::memcpy(copy, slice.data(), slice.size());
    }
  }
}

void SegmentedReduction::fetch(std::size_t number) {
  const auto result = work(number);
  const Slot& from = slot(number);
  for (std::size_t s = 0; s < num_slices_; ++s) {
    const auto slice = part_of(result, s, num_slices_);
    std::memcpy(slice.data(), from.places[s % from.places.size()] + (slice.data() - result.data()), slice.size());
  }
}

}  // namespace

Task all_reduce_nodes(Group& group, std::span<std::byte> buffer, Reduction reduction) {
  if (buffer.empty()) co_return;
  LocalGroup& local = group.local();
  SegmentedReduction segments(group, buffer, reduction);
  const Plan& plan = segments.plan();
  if (segments.takes_all_scratch()) {
    auto scratch_is_free = local.barrier();
    co_await scratch_is_free;
  }
  const std::size_t num_segments = segments.num_segments();
  for (std::size_t i = 0; i < num_segments + plan.end_lag; ++i) {
    if (i < num_segments) {
      segments.fill(i);
      if (!plan.in_place) {
        auto all_filled = local.barrier();
        auto filled = Until([&] { return segments.drive(), all_filled.await_ready(); });
        co_await filled;
      }
      segments.begin(i);
    }
    if (i >= plan.turn_lag && i - plan.turn_lag < num_segments) {
      const std::size_t number = i - plan.turn_lag;
      auto scattered = Until([&segments, number] { return segments.has_arrived(number); });
      co_await scattered;
      segments.turn(number);
    }
    if (i >= plan.end_lag) {
      const std::size_t number = i - plan.end_lag;
      auto gathered = Until([&segments, number] { return segments.has_arrived(number); });
      co_await gathered;
      segments.end(number);
      if (!plan.in_place) {
        auto all_reduced = local.barrier(segments.found_nonfinite());
        auto reduced = Until([&] { return segments.drive(), all_reduced.await_ready(); });
        co_await reduced;
        segments.fetch(number);
      }
    }
  }
  if (plan.in_place || segments.takes_all_scratch()) {
    auto all_ended = local.barrier(segments.found_nonfinite());
    co_await all_ended;
  }
  group.report_nonfinite(local.any_flag());
}

}  // namespace dtrain
