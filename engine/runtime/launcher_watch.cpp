// SPDX-License-Identifier: Apache-2.0
#include "runtime/launcher_watch.hpp"

#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstdio>
#include <string>
#include <system_error>
#include <thread>
#include <utility>

namespace dtrain {

namespace {

void wait_for_end(pid_t pid, const Descriptor& process) {
  if (process) {
    pollfd gone{.fd = process.get(), .events = POLLIN, .revents = 0};
    while (poll(&gone, 1, -1) < 0 && errno == EINTR) {}
    return;
  }
  while (kill(pid, 0) == 0 || errno != ESRCH) std::this_thread::sleep_for(std::chrono::seconds(1));
}

}  // namespace

void end_with_launcher(pid_t launcher) {
  Descriptor process(static_cast<int>(syscall(SYS_pidfd_open, launcher, 0)));
  if (!process && errno != ENOSYS)
    throw std::system_error(errno, std::generic_category(), "pidfd_open of process " + std::to_string(launcher));
  // The thread lives as long as the process; a forked child does not have the thread.
  std::thread watcher([fd = std::move(process), launcher] {
    wait_for_end(launcher, fd);
    std::fprintf(stderr, "distributed_trainer: the launcher (process %d) is gone, so this rank ends\n", launcher);
    _exit(1);
  });
  pthread_setname_np(watcher.native_handle(), "dtrain-launcher");
  watcher.detach();
}

}  // namespace dtrain
