// SPDX-License-Identifier: Apache-2.0
#include "mpi/deadline.hpp"

#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <functional>
#include <string>
#include <thread>

#include "test.hpp"

namespace dtrain::mpi {
namespace {

using namespace test;
using std::chrono::milliseconds;

// Returns the signal that ends a process that is busy for 300 ms under a deadline, or 0.
int end_of(milliseconds limit, const std::function<bool()>& counts, bool is_disarmed) {
  const pid_t child = fork();
  if (child == 0) {
    {
      const Deadline deadline("this test", limit, counts);
      if (!is_disarmed) std::this_thread::sleep_for(milliseconds(300));
    }
    if (is_disarmed) std::this_thread::sleep_for(milliseconds(300));
    _exit(0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return WIFSIGNALED(status) ? WTERMSIG(status) : WEXITSTATUS(status);
}

const Test deadlines("deadline: a process that takes too long kills itself", Runs::alone, [] {
  const auto always = [] { return true; };
  const auto never = [] { return false; };
  expect_equal(end_of(milliseconds(60), always, false), SIGKILL, "too long");
  expect_equal(end_of(milliseconds(60), always, true), 0, "in time");
  expect_equal(end_of(milliseconds(60), never, false), 0, "time that does not count");
  expect_equal(end_of(milliseconds(60000), always, false), 0, "below the limit");
});

}  // namespace
}  // namespace dtrain::mpi
