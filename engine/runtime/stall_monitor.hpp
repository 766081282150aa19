// SPDX-License-Identifier: Apache-2.0
// Reports what a rank waits for when the wait takes long: which ranks are missing, where they are, since when and why.
//
// Each process has a thread for it, which needs neither the Python interpreter nor the thread that drives the
// collectives. It reads the other ranks' status pages and the system's data about their processes, and asks ranks on
// other nodes by the engine's control messages. All ranks of a group that wait see the same state and report it in the
// same words.
#pragma once

#include <atomic>
#include <chrono>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "collectives/group.hpp"
#include "memory/segment.hpp"
#include "runtime/status.hpp"

namespace dtrain {

class StallMonitor {
 public:
  // Calls that the monitor's thread makes to the engine.
  struct Hooks {
    // Makes rank `rank` of another node report its own and its neighbours' state; `is_wanted`: others wait for it.
    std::function<void(int rank, bool is_wanted)> ask;
    // Ends all waits of this process with an error.
    std::function<void(const std::string& reason)> fail;
    // Begins the recovery from a death; null if the other ranks do not survive one. Calls no MPI function.
    std::function<void()> lose_rank = {};
  };

  // `pages`: the status page of each rank, null for ranks on other nodes.
  StallMonitor(int rank, std::vector<Origin> origins, std::vector<StatusPage*> pages, Hooks hooks);
  ~StallMonitor();
  StallMonitor(const StallMonitor&) = delete;
  StallMonitor& operator=(const StallMonitor&) = delete;

  // Sets the limits: a wait is reported before it has lasted `report_seconds`; a rank that is silent for
  // `timeout_seconds` ends the job. None leaves a limit unchanged.
  void set_limits(std::optional<double> report_seconds, std::optional<double> timeout_seconds);
  // Sets the signal that makes this process write its stack to a pipe when its main thread receives it, and the pipe's
  // end to read from, which does not block.
  void set_stack_signal(int signal, int pipe) {
    stack_pipe_ = pipe;
    stack_signal_ = signal;
  }

  // Sets the limits and the signal that `other` has.
  void take_settings(const StallMonitor& other);

  void note_call(const std::string& call, const std::string& file, int line);
  void note_return();
  // Stores that the exception that ends this rank was printed, so that nobody need report its death.
  void note_failure();

  // Marks, while it lives, that a thread of this process waits for `call` of a group of `ranks`.
  class Waiting {
   public:
    Waiting(StallMonitor& monitor, std::span<const int> ranks, const Call& call) : monitor_(monitor) {
      monitor.begin_wait(ranks, call);
    }
    ~Waiting() { monitor_.end_wait(); }
    Waiting(const Waiting&) = delete;
    Waiting& operator=(const Waiting&) = delete;

   private:
    StallMonitor& monitor_;
  };

  // Describes the last call of each rank in words. Asks ranks on other nodes, which takes up to `report_seconds` / 5.
  // Any thread.
  std::string describe_places();
  // Whether some rank is dead, stopped or silent. Asks ranks on other nodes, which takes up to `report_seconds` / 5.
  // Any thread.
  bool is_rank_lost();

  // Returns the state of this rank, and of those neighbours that cannot report their own. Any thread.
  std::vector<Snapshot> seen_here();
  // Stores the state of a rank on another node, as a rank there saw it. Any thread.
  void hear(const Snapshot& seen);
  void note_wanted();

  // Returns all ranks except those of this machine that have died. Any thread.
  std::vector<int> living();
  // Whether all ranks are on this machine, and each living one except this is in a set-up. Any thread.
  bool are_all_in_set_ups();

  // Marks that this rank has ended in good order, ends the monitor's thread and closes its descriptors. Local.
  void close();

 private:
  struct Neighbour {
    int rank;
    StatusPage* page;
    Descriptor process;  // none if the process cannot be watched
    bool is_dead = false;
    bool is_gone = false;  // it had died before it could be watched
  };

  void begin_wait(std::span<const int> ranks, const Call& call);
  void end_wait();
  void run();
  void look();
  void look_at_wait();
  std::vector<int> everyone() const;
  std::vector<Snapshot> collect(std::span<const int> ranks);
  Snapshot see(const Neighbour& neighbour) const;
  void report_dead();
  void lose_dead();
  bool survives_deaths() const { return hooks_.lose_rank != nullptr; }
  void end_silent(const std::vector<Snapshot>& snapshots, const std::string& text);
  void show_stack();
  void show_frames();
  void say(const std::string& text) const;
  std::string memory_note() const;

  const int rank_;
  const std::vector<Origin> origins_;
  const std::vector<StatusPage*> pages_;
  const Hooks hooks_;
  StatusPage& own_;
  std::vector<Neighbour> neighbours_;
  const int killed_for_memory_at_start_;
  Descriptor wake_;
  std::atomic<bool> stopping_ = false;
  std::atomic<int> stack_signal_ = 0;  // 0 for none
  std::atomic<int> stack_pipe_ = -1;
  std::atomic<double> report_seconds_ = 5;
  std::atomic<double> timeout_seconds_ = 600;

  std::mutex collect_mutex_;  // held by the thread that asks other nodes
  std::mutex mutex_;  // guards the next three fields
  int num_waits_ = 0;
  std::vector<int> waited_for_;  // ranks of the group of the last wait
  std::vector<std::optional<Snapshot>> heard_;

  // Fields that only the monitor's thread uses.
  std::int64_t wait_reported_ = 0;  // since_ms of the wait that `last_text_` is about
  std::string last_text_;
  std::string seen_text_;  // text of the last look
  double patience_seconds_ = 0;  // length of a wait that is reported although no rank is lost
  std::optional<std::int64_t> silent_since_ms_;
  std::uint32_t wanted_seen_ = 0;
  std::int64_t stack_shown_for_ms_ = -1;
  std::string frames_;  // read from the pipe, without a whole line yet
  std::optional<std::int64_t> ending_since_ms_;
  std::unique_ptr<std::thread> thread_;
};

}  // namespace dtrain
