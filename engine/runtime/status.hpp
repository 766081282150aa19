// SPDX-License-Identifier: Apache-2.0
// What each rank tells the others on its node of itself, in memory that they can read when it is stopped or dead.
#pragma once

#include <sys/types.h>

#include <array>
#include <atomic>
#include <bit>
#include <cstdint>
#include <cstring>
#include <iosfwd>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "collectives/local_group.hpp"

namespace dtrain {

// A value with one writer at a time and any readers, in any process. Nobody waits: who reads while a writer has died or
// was stopped in the middle gets a mixture.
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
    for (int attempt = 0; attempt < 1000; ++attempt) {
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

// The last call that the user's script made of the trainer; all zeros before the first. Times are milliseconds of the
// system's clock.
struct Place {
  std::array<char, 32> call;
  std::array<char, 256> file;  // the end of its path
  std::int64_t since_ms;       // when it was called, or has returned
  std::int32_t line;
  std::int32_t is_inside;
};

// What a rank waits for; all zeros while it waits for nothing.
struct Wait {
  Call call;
  std::int64_t since_ms;
};

enum class End : std::uint32_t {
  none,
  closed,      // in good order
  failed,      // with an exception, which it has printed
  terminated,  // by SIGTERM, as launchers send it to all ranks
};

// One per process, zeros at first. The owner writes, but for what says otherwise.
struct StatusPage {
  Doorbell doorbell;
  std::atomic<std::int64_t> beat_ms;      // of the machine's clock: when the owner last looked around
  std::atomic<End> end;
  std::atomic<std::uint32_t> num_wanted;  // any process: others wait for this rank
  Published<Place> place;
  Published<Wait> wait;
};

// Of a process; the same for all who ask.
struct Origin {
  std::array<char, 64> host;
  std::uint64_t pid_namespace;
  std::int64_t pid;

  static Origin own();
};

enum class State : std::int64_t { running, stopped, dead, ended, silent };

// A rank as it was seen.
struct Snapshot {
  std::int64_t rank;
  State state;
  Place place;
  Wait wait;

  bool waits() const { return state == State::running && wait.since_ms != 0; }
};

std::int64_t system_now_ms();
std::int64_t machine_now_ms();  // one clock for all processes of a machine, which nobody sets

// What the system says of a process; `silent` where that is nothing.
State state_of_process(pid_t pid);

// The same of the text of /proc/<pid>/stat.
State state_in_stat(std::string_view text);

// How many processes of this one's memory cgroup the out-of-memory killer has ended; -1 if that can't be read.
int num_killed_for_memory();

// The path in the line of /proc/<pid>/cgroup that has `start` before it; empty if there is none.
std::string cgroup_path(std::istream& cgroups, std::string_view start);

// The same number in the text of a cgroup's memory.events or memory.oom_control; -1 if it is not there.
int num_killed_in(std::istream& counts);

// One sentence about a stall, which all ranks that see the same put in the same words. `snapshots` are of the ranks of a
// group, some of which wait; `origins` of all ranks. `note` is about those that are dead.
std::string describe_stall(const std::vector<Snapshot>& snapshots, const std::vector<Origin>& origins,
                           const std::string& note);

// "ranks 0 and 2: train_step, train.py:31; rank 1: evaluate, train.py:40": the last call of each.
std::string describe_places(const std::vector<Snapshot>& snapshots);

}  // namespace dtrain
