// SPDX-License-Identifier: Apache-2.0
// Pages in which each rank publishes its state, in memory that the other ranks on its node can read even when it is
// stopped or dead.
#pragma once

#include <sys/types.h>

#include <array>
#include <atomic>
#include <bit>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <iosfwd>
#include <string>
#include <string_view>
#include <thread>
#include <type_traits>
#include <vector>

#include "collectives/local_group.hpp"

namespace dtrain {

// A value with one writer at a time and any number of readers, in any process. The writer never waits. A reader waits
// for the end of a write, at most some 20 ms: if the writer has died or was stopped in the middle of it, the reader
// gets a mixture of two values.
template <class T>
class Published {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) % sizeof(std::uint64_t) == 0);
  using Words = std::array<std::uint64_t, sizeof(T) / sizeof(std::uint64_t)>;

 public:
  void write(const T& value) {
    const auto words = std::bit_cast<Words>(value);
    const std::uint32_t version = version_.load(std::memory_order_relaxed);
    version_.store(version + 1, std::memory_order_relaxed);
    std::atomic_thread_fence(std::memory_order_release);
    for (std::size_t i = 0; i < words.size(); ++i) words_[i].store(words[i], std::memory_order_relaxed);
    version_.store(version + 2, std::memory_order_release);
  }

  T read() const {
    Words words{};
    for (int attempt = 0; attempt < 200; ++attempt) {
      // The system has taken the writer off its core: reading again does not help until it runs.
      if (attempt >= 100) std::this_thread::sleep_for(std::chrono::microseconds(100));
      const std::uint32_t before = version_.load(std::memory_order_acquire);
      for (std::size_t i = 0; i < words.size(); ++i) words[i] = words_[i].load(std::memory_order_relaxed);
      std::atomic_thread_fence(std::memory_order_acquire);
      if (before % 2 == 0 && version_.load(std::memory_order_relaxed) == before) break;
    }
    return std::bit_cast<T>(words);
  }

 private:
  std::atomic<std::uint32_t> version_;
  std::array<std::atomic<std::uint64_t>, sizeof(T) / sizeof(std::uint64_t)> words_;
};

// The last call that the user's script made to the trainer; all zeros before the first. Times are milliseconds of the
// system's clock.
struct Place {
  std::array<char, 32> call;
  std::array<char, 256> file;  // the end of the file's path
  std::int64_t since_ms;       // when the call began, or when it returned
  std::int32_t line;
  std::int32_t is_inside;
};

// The call that a rank waits for; all zeros while it does not wait.
struct Wait {
  Call call;
  std::int64_t since_ms;
};

enum class End : std::uint32_t {
  none,
  closed,      // in good order
  failed,      // with an exception, which the rank has printed
  terminated,  // by SIGTERM, which launchers send to all ranks
};

// Status page of a process, zeros at first. Only the owner writes to it, except to the fields marked otherwise.
struct StatusPage {
  Doorbell doorbell;
  std::atomic<std::int64_t> beat_ms;  // time of the machine's clock at the owner's last look at the others
  std::atomic<End> end;
  // Number of times that others reported a wait for this rank. Any process writes it.
  std::atomic<std::uint32_t> num_wanted;
  Published<Place> place;
  Published<Wait> wait;
};

// Where a process runs, in terms that mean the same to every process.
struct Origin {
  std::array<char, 64> host;
  std::uint64_t pid_namespace;
  std::int64_t pid;

  static Origin own();
};

enum class State : std::int64_t { running, stopped, dead, ended, silent };

// State of a rank as another rank, or the rank itself, saw it.
struct Snapshot {
  std::int64_t rank;
  State state;
  Place place;
  Wait wait;

  bool waits() const { return state == State::running && wait.since_ms != 0; }
};

std::int64_t system_now_ms();
std::int64_t machine_now_ms();  // the clock that all processes of a machine share and nobody sets

// Asks the system for the state of a process; returns `silent` if the system does not know.
State state_of_process(pid_t pid);

// Returns the state in the text of /proc/<pid>/stat.
State state_in_stat(std::string_view text);

// Returns the number of processes of this process's memory cgroup that the out-of-memory killer has ended; -1 if it
// cannot be read.
int num_killed_for_memory();

// Returns the path in the line of /proc/<pid>/cgroup in which `start` precedes it; empty if there is no such line.
std::string cgroup_path(std::istream& cgroups, std::string_view start);

// Returns the number of killed processes in the text of a cgroup's memory.events or memory.oom_control; -1 if it is not
// there.
int num_killed_in(std::istream& counts);

// Returns one sentence about a stall. Ranks that see the same write the same sentence. `snapshots` are of the ranks of
// a group, some of which wait; `origins` are of all ranks. `note` is appended to the state of dead ranks.
std::string describe_stall(const std::vector<Snapshot>& snapshots, const std::vector<Origin>& origins,
                           const std::string& note);

// Returns the last call of each rank: "ranks 0 and 2: train_step, train.py:31; rank 1: evaluate, train.py:40".
std::string describe_places(const std::vector<Snapshot>& snapshots);

}  // namespace dtrain
