// SPDX-License-Identifier: Apache-2.0
// A group of ranks and its collectives, which run one after the other in the order in which they were called.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "at.hpp"
#include "collectives/local_group.hpp"
#include "collectives/task.hpp"
#include "kernels/reduce.hpp"
#include "mpi/communicator.hpp"

namespace dtrain {

// A collective from call to completion. The caller keeps its buffers alive until is_done(), or until the engine that
// runs it is closed.
class Operation {
 public:
  // `start` makes the task. It is called once all ranks are known to make the same call, so it may look at their calls.
  Operation(const Call& call, std::function<Task(Operation&)> start) : call_(call), start_(std::move(start)) {}

  const Call& call() const { return call_; }
  bool is_message() const { return call_.collective >= Collective::send; }
  // The rank that sent the message, once a receive is done.
  int source() const { return source_; }
  void set_source(int rank) { source_ = rank; }

  bool is_done() const { return done_.load(std::memory_order_acquire) != 0; }
  // When this process noticed that the operation was done, with or without error. Valid only once it is done.
  std::chrono::steady_clock::time_point done_at() const { return done_at_; }
  // Rethrows the error with which the operation failed, if it failed. Valid only once it is done.
  void rethrow() const;
  // Whether the result has an infinite or NaN element: for all_reduce anywhere, so that all ranks get the same answer;
  // for reduce_shards in this rank's shards. Throws std::invalid_argument unless the operation is done without error
  // and was called with check_finite.
  bool found_nonfinite() const;
  // Lets `buffers` live as long as the operation.
  void keep(std::shared_ptr<const void> buffers) { buffers_ = std::move(buffers); }
  // The word on which the engine sleeps until the operation is done.
  std::atomic<std::uint32_t>& done_word() { return done_; }

 private:
  friend class Group;

  Call call_;
  std::function<Task(Operation&)> start_;
  std::optional<Task> task_;
  bool posted_ = false;
  int source_ = -1;
  bool found_nonfinite_ = false;
  std::exception_ptr error_;
  std::shared_ptr<const void> buffers_;
  std::chrono::steady_clock::time_point done_at_;
  std::atomic<std::uint32_t> done_{0};
};

// Counts of what the groups of an engine have done. The thread that drives writes them, any thread reads them.
struct Counters {
  std::atomic<std::uint64_t> collectives{0};  // collectives that succeeded
  // Messages between nodes, and the bytes in them.
  std::atomic<std::uint64_t> messages_sent{0};
  std::atomic<std::uint64_t> bytes_sent{0};
  std::atomic<std::uint64_t> messages_received{0};
  std::atomic<std::uint64_t> bytes_received{0};
  // Calls of MPI's own collectives. The messages of these are not counted, since MPI decides them.
  std::atomic<std::uint64_t> mpi_collectives{0};
};

// Not thread-safe: only the thread that drives the engine calls what changes it.
class Group {
 public:
  // `world_ranks`: the engine's number of each rank of the group. `node_of_rank`: its node, numbered 0, 1, ... in the
  // order of the nodes' lowest ranks. `id`: a number that every rank of the group has for it, and that no other group
  // of these ranks has.
  Group(std::uint64_t id, mpi::Communicator communicator, std::vector<int> world_ranks, std::vector<int> node_of_rank,
        LocalGroup local, std::shared_ptr<Counters> counters);

  std::uint64_t id() const { return id_; }
  int rank() const { return communicator_.rank(); }
  int size() const { return communicator_.size(); }
  const std::vector<int>& world_ranks() const { return world_ranks_; }
  int node() const { return at(node_of_rank_, rank()); }
  int num_nodes() const { return static_cast<int>(ranks_of_node_.size()); }
  // Ranks of the group on node number `node`, ascending.
  const std::vector<int>& ranks_of_node(int node) const { return at(ranks_of_node_, node); }
  LocalGroup& local() { return local_; }
  const mpi::Communicator& communicator() const { return communicator_; }
  // The largest tag that a transfer may have.
  int max_tag() const { return max_tag_; }

  // Number of the collective that runs now.
  std::uint64_t sequence() const { return num_finished_; }

