// SPDX-License-Identifier: Apache-2.0
#include "processes.hpp"

#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <new>
#include <vector>

#include "memory/futex.hpp"
#include "test.hpp"

namespace dtrain::test {
namespace {

struct Board {  // in memory that the children inherit
  static constexpr std::size_t bytes_per_rank = 8192;

  std::atomic<std::uint32_t> num_arrived;
  std::byte messages[16][bytes_per_rank];

  // Each call of a rank waits for its next multiple of `size`; at most `size` ranks can have arrived at one barrier.
  void barrier(std::uint32_t size, std::uint32_t& round) {
    const std::uint32_t target = ++round * size;
    if (num_arrived.fetch_add(1) + 1 == target) futex_wake_all(num_arrived);
    for (std::uint32_t now = num_arrived; now < target; now = num_arrived) {
      futex_wait(num_arrived, now, std::chrono::microseconds(100000));
    }
  }
};

void run_rank(Board& board, int rank, int size, const std::function<void(int, const AllGather&)>& body) {
  std::uint32_t round = 0;
  const auto gather = [&](std::span<const std::byte> mine, std::span<std::byte> all) {
    const auto num_ranks = static_cast<std::uint32_t>(size);
    expect(mine.size() <= Board::bytes_per_rank && all.size() == mine.size() * num_ranks, "sizes of an all_gather");
    std::ranges::copy(mine, board.messages[rank]);
    board.barrier(num_ranks, round);
    for (std::uint32_t peer = 0; peer < num_ranks; ++peer) {
      std::memcpy(all.data() + peer * mine.size(), board.messages[peer], mine.size());
    }
    board.barrier(num_ranks, round);
  };
  body(rank, gather);
}

}  // namespace

void on_processes(int size, const std::function<void(int rank, const AllGather& all_gather)>& body,
                  const std::function<void(int rank)>& isolate) {
  void* const memory = mmap(nullptr, sizeof(Board), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  Board& board = *new (memory) Board{};
  std::vector<pid_t> children;
  for (int rank = 0; rank < size; ++rank) {
    const pid_t child = fork();
    if (child == 0) {
      // A new process namespace holds only children made later, hence one more fork.
      in_child([&] {
        if (isolate) isolate(rank);
        in_child([&] { run_rank(board, rank, size, body); });
      });
      _exit(num_failures() > 0 ? 1 : 0);
    }
    children.push_back(child);
  }
  for (const pid_t child : children) {
    int status = 0;
    waitpid(child, &status, 0);
    expect(status == 0, "a rank failed");
  }
  munmap(memory, sizeof(Board));
}

}  // namespace dtrain::test
