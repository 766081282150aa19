// SPDX-License-Identifier: Apache-2.0
#include "runtime/launcher_watch.hpp"

#include <poll.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <string>
#include <system_error>
#include <thread>
#include <utility>

namespace dtrain {

void end_with_launcher(pid_t launcher) {
  Descriptor process(static_cast<int>(syscall(SYS_pidfd_open, launcher, 0)));
  if (!process)
    throw std::system_error(errno, std::generic_category(), "pidfd_open of process " + std::to_string(launcher));
  // The thread lives as long as the process; a forked child does not have the thread.
  std::thread watcher([fd = std::move(process), launcher] {
    pollfd gone{.fd = fd.get(), .events = POLLIN, .revents = 0};
    while (poll(&gone, 1, -1) < 0 && errno == EINTR) {}
    std::fprintf(stderr, "distributed_trainer: the launcher (process %d) is gone, so this rank ends\n", launcher);
    _exit(1);
  });
  pthread_setname_np(watcher.native_handle(), "dtrain-launcher");
  watcher.detach();
}

}  // namespace dtrain
