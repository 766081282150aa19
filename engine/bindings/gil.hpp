// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <Python.h>
#include <unistd.h>

namespace dtrain {

// Lets other Python threads run while it lives. nanobind's guard would end the process when a daemon thread wants the
// lock back after Python's end: CPython before 3.14 ends such a thread by unwinding it, and a destructor that throws
// means std::terminate. This guard lets the thread sleep until the process is gone, as CPython does from 3.14 on.
class GilRelease {
 public:
  GilRelease() = default;
  GilRelease(const GilRelease&) = delete;
  GilRelease& operator=(const GilRelease&) = delete;

  ~GilRelease() noexcept(false) {
    try {
      PyEval_RestoreThread(state_);
    } catch (...) {  // pthread_exit's unwinding, which must not be swallowed
      for (;;) pause();
    }
  }

 private:
  PyThreadState* state_ = PyEval_SaveThread();
};

}  // namespace dtrain
