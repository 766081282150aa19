// SPDX-License-Identifier: Apache-2.0
// Says what a rank waits for when that takes long: who is missing, where, since when and why.
//
// Each process has a thread for it, which needs neither the Python interpreter nor the thread that drives the
// collectives. It looks at the other ranks' status pages and at what the system says of their processes, and asks ranks
// on other nodes by the engine's control messages. All ranks of a group that wait see the same, and say the same.
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

class Watch {
 public:
  // What it needs of the engine. Called by its thread.
  struct Engine {
    // Has rank `rank` of another node say how it and its neighbours are; `is_wanted`: others wait for it.
    std::function<void(int rank, bool is_wanted)> ask;
    // Ends all waits of this process with an error.
    std::function<void(const std::string& reason)> fail;
    // Where ranks may die and the others go on, else none: begins that. Calls nothing of MPI's.
    std::function<void()> lose_rank = {};
  };

  // `pages`: of each rank, null for those on other nodes.
  Watch(int rank, std::vector<Origin> origins, std::vector<StatusPage*> pages, Engine engine);
  ~Watch();
  Watch(const Watch&) = delete;
  Watch& operator=(const Watch&) = delete;

  // A wait is reported before it has lasted `report` seconds. A rank that is silent for `timeout` ends the job.
  void set_limits(std::optional<double> report_seconds, std::optional<double> timeout_seconds);
  // What makes this process write its stack, sent to its main thread; 0 for none.
  void set_stack_signal(int signal) { stack_signal_ = signal; }

  // What those two have set in another one.
  void take_settings(const Watch& other);

  void note_call(const std::string& call, const std::string& file, int line);
  void note_return();
  // The exception that ends this rank was printed, so nobody need tell of its death.
  void note_failure();

  // While it lives, a thread of this process waits for `call` of a group of `ranks`.
  class Waiting {
   public:
    Waiting(Watch& watch, std::span<const int> ranks, const Call& call) : watch_(watch) { watch.begin_wait(ranks, call); }
    ~Waiting() { watch_.end_wait(); }
    Waiting(const Waiting&) = delete;
    Waiting& operator=(const Waiting&) = delete;

   private:
    Watch& watch_;
  };

  // The last call of each rank, in words: asks other nodes, which takes up to `report_seconds` / 5. Any thread.
  std::string describe_places();
  // Whether some rank is dead, stopped or silent. Likewise.
  bool is_rank_lost();

  // What this rank knows of itself, and of its neighbours that can't speak. Any thread.
  std::vector<Snapshot> seen_here();
  // Of a rank on another node, as one there has seen it. Any thread.
  void hear(const Snapshot& seen);
  void note_wanted();

  // All ranks, but those of this machine that have died. Any thread.
  std::vector<int> living();
  // Whether they are all on this machine, and in a set-up. Any thread.
  bool are_all_in_set_ups();

  // Local. This rank has ended in good order; the thread ends.
  void close();

 private:
  struct Neighbour {
    int rank;
    StatusPage* page;
    Descriptor process;  // none where it can't be watched
    bool is_dead = false;
    bool is_gone = false;  // before it could be watched
  };

  void begin_wait(std::span<const int> ranks, const Call& call);
  void end_wait();
  void run();
  void look();
  void look_at_wait();
  std::vector<int> everyone() const;
  std::vector<Snapshot> collect(std::span<const int> ranks);
  Snapshot see(const Neighbour& neighbour) const;
  void tell_of_dead();
  void lose_dead();
  bool survives_deaths() const { return engine_.lose_rank != nullptr; }
  void end_silent(const std::vector<Snapshot>& snapshots, const std::string& text);
  void show_stack();
  void say(const std::string& text) const;
  std::string memory_note() const;

  const int rank_;
  const std::vector<Origin> origins_;
  const std::vector<StatusPage*> pages_;
  const Engine engine_;
  StatusPage& own_;
  std::vector<Neighbour> neighbours_;
  const int killed_for_memory_at_start_;
  Descriptor wake_;
  std::atomic<bool> stopping_ = false;
  std::atomic<int> stack_signal_ = 0;
  std::atomic<double> report_seconds_ = 5;
  std::atomic<double> timeout_seconds_ = 600;

  std::mutex collect_mutex_;  // one asks at a time
  std::mutex mutex_;          // of what follows
  int num_waits_ = 0;
  std::vector<int> waited_for_;  // ranks of the group
  std::vector<std::optional<Snapshot>> heard_;

  // Of the thread alone.
  std::int64_t wait_reported_ = 0;  // since_ms of the wait that `last_text_` is about
  std::string last_text_;
  std::string seen_text_;  // at the last look
  double patience_seconds_ = 0;  // with ranks that merely take long
  std::optional<std::int64_t> silent_since_ms_;
  std::uint32_t wanted_seen_ = 0;
  std::int64_t stack_shown_for_ms_ = -1;
  std::optional<std::int64_t> ending_since_ms_;
  std::unique_ptr<std::thread> thread_;
};

}  // namespace dtrain
