// SPDX-License-Identifier: Apache-2.0
// What drives the collectives of this process.
//
// On one node without a spare core, whoever waits does the work: a thread more would only take turns with the one that
// waits. With cores to spare, or where MPI must be called while nobody waits, there is an engine thread, and who waits
// helps it: to wake it takes longer than a small operation. One thread at a time drives, and makes MPI calls. Waiting spins briefly and then sleeps, since ranks may outnumber cores.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "collectives/group.hpp"
#include "collectives/shards.hpp"
#include "memory/node.hpp"
#include "mpi/mailbox.hpp"
#include "mpi/replacement.hpp"
#include "runtime/watch.hpp"

namespace dtrain {

struct ControlMessage;

struct EngineOptions {
  std::uintptr_t communicator_address = 0;  // of an MPI_Comm to duplicate; 0 for the world
  int max_ranks_per_node = 0;               // > 0: pretend nodes of so many ranks, for tests
  std::optional<int> numa_node = std::nullopt;  // pretend that this rank's processors are this NUMA node's, for tests
  bool initialized_mpi = false;  // introduce() has done it, so that it is this engine's to finalise
  std::optional<int> cpu_limit = std::nullopt;  // for so many processors the ranks of this machine get time
  bool survives_deaths = false;  // of ranks: see recover(). Only where mpi::survives_deaths()
};

class Engine {
 public:
  // Collective over the communicator. Initialises MPI unless that was done.
  explicit Engine(const EngineOptions& options);
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  int rank() const { return world_.rank(); }
  int size() const { return world_.size(); }
  const Node& node() const { return *node_; }
  bool has_thread() const { return has_thread_; }
  // Of all groups since the start.
  const Counters& counters() const { return *counters_; }

  // Collective over `ranks`, in the order of the new group; blocks.
  std::shared_ptr<Group> create_group(std::span<const int> ranks);

  // Local, a no-op in a forked child. This rank takes part in nothing more of `group`, whose memory goes with the last
  // who holds it; its communicator is kept until the engine closes, since freeing it is collective.
  void close_group(Group& group);

  // Says what this process waits for when that takes long.
  Watch& watch() { return *watch_; }

  // What `operation` of `group` waits for, in words. Asks ranks on other nodes where they are, and gives them a second to
  // answer. Local.
  std::string describe_wait(Group& group, const Operation& operation);
  // Local. This rank takes part in nothing more of `group`; its operations fail with `reason`, and so do those of the
  // other ranks, also what they call later.
  void give_up(Group& group, const std::string& reason);

  // Collective over all ranks; blocks.
  std::shared_ptr<mpi::Mailbox> create_mailbox();

  // Collective over `group`; blocks. Memory in which its collectives need no copies: each rank gets `num_bytes`, zeroed
  // and page-aligned. It is unmapped when the result and release() have let it go.
  std::shared_ptr<const Allocation> allocate(Group& group, std::size_t num_bytes);
  // Local. The group's collectives no longer use in place what allocate() gave at `memory`.
  void release(Group& group, std::span<const std::byte> memory);
  // Collective over `group`; blocks. `num_bytes` that all ranks of a node share: one block on each node, zeroed and
  // page-aligned, which forked children have as well.
  std::shared_ptr<const Mapping> allocate_shared(Group& group, std::size_t num_bytes);

  // Each returns at once; the buffers must stay valid until the operation is done. Collective over `group`. Ranks that
  // call different things at the same place of its sequence all get the same Mismatch. What a rank sees alone throws
  // std::invalid_argument at once.
  std::shared_ptr<Operation> all_reduce(Group& group, std::span<std::byte> buffer, const Reduction& reduction);
  // Leaves the result in every rank's buffer.
  std::shared_ptr<Operation> reduce(Group& group, std::span<std::byte> buffer, const Reduction& reduction, int root);
  std::shared_ptr<Operation> broadcast(Group& group, std::span<std::byte> buffer, int root, DataType dtype);
  std::shared_ptr<Operation> all_gather(Group& group, std::span<const std::byte> input,
                                        std::vector<std::span<std::byte>> outputs, DataType dtype);
  std::shared_ptr<Operation> reduce_scatter(Group& group, std::vector<std::span<const std::byte>> inputs,
                                            std::span<std::byte> output, const Reduction& reduction);
  std::shared_ptr<Operation> all_to_all(Group& group, std::vector<std::span<const std::byte>> sends,
                                        std::vector<std::span<std::byte>> receives, DataType dtype);
  // `outputs` and `inputs`: of the root alone.
  std::shared_ptr<Operation> gather(Group& group, std::span<const std::byte> input,
                                    std::vector<std::span<std::byte>> outputs, int root, DataType dtype);
  std::shared_ptr<Operation> scatter(Group& group, std::vector<std::span<const std::byte>> inputs,
                                     std::span<std::byte> output, int root, DataType dtype);
  std::shared_ptr<Operation> barrier(Group& group);
  std::shared_ptr<Operation> reduce_shards(Group& group, std::span<std::byte> buffer, std::vector<Block> blocks,
                                           const Reduction& reduction);
  std::shared_ptr<Operation> gather_shards(Group& group, std::span<std::byte> buffer, std::vector<Block> blocks);

