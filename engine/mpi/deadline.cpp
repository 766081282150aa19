// SPDX-License-Identifier: Apache-2.0
#include "mpi/deadline.hpp"

#include <unistd.h>

#include <condition_variable>
#include <csignal>
#include <mutex>
#include <utility>

namespace dtrain::mpi {

namespace {

constexpr std::chrono::milliseconds between_looks(20);

}  // namespace

Deadline::Deadline(std::string what, std::chrono::milliseconds limit, std::function<bool()> counts)
    : thread_([what = std::move(what), counts = std::move(counts), limit](const std::stop_token& over) {
        std::mutex mutex;
        std::condition_variable_any ending;
        std::unique_lock lock(mutex);
        // Counts looks, not the clock's time, so that a process that was stopped meanwhile still has its whole time.
        for (auto left = limit; !over.stop_requested();
             ending.wait_for(lock, over, between_looks, [] { return false; })) {
          if (!counts()) continue;
          left -= between_looks;
          if (left.count() > 0) continue;
          const std::string line = "distributed_trainer: process " + std::to_string(getpid()) +
                                   " ends so that the others can continue: MPI is stuck in " + what + "\n";
          static_cast<void>(!write(STDERR_FILENO, line.data(), line.size()));
          kill(getpid(), SIGKILL);
        }
      }) {}

}  // namespace dtrain::mpi
