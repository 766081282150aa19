// SPDX-License-Identifier: Apache-2.0
// Members of a group on one node, and the memory through which they work together.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "collectives/numa.hpp"
#include "collectives/task.hpp"
#include "kernels/dtype.hpp"
#include "memory/segment.hpp"

namespace dtrain {

enum class Collective : std::uint8_t {
  all_reduce,
  reduce,
  broadcast,
  all_gather,
  reduce_scatter,
  all_to_all,
  gather,
  scatter,
  barrier,
  reduce_shards,
  gather_shards,
  set_up,        // creates groups and memory; the last three have no place in the sequence
  send,
  receive
};

// The call that a rank announces. All members must announce the same at the same place in a group's sequence.
struct Call {
  Collective collective = Collective::barrier;
  DataType dtype = DataType::uint8;
  ReduceOp op = ReduceOp::sum;
  DataType wire_dtype = DataType::uint8;  // type of a reduction's sums between nodes
  std::int32_t root = 0;  // or the peer of a message
  std::uint64_t count = 0;
  // Hash of the lengths of the ranks' parts, if these differ; then `count` is the sum of the lengths.
  std::uint64_t parts = 0;
  // Only in all_to_all: 1 + the bytes of each part if all parts of this rank have the same length, else 0. This field
  // and those below it may differ between members.
  std::uint64_t even_bytes = 0;
  // Where the buffer lies in memory that the members allocated together: the number of the allocation, from 1, and the
  // offset in bytes; else 0 and 0.
  std::uint32_t allocation = 0;
  // Only in reductions; the same on all members. It is no bool, since memory that another rank writes may hold a value
  // that no bool has.
  std::uint8_t check_finite = 0;
  std::uint64_t offset_bytes = 0;

  bool agrees_with(const Call& other) const {
    return collective == other.collective && dtype == other.dtype && op == other.op && wire_dtype == other.wire_dtype &&
           root == other.root && count == other.count && parts == other.parts && check_finite == other.check_finite;
  }
  std::string description() const;
};

// Where a rank was last seen in a group.
struct LastSeen {
  std::uint64_t num_calls = 0;  // collectives that it has called
  Call call;  // the last of them
  double seconds_ago = 0;
};

// Doorbell of a process, shared with the processes of its node, by which they wake it. Any process rings; the owner
// sleeps.
struct alignas(64) Doorbell {
  std::atomic<std::uint32_t> rings;
  std::atomic<std::uint32_t> num_sleepers;

  void ring();
};

// Memory that the members of a group on one node allocated together: one block for each member, all of the same size,
// each mapped by all members. Blocks are in the order of the members.
using Allocation = std::vector<Mapping>;

class LocalGroup {
 public:
  static constexpr std::size_t scratch_bytes = std::size_t{1} << 20;  // half of what each member has

  // Number of bytes of the block that share() must give each member.
  static std::size_t block_bytes();

  // `blocks` and `doorbells` are in the order of the members; blocks start as zeros.
  LocalGroup(int local_rank, std::shared_ptr<const Allocation> blocks, std::vector<Doorbell*> doorbells,
             NumaDomains domains = {});

  int rank() const { return local_rank_; }
  int size() const { return static_cast<int>(headers_.size()); }
  const NumaDomains& numa_domains() const { return numa_domains_; }

  // Announces call number `sequence`; returns false if slower members have no room for it yet.
  bool post(std::uint64_t sequence, const Call& call);
  bool all_posted(std::uint64_t sequence) const;
  const Call& call_of(int member, std::uint64_t sequence) const;
  void complete(std::uint64_t sequence);

  // Announces that this rank leaves the group, and why; members that wait for it then stop with an error.
  void leave(const std::string& reason = {});
  bool has_left() const;
  // Returns the first member that has left without completing call number `sequence`, or -1. Members that gave a reason
  // take precedence.
  int first_left(std::uint64_t sequence) const;
  // The reason that a member gave when it left.
  std::string reason_of(int member) const;
  LastSeen last_seen(int member) const;

  // Returns a wait that ends when all members have arrived at it, each with a flag.
  auto barrier(bool flag = false) {
    const std::uint64_t target = arrive(flag);
    return Until([this, target] { return all_arrived(target); });
  }
  // Whether any member arrived at the last barrier with its flag set. Valid from the end of that barrier until this
  // member's next one.
  bool any_flag() const;

  // Returns each member's scratch_bytes for the next piece of work. The two halves of the scratch memory take turns:
  // with at least one barrier in each turn, a half is written again only after all members have finished with it.
  std::vector<std::byte*> next_scratch();

  // Returns all of each member's scratch memory, twice scratch_bytes. The caller waits at a barrier before, so that no
  // member still uses memory from next_scratch(), and at one after.
  std::vector<std::byte*> all_scratch() const;

  // Adds memory in which collectives need no copies.
  void add(std::shared_ptr<const Allocation> allocation);
  // Removes the memory in which this rank's block starts at `own_block`.
  void remove(std::span<const std::byte> own_block);
  // Sets call.allocation and call.offset_bytes for a buffer of this rank, if it lies in such memory.
  void locate(std::span<const std::byte> buffer, Call& call) const;
  // Returns every member's buffer for call number `sequence` if all lie in the same allocation, else nothing. Depends
  // only on the announcements, so that all members find the same, also while one of them removes memory. Throws
  // std::runtime_error if the first `num_bytes` of a buffer are not within its allocation.
  std::vector<std::byte*> shared_buffers(std::uint64_t sequence, std::size_t num_bytes) const;

 private:
  static constexpr std::size_t ring_length = 64;

  // Written by its owner, read by all members.
  struct Header {
    alignas(64) std::atomic<std::uint64_t> num_posted;
    alignas(64) std::atomic<std::uint64_t> num_arrived;
    // Flags of the last two barriers, in turn: a fast member may be at the next barrier while a slow one still reads.
    std::array<std::uint8_t, 2> flags;
    alignas(64) std::atomic<std::uint64_t> num_completed;
    std::atomic<std::int64_t> posted_at_ns;
    std::atomic<std::uint32_t> has_left;
    std::array<char, 1000> reason;
    alignas(64) std::array<Call, ring_length> calls;
  };

  std::uint64_t arrive(bool flag);
  bool all_arrived(std::uint64_t target) const;
  void ring_others();

  int local_rank_;
  std::shared_ptr<const Allocation> blocks_;  // shared, so that a test's threads can be the members
  std::vector<Header*> headers_;
  std::vector<Doorbell*> doorbells_;
  NumaDomains numa_domains_;
  std::size_t half_ = 0;
  std::uint32_t num_allocations_ = 0;
  struct Numbered {
    std::uint32_t number;
    std::shared_ptr<const Allocation> blocks;
  };
  std::vector<Numbered> allocations_;
};

}  // namespace dtrain