  // Likewise, but of two ranks: messages have no place in the sequence, and may overtake what is in it.
  std::shared_ptr<Operation> send(Group& group, std::span<const std::byte> bytes, int destination, int tag,
                                  DataType dtype);
  std::shared_ptr<Operation> receive(Group& group, std::span<std::byte> bytes, int source, int tag, DataType dtype);

  // Waits until `operation` is done, at most `timeout`; returns whether it is.
  bool wait(Operation& operation, std::chrono::microseconds timeout);
  // Does what can be done without waiting, unless that is the engine thread's business.
  void poll();

  // With survives_deaths a rank that was killed fails all operations of all groups, and nothing can be set up any more.
  // Whether that has happened; waits for it up to `timeout`, since errors may be here before the word of it. Local.
  bool has_lost_rank(std::chrono::milliseconds timeout);
  // Then, collective over the ranks that live, blocks: an engine of them, in their order, which takes this one's place.
  // None if one of them is in close(): the others have come to their end.
  std::shared_ptr<Engine> recover();

  // Starts a process to take the place of one that was killed. Local, returns at once; to be called on rank 0.
  void start_replacement(const std::string& command, const std::vector<std::string>& arguments,
                         const std::string& folder);
  // Whether there is one, and whether it waits in join(). Local.
  bool has_replacement();
  bool has_ready_replacement();
  // Collective over all ranks, blocks, once it waits: an engine of these and of that process, the last of them.
  std::shared_ptr<Engine> admit();
  // In that process, on an engine of it alone: likewise. None if it is not needed any more. Throws mpi::Error if the
  // rank that has started it is gone.
  std::shared_ptr<Engine> join();

  // Tells the peers that this rank takes part in nothing more, and finalises MPI if the engine initialised it, which
  // is collective. Local and a no-op in a forked child. Operations in flight fail.
  void close();

 private:
  Engine(const EngineOptions& options, mpi::Communicator world, std::optional<mpi::Communicator> control = std::nullopt);
  void start_thread();
  void stop_thread();
  void lose_rank();
  void look_for_deaths();
  bool fail_groups();
  void revoke_all();
  std::shared_ptr<Engine> go_on(mpi::Communicator members);
  void retire();
  std::shared_ptr<Operation> submit(Group& group, Call call, std::span<const std::byte> buffer,
                                    std::function<Task(Operation&)> start);
  bool progress();
  bool needs_polling();
  void take_inbox();
  void answer_control();
  void post_to_other_nodes(const Group& group, const ControlMessage& message);
  void tell_of_leaving(const Group& group);
  void collect_control();
  void meet_at_end();
  void leave(Group& group);
  void fail(Group& group, const std::string& reason);
  void start_watch(const AllGather& all_gather);
  void require_open();
  Doorbell& own_doorbell() { return status_of_rank_[static_cast<std::size_t>(rank())]->doorbell; }
  void drain();
  void run();
  void sleep(std::chrono::microseconds timeout);
  AllGather gather_over(const mpi::Communicator& communicator) const;

  EngineOptions options_;
  mpi::Communicator world_;
  std::unique_ptr<Node> node_;
  std::vector<Mapping> status_memory_;   // of the ranks on this node, in their order
  std::vector<StatusPage*> status_of_rank_;  // null for ranks on other nodes
  bool has_thread_ = false;
  bool waiters_spin_ = false;
  const int max_tag_;
  const int owner_pid_;
  const std::shared_ptr<Counters> counters_ = std::make_shared<Counters>();  // groups may live longer

  std::mutex inbox_mutex_;
  std::deque<std::pair<Group*, std::shared_ptr<Operation>>> inbox_;

  // Between nodes: where ranks are, and who has given up.
  std::shared_ptr<mpi::Mailbox> control_;
  std::chrono::steady_clock::time_point next_control_;
  std::uint64_t num_groups_ = 0;
  std::vector<std::shared_ptr<mpi::Mailbox>> mailboxes_;

  std::mutex drive_mutex_;  // held by whoever drives
  std::vector<std::shared_ptr<Group>> groups_;
  std::vector<mpi::Communicator> left_communicators_;  // of closed groups, still to be freed
  std::vector<std::shared_ptr<Group>> abandoned_groups_;  // closed ones into whose memory MPI may still write
  std::atomic<bool> stopping_ = false;
  std::atomic<bool> has_lost_rank_ = false;
  std::chrono::steady_clock::time_point next_look_for_deaths_;
  bool have_others_ended_ = false;
  bool is_closed_ = false;
  std::vector<mpi::Communicator> spare_communicators_;  // of all ranks, for create_group(): see go_on()
  std::shared_ptr<mpi::Replacement> replacement_;
  std::unique_ptr<std::thread> thread_;
  std::unique_ptr<Watch> watch_;
};

}  // namespace dtrain
