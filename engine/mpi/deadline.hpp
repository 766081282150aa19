// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <functional>
#include <string>
#include <thread>

namespace dtrain::mpi {

// While it lives, this thread calls what of MPI may never come back once a rank has died: what waits for ranks that have
// left, and what closes a broken connection while another thread reads from it (Open MPI 5.0). If that lasts for too long
// this process kills itself, and the others go on without it.
class Deadline {
 public:
  static constexpr std::chrono::milliseconds longest{5000};  // well below what others wait for this rank

  // For what all of them call: they end one after the other, the last rank first, since that another has ended may be
  // what MPI waits for.
  static std::chrono::milliseconds longest_of(int rank, int size) {
    return longest + longest * (size - 1 - rank) / (2 * size);
  }

  // `what`: that is being done. `counts`: whether time does at the moment.
  explicit Deadline(
      std::string what, std::chrono::milliseconds limit = longest, std::function<bool()> counts = [] { return true; });

 private:
  std::jthread thread_;
};

}  // namespace dtrain::mpi
