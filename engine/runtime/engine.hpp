// SPDX-License-Identifier: Apache-2.0
// The groups of ranks of this process, and their memory.
//
// An engine belongs to one set of ranks. Driver runs the calls in its groups, ControlChannel exchanges messages with
// ranks on other nodes, StallMonitor reports waits that take long, and Recovery finds the ranks that continue after a
// death: over them an engine makes its successor.
#pragma once

#include <sys/types.h>

#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "collectives/group.hpp"
#include "collectives/prepared_call.hpp"
#include "memory/node.hpp"
#include "mpi/mailbox.hpp"
#include "runtime/control_channel.hpp"
#include "runtime/driver.hpp"
#include "runtime/recovery.hpp"
#include "runtime/stall_monitor.hpp"

namespace dtrain {

struct EngineOptions {
  std::uintptr_t communicator_address = 0;  // address of an MPI_Comm to duplicate; 0 for the world
  int max_ranks_per_node = 0;               // > 0: pretend nodes of that many ranks, for tests
  std::optional<int> numa_node = std::nullopt;  // pretend that this rank is on that NUMA node, for tests
  bool initialized_mpi = false;  // exchange_versions() has initialised MPI, so this engine finalises it
  std::optional<int> cpu_limit = std::nullopt;  // processors that this machine's ranks get time on
  bool survives_deaths = false;  // survive killed ranks: see recover(). Only where mpi::survives_deaths()
};

class Engine {
 public:
  // Initialises MPI unless it is initialised already. Collective over the communicator, blocks.
  explicit Engine(const EngineOptions& options);
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  int rank() const { return world_.rank(); }
  int size() const { return world_.size(); }
  const Node& node() const { return *node_; }
  bool has_thread() const { return driver_->has_thread(); }
  // Counts of what all groups have done since the engine started.
  const Counters& counters() const { return *counters_; }

  // Reports what this process waits for when a wait takes long.
  StallMonitor& monitor() { return *monitor_; }
  // Asks ranks on other nodes for their state, and gives up groups.
  ControlChannel& control() { return *control_; }
  // Only with survives_deaths: finds out whether a rank was killed, and starts processes that replace such ranks.
  Recovery& recovery() { return *recovery_; }

  // Creates a group. Collective over `ranks`, which are in the order of the new group; blocks.
  std::shared_ptr<Group> create_group(std::span<const int> ranks);
  // Makes this rank leave `group`. The group's memory is freed with its last owner; its communicator is kept until the
  // engine closes, since freeing it is collective. Local; does nothing in a forked child.
  void close_group(Group& group);
  // Creates a mailbox. Collective over all ranks; blocks.
  std::shared_ptr<mpi::Mailbox> create_mailbox();

  // Allocates memory in which the collectives of `group` need no copies: each rank gets `num_bytes`, zeroed and
  // page-aligned. The memory is unmapped when release() was called and the result is destroyed. Collective over
  // `group`; blocks.
  std::shared_ptr<const Allocation> allocate(Group& group, std::size_t num_bytes);
  // Makes the group's collectives no longer use in place the memory that allocate() gave at `memory`. Local.
  void release(Group& group, std::span<const std::byte> memory);
  // Allocates `num_bytes` that all ranks of a node share: one block on each node, zeroed and page-aligned, which forked
  // children inherit. Collective over `group`; blocks.
  std::shared_ptr<const Mapping> allocate_shared(Group& group, std::size_t num_bytes);

  // These run in Driver; see there.
  std::shared_ptr<Operation> submit(PreparedCall prepared) { return driver_->submit(std::move(prepared)); }
  bool wait(Operation& operation, std::chrono::microseconds timeout) { return driver_->wait(operation, timeout); }
  void poll() { driver_->poll(); }

  // Each makes an engine that replaces this one, over the communicator that Recovery returns: a communicator of the
  // ranks that live (recover(), see Recovery::agree_on_living), or of these and a new process (admit(), and join() in
  // the new process). Null if Recovery returns none. Collective over the ranks of the new engine, blocks.
  std::shared_ptr<Engine> recover();
  std::shared_ptr<Engine> admit();
  std::shared_ptr<Engine> join();

  // Tells the peers that this rank takes part in no further calls, and finalises MPI if the engine initialised it.
  // Operations in flight fail. Collective; in a forked child it does nothing.
  void close();

 private:
  Engine(const EngineOptions& options, mpi::Communicator world,
         std::optional<mpi::Communicator> control = std::nullopt);
  void share_status(const AllGather& all_gather);
  void start_monitor(const AllGather& all_gather);
  void begin_set_up();
  void leave(Driver::Pause& pause, const std::shared_ptr<Group>& group);
  std::shared_ptr<Engine> continue_over(mpi::Communicator members);
  void retire();
  AllGather gather_over(const mpi::Communicator& communicator) const;

  EngineOptions options_;
  mpi::Communicator world_;
  const pid_t owner_pid_;
  std::unique_ptr<Node> node_;
  std::vector<Mapping> status_memory_;  // pages of the ranks on this node, in their order
  std::vector<StatusPage*> status_of_rank_;  // null for ranks on other nodes
  const std::shared_ptr<Counters> counters_ = std::make_shared<Counters>();  // shared, since groups may live longer
  std::uint64_t num_groups_ = 0;
  std::vector<std::shared_ptr<mpi::Mailbox>> mailboxes_;
  // These two are used only while the driver is paused.
  std::vector<mpi::Communicator> left_communicators_;  // communicators of closed groups, still to be freed
  std::vector<std::shared_ptr<Group>> abandoned_groups_;  // closed groups into whose memory MPI may still write

  // Each of these uses the ones before it, and is destroyed before them.
  std::unique_ptr<Driver> driver_;
  std::unique_ptr<ControlChannel> control_;
  std::unique_ptr<StallMonitor> monitor_;
  std::unique_ptr<Recovery> recovery_;
};

}  // namespace dtrain
