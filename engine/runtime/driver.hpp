// SPDX-License-Identifier: Apache-2.0
// Drives the collectives of this process: takes the calls that are submitted, and advances them.
//
// On one node without a spare core, the threads that wait do the work: an engine thread would only take turns with
// them. If there are cores to spare, or if MPI must be called while nobody waits, there is an engine thread, and a
// thread that waits helps it, since to wake it takes longer than a small operation. One thread at a time drives and
// makes MPI calls. A wait spins briefly and then sleeps, since ranks may outnumber cores.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <chrono>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "collectives/group.hpp"
#include "collectives/prepared_call.hpp"

namespace dtrain {

class Driver {
 public:
  struct Options {
    bool has_thread = false;    // an engine thread drives too
    bool waiters_spin = false;  // there is a core for each rank that waits
  };

  // Calls that a driver makes to its engine, in a thread that is about to sleep and holds no lock.
  struct Hooks {
    std::function<void()> look_for_deaths;  // called by threads that wait, and by the engine thread
    std::function<void()> answer_control;   // called only by the engine thread
  };

  // `doorbell`: this rank's; it outlives the driver. The thread starts with start_thread().
  Driver(Doorbell& doorbell, const Options& options, Hooks hooks);
  ~Driver();
  Driver(const Driver&) = delete;
  Driver& operator=(const Driver&) = delete;

  bool has_thread() const { return options_.has_thread; }
  // Starts the engine thread, if the options ask for one.
  void start_thread();
  // Blocks until the engine thread has ended. In a forked child, which does not have the thread, only drops the handle.
  void stop_thread();

  // Queues a call, and returns at once. Any thread.
  std::shared_ptr<Operation> submit(PreparedCall prepared);
  // Waits until `operation` is done, at most `timeout`; returns whether it is. Any thread.
  bool wait(Operation& operation, std::chrono::microseconds timeout);
  // Advances what can advance without waiting, unless there is an engine thread to do so. Any thread.
  void poll();
  // Waits until no collective is queued or in flight. The set-up of groups and memory calls MPI from the caller's
  // thread and blocks, so no collective may be left that a peer waits for meanwhile.
  void drain();
  // Wakes the threads that sleep until an operation is done. Any thread.
  void wake() { doorbell_.ring(); }

  // Makes the driver refuse further calls and set-ups; returns whether it took them until now. Any thread.
  bool close();
  // Throws if the driver is closed, or if a rank was lost. Any thread.
  void require_open();

  // Stores that a rank was killed: from now on, the thread that drives fails all groups. Any thread. Takes no lock and
  // calls no MPI function, so that the stall monitor cannot get stuck in it.
  void lose_rank();
  bool has_lost_rank() const { return has_lost_rank_; }

  // Let the collectives of `group` use memory in place, or no longer. Any thread.
  void add_memory(Group& group, std::shared_ptr<const Allocation> allocation);
  void remove_memory(Group& group, std::span<const std::byte> own_block);

  // Keeps all threads from driving while it lives. Its holder may look at groups and end them, and call MPI.
  class Pause {
   public:
    // Blocks until nobody drives.
    explicit Pause(Driver& driver) : driver_(driver), lock_(driver.drive_mutex_) {}
    // Does not block. Converts to false, and does not pause, if a thread drives now.
    Pause(Driver& driver, std::try_to_lock_t how) : driver_(driver), lock_(driver.drive_mutex_, how) {}
    explicit operator bool() const { return lock_.owns_lock(); }

    const std::vector<std::shared_ptr<Group>>& groups() const { return driver_.groups_; }
    void add(std::shared_ptr<Group> group) { driver_.groups_.push_back(std::move(group)); }
    // Makes this rank leave `group` with an error: its operations, and those of the other ranks, fail with `reason`.
    void fail(Group& group, const std::string& reason) { driver_.fail(group, reason); }
    // Fails all groups if a rank was lost.
    void fail_all();
    // Makes this rank leave `group` in good order. Its operations fail, and the driver drops the group.
    void remove(Group& group);
    // Drops all groups without any change to them.
    void forget_groups() { driver_.groups_.clear(); }

   private:
    Driver& driver_;
    std::unique_lock<std::mutex> lock_;
  };

 private:
  bool progress();
  bool needs_polling();
  void take_inbox();
  bool fail_groups();
  void fail(Group& group, const std::string& reason);
  void run();
  void sleep(std::chrono::microseconds timeout);

  Doorbell& doorbell_;
  const Options options_;
  const Hooks hooks_;
  const pid_t owner_pid_;

  std::mutex inbox_mutex_;  // guards the fields up to drive_mutex_, and the memory that groups use in place
  std::deque<std::pair<Group*, std::shared_ptr<Operation>>> inbox_;
  bool is_closed_ = false;

  std::mutex drive_mutex_;  // held by the thread that drives; taken before inbox_mutex_
  std::vector<std::shared_ptr<Group>> groups_;

  std::atomic<bool> has_lost_rank_ = false;
  std::atomic<bool> stopping_ = false;
  std::unique_ptr<std::thread> thread_;
};

}  // namespace dtrain
