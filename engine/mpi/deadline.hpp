// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <functional>
#include <string>
#include <thread>

namespace dtrain::mpi {

// Ends this process if a call of MPI never returns. While a Deadline lives, the thread that made it makes calls that
// may never return once a rank has died: calls that wait for ranks that have left, and calls that close a broken
// connection while another thread reads from it (Open MPI 5.0). If that lasts too long, this process kills itself, so
// that the others can continue without it.
class Deadline {
 public:
  static constexpr std::chrono::milliseconds longest{5000};  // well below the time that others wait for this rank

  // Limit for a call that all ranks make. They end one after the other, the last rank first, since the end of one rank
  // may be what lets MPI return on the others.
  static std::chrono::milliseconds longest_of(int rank, int size) {
    return longest + longest * (size - 1 - rank) / (2 * size);
  }

  // `what` names the call in the message. `counts` returns whether time counts at the moment.
  explicit Deadline(
      std::string what, std::chrono::milliseconds limit = longest, std::function<bool()> counts = [] { return true; });

 private:
  std::jthread thread_;
};

}  // namespace dtrain::mpi
