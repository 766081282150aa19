// SPDX-License-Identifier: Apache-2.0
#include "collectives/local_group.hpp"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "at.hpp"
#include "memory/futex.hpp"

namespace dtrain {
namespace {

// Reads the clock that all processes of a machine share.
std::int64_t now_ns() {
  using namespace std::chrono;
  return duration_cast<nanoseconds>(steady_clock::now().time_since_epoch()).count();
}

}  // namespace

std::string Call::description() const {
  const std::string checked = check_finite ? ", checked" : "";
  std::string elements = std::to_string(count) + " " + name(dtype);
  if (parts != 0) {
    char hash[17];
    std::snprintf(hash, sizeof(hash), "%016llx", static_cast<unsigned long long>(parts));
    elements += " in uneven parts " + std::string(hash);
  }
  const auto rooted = [&](const char* what) { return what + std::to_string(root) + ", " + elements + ")"; };
  switch (collective) {
    case Collective::all_reduce:
      return std::string("all_reduce(") + name(op) + ", " + elements +
             (wire_dtype != dtype ? std::string(", as ") + name(wire_dtype) + " between nodes" : "") + checked + ")";
    case Collective::reduce: return std::string("reduce(") + name(op) + ", " + rooted("root ");
    case Collective::broadcast: return rooted("broadcast(root ");
    case Collective::all_gather: return "all_gather(" + elements + ")";
    case Collective::reduce_scatter: return std::string("reduce_scatter(") + name(op) + ", " + elements + ")";
    case Collective::all_to_all: return std::string("all_to_all(") + name(dtype) + ")";
    case Collective::gather: return rooted("gather(root ");
    case Collective::scatter: return rooted("scatter(root ");
    case Collective::send: return rooted("send(to rank ");
    case Collective::receive:
      return root < 0 ? "receive(from any rank, " + elements + ")" : rooted("receive(from rank ");
    case Collective::barrier: return "barrier()";
    case Collective::set_up: return "the set-up of a group or its memory";
    case Collective::reduce_shards: return std::string("reduce_shards(") + name(op) + ", " + elements + checked + ")";
    case Collective::gather_shards: return "gather_shards(" + elements + ")";
  }
  return "?";
}

// The sleeper counts itself, checks once more whether it may continue, and only then sleeps; the ringer changes the
// value that the sleeper waits for and then looks at the count. Both orders are sequentially consistent, so one of the
// two sees the other.
void Doorbell::ring() {
  std::atomic_thread_fence(std::memory_order_seq_cst);
  if (num_sleepers.load(std::memory_order_relaxed) == 0) return;
  rings.fetch_add(1);
  futex_wake_all(rings);
}

std::size_t LocalGroup::block_bytes() { return sizeof(Header) + 2 * scratch_bytes; }

LocalGroup::LocalGroup(int local_rank, std::shared_ptr<const Allocation> blocks, std::vector<Doorbell*> doorbells,
                       NumaDomains domains)
    : local_rank_(local_rank),
      blocks_(std::move(blocks)),
      doorbells_(std::move(doorbells)),
      numa_domains_(std::move(domains)) {
  for (const Mapping& block : *blocks_) headers_.push_back(reinterpret_cast<Header*>(block.bytes().data()));
}

void LocalGroup::ring_others() {
  for (int member = 0; member < size(); ++member) {
    if (member != local_rank_) at(doorbells_, member)->ring();
  }
}

bool LocalGroup::post(std::uint64_t sequence, const Call& call) {
  for (const Header* header : headers_) {
    if (sequence >= header->num_completed.load(std::memory_order_acquire) + ring_length) return false;
  }
  Header& own = *at(headers_, local_rank_);
  own.calls[sequence % ring_length] = call;
  own.posted_at_ns.store(now_ns(), std::memory_order_relaxed);
  own.num_posted.store(sequence + 1, std::memory_order_release);
  ring_others();
  return true;
}

bool LocalGroup::all_posted(std::uint64_t sequence) const {
  return std::ranges::all_of(headers_, [sequence](const Header* header) {
    return header->num_posted.load(std::memory_order_acquire) > sequence;
  });
}

const Call& LocalGroup::call_of(int member, std::uint64_t sequence) const {
  return at(headers_, member)->calls[sequence % ring_length];
}

void LocalGroup::complete(std::uint64_t sequence) {
  at(headers_, local_rank_)->num_completed.store(sequence + 1, std::memory_order_release);
}

void LocalGroup::leave(const std::string& reason) {
  Header& own = *at(headers_, local_rank_);
  if (own.has_left.load(std::memory_order_relaxed) == 0) reason.copy(own.reason.data(), own.reason.size() - 1);
  own.has_left.store(1, std::memory_order_release);
  ring_others();
}

std::string LocalGroup::reason_of(int member) const {
  const auto& reason = at(headers_, member)->reason;
  return {reason.data(), strnlen(reason.data(), reason.size())};
}

LastSeen LocalGroup::last_seen(int member) const {
  const Header& header = *at(headers_, member);
  const std::uint64_t num_calls = header.num_posted.load(std::memory_order_acquire);
  if (num_calls == 0) return {};
  const auto posted_at_ns = static_cast<double>(header.posted_at_ns.load(std::memory_order_relaxed));
  return {num_calls, header.calls[(num_calls - 1) % ring_length],
          (static_cast<double>(now_ns()) - posted_at_ns) * 1e-9};
}

bool LocalGroup::has_left() const { return at(headers_, local_rank_)->has_left.load(std::memory_order_acquire) != 0; }

int LocalGroup::first_left(std::uint64_t sequence) const {
  int first = -1;
  for (int member = 0; member < size(); ++member) {
    const Header& header = *at(headers_, member);
    if (header.has_left.load(std::memory_order_acquire) == 0 ||
        header.num_completed.load(std::memory_order_acquire) > sequence) {
      continue;
    }
    if (!reason_of(member).empty()) return member;
    if (first < 0) first = member;
  }
  return first;
}

std::uint64_t LocalGroup::arrive(bool flag) {
  Header& own = *at(headers_, local_rank_);
  const std::uint64_t target = own.num_arrived.load(std::memory_order_relaxed) + 1;
  own.flags[target % 2] = flag;
  own.num_arrived.store(target, std::memory_order_release);
  ring_others();
  return target;
}

bool LocalGroup::all_arrived(std::uint64_t target) const {
  return std::ranges::all_of(headers_, [target](const Header* header) {
    return header->num_arrived.load(std::memory_order_acquire) >= target;
  });
}

bool LocalGroup::any_flag() const {
  const std::uint64_t last = at(headers_, local_rank_)->num_arrived.load(std::memory_order_relaxed);
  return std::ranges::any_of(headers_, [last](const Header* header) { return header->flags[last % 2] != 0; });
}

std::vector<std::byte*> LocalGroup::next_scratch() {
  std::vector<std::byte*> scratch = all_scratch();
  for (std::byte*& place : scratch) place += half_ * scratch_bytes;
  half_ = 1 - half_;
  return scratch;
}

std::vector<std::byte*> LocalGroup::all_scratch() const {
  std::vector<std::byte*> scratch;
  for (const Mapping& block : *blocks_) scratch.push_back(block.bytes().data() + sizeof(Header));
  return scratch;
}

void LocalGroup::add(std::shared_ptr<const Allocation> allocation) {
  allocations_.push_back({++num_allocations_, std::move(allocation)});
}

void LocalGroup::remove(std::span<const std::byte> own_block) {
  std::erase_if(allocations_, [&](const Numbered& entry) {
    return at(*entry.blocks, local_rank_).bytes().data() == own_block.data();
  });
}

void LocalGroup::locate(std::span<const std::byte> buffer, Call& call) const {
  for (const Numbered& entry : allocations_) {
    const auto block = at(*entry.blocks, local_rank_).bytes();
    if (buffer.data() >= block.data() && buffer.data() + buffer.size() <= block.data() + block.size()) {
      call.allocation = entry.number;
      call.offset_bytes = static_cast<std::uint64_t>(buffer.data() - block.data());
      return;
    }
  }
}

std::vector<std::byte*> LocalGroup::shared_buffers(std::uint64_t sequence, std::size_t num_bytes) const {
  const std::uint32_t number = call_of(local_rank_, sequence).allocation;
  const auto entry = std::ranges::find(allocations_, number, &Numbered::number);
  if (number != 0 && entry == allocations_.end()) throw std::logic_error("memory was released while it was in use");
  std::vector<std::byte*> buffers;
  for (int member = 0; member < size(); ++member) {
    const Call& call = call_of(member, sequence);
    if (number == 0 || call.allocation != number) return {};
    const auto block = at(*entry->blocks, member).bytes();
    const std::uint64_t offset = call.offset_bytes;
    if (offset > block.size() || num_bytes > block.size() - offset) {
      throw std::runtime_error("member " + std::to_string(member) + " on this node says that its buffer of " +
                               std::to_string(num_bytes) + " bytes begins at " + std::to_string(offset) +
                               " of an allocation of " + std::to_string(block.size()) +
                               " bytes: something has overwritten the ranks' shared memory");
    }
    buffers.push_back(block.data() + offset);
  }
  return buffers;
}

}  // namespace dtrain