  // Start transfers of the operation that runs now. They are counted, except receives from any_source.
  mpi::Transfer send(std::span<const std::byte> bytes, int destination, int tag) const;
  mpi::Transfer receive(std::span<std::byte> bytes, int source, int tag) const;
  mpi::Transfer broadcast(std::span<std::byte> bytes, int root) const;
  mpi::Transfer gather_to_all(std::span<const std::byte> mine, std::span<std::byte> all) const;

  // Memory for the operation that runs now: at least `num_bytes`, with any content. It is kept for the next operation,
  // since fresh memory costs more than the work in it.
  std::span<std::byte> staging(std::size_t num_bytes);

  // The number of this rank's next long message.
  std::uint64_t number_long_message() { return num_long_messages_++; }

  // Stores whether the result of the collective that runs now has an infinite or NaN element.
  void report_nonfinite(bool found) { queue_.front()->found_nonfinite_ = found; }

  // Queues a collective, or starts a message: messages may overtake each other and the collectives.
  void submit(std::shared_ptr<Operation> operation);

  // Returns the buffer of the operation that runs now on every rank of this node if, on all ranks of the group, the
  // buffer lies in the same memory that they allocated together; else nothing. The operation will use the first
  // `num_bytes` of each.
  std::vector<std::byte*> shared_buffers(std::size_t num_bytes) const;

  // Whether the all_to_all that runs now has parts of one length on all ranks.
  bool has_even_parts() const;

  // Advances what can advance without waiting; returns whether anything did.
  bool progress();
  bool is_idle() const { return queue_.empty(); }  // messages may be under way
  std::shared_ptr<Operation> last_queued() const { return queue_.back(); }
  // Whether progress() must be called repeatedly, since MPI has no way to wake a sleeper.
  bool needs_polling() const { return !messages_.empty() || (num_nodes() > 1 && !queue_.empty()); }

  // Describes what `operation` waits for: which ranks have not arrived, and where they were last seen.
  std::string describe_wait(const Operation& operation) const;
  // Where this rank was last seen, and what ranks on other nodes have reported about themselves.
  LastSeen last_seen() const { return local_.last_seen(local_.rank()); }
  void set_last_seen(int member, const LastSeen& seen) {
    if (!others_.empty()) at(others_, member) = seen;  // else nobody asked
  }
  void forget_others() { others_.assign(static_cast<std::size_t>(size()), std::nullopt); }
  bool knows_all() const;
  // Stores that a member on another node left after its first `num_completed` collectives.
  void note_left(int member, std::uint64_t num_completed) { left_elsewhere_[member] = num_completed; }

  // Whether an operation failed while it was under way, so that MPI may still move its bytes.
  bool has_abandoned() const { return !abandoned_.empty(); }

  // Fails every operation, now and later, with `error`.
  void fail(std::exception_ptr error);

 private:
  void post_waiting();
  bool advance_head();
  bool advance_messages();
  bool know_all_calls();
  const Call& call_of(int member) const;
  void check_calls() const;
  void check_all_here() const;
  std::vector<std::pair<int, std::optional<LastSeen>>> absent() const;
  void finish_head(std::exception_ptr error);
  void finish(const std::shared_ptr<Operation>& operation, std::exception_ptr error);

  std::uint64_t id_;
  mpi::Communicator communicator_;
  const int max_tag_;
  std::vector<int> world_ranks_;
  std::vector<int> node_of_rank_;
  std::vector<std::vector<int>> ranks_of_node_;
  LocalGroup local_;
  std::deque<std::shared_ptr<Operation>> queue_;
  std::vector<std::shared_ptr<Operation>> messages_;
  // Only with several nodes: the call of every rank at the head of the queue, and the transfer that gathers them.
  std::vector<Call> calls_;
  std::optional<mpi::Transfer> calls_transfer_;
  std::shared_ptr<Counters> counters_;
  std::vector<std::byte> staging_;
  std::vector<std::shared_ptr<Operation>> abandoned_;
  std::uint64_t num_finished_ = 0;
  std::uint64_t num_long_messages_ = 0;
  std::vector<std::optional<LastSeen>> others_;
  std::map<int, std::uint64_t> left_elsewhere_;
  std::exception_ptr failure_;
};

}  // namespace dtrain
