// SPDX-License-Identifier: Apache-2.0
// The least that an all_reduce in shared memory can cost: between two barriers, every process adds its part of all
// processes' blocks and writes it to all of them. Built by floor.py with -march=native.
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace {

struct alignas(64) Arrived {
  std::atomic<std::uint64_t> count;
};

void barrier(Arrived* arrived, int rank, int size) {
  const std::uint64_t target = arrived[rank].count.load(std::memory_order_relaxed) + 1;
  arrived[rank].count.store(target, std::memory_order_release);
  for (int peer = 0; peer < size; ++peer) {
    for (int spins = 0; arrived[peer].count.load(std::memory_order_acquire) < target; ++spins) {
      if (spins > 1000) sched_yield();
    }
  }
}

}  // namespace

// `memory`: `size` lines for the barrier, then `size` blocks of `count` floats; count is a multiple of 16 * size.
extern "C" void floor_all_reduce(std::byte* memory, int rank, int size, std::size_t count) {
  auto* const arrived = reinterpret_cast<Arrived*>(memory);
  auto* const blocks = reinterpret_cast<float*>(memory + sizeof(Arrived) * static_cast<std::size_t>(size));
  constexpr std::size_t piece = 2048;  // fits the first-level cache
  const std::size_t start = count / static_cast<std::size_t>(size) * static_cast<std::size_t>(rank);
  const std::size_t stop = start + count / static_cast<std::size_t>(size);
  alignas(64) float sum[piece];
  barrier(arrived, rank, size);
  for (std::size_t at = start; at < stop; at += piece) {
    const std::size_t n = std::min(piece, stop - at);
    std::memcpy(sum, blocks + at, n * sizeof(float));
    for (int peer = 1; peer < size; ++peer) {
      const float* const block = blocks + count * static_cast<std::size_t>(peer) + at;
      for (std::size_t i = 0; i < n; ++i) sum[i] += block[i];
    }
    for (int peer = 0; peer < size; ++peer) {
      std::memcpy(blocks + count * static_cast<std::size_t>(peer) + at, sum, n * sizeof(float));
    }
  }
  barrier(arrived, rank, size);
}
