// SPDX-License-Identifier: Apache-2.0
// Runs the tests: `engine_tests [part of a name]`. This program also launches itself on MPI ranks, on 1 to 4 of them or
// on the numbers in the environment variable TEST_RANKS, such as "123". Tests that need no ranks run if that has a 1.
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <mutex>

#include "mpi/communicator.hpp"
#include "mpi/library.hpp"
#include "test.hpp"

// Open MPI and MPICH keep some memory until the process ends, and have locks and atomics that TSan cannot see.
extern "C" __attribute__((visibility("default"))) const char* __lsan_default_suppressions() {
  return "leak:libmpi.so\nleak:libopen-pal.so\nleak:libpmix.so\nleak:libevent\nleak:libhwloc\nleak:libfabric\n"
         "leak:libucs.so\nleak:libuct.so\n"
         "leak:vasprintf\n";  // MPI's allocations: the C library has no frame pointers, so the stack ends there
}
extern "C" __attribute__((visibility("default"))) const char* __lsan_default_options() {
  return "print_suppressions=0";
}
extern "C" __attribute__((visibility("default"))) const char* __tsan_default_suppressions() {
  return "called_from_lib:libmpi.so\ncalled_from_lib:libopen-pal.so\ncalled_from_lib:libpmix.so\n"
         "called_from_lib:libevent_core\ncalled_from_lib:libevent_pthreads\n";
}

namespace dtrain::test {
namespace {

constexpr unsigned timeout_seconds = 60;  // under a sanitizer, on a busy machine
constexpr const char* rank_option = "--on-ranks";

std::vector<Test>& tests() {
  static std::vector<Test> all;  // filled by constructors of globals, whose order is not known
  return all;
}

std::atomic<int> failures = 0;
const char* current_test = "?";

void time_is_over(int) {
  static constexpr char text[] = "  timeout in ";
  const auto say = [](const char* part) { return write(STDERR_FILENO, part, std::strlen(part)); };
  if (say(text) < 0 || say(current_test) < 0 || say("\n") < 0) _exit(3);
  _exit(2);
}

void run(const Test& test) {
  current_test = test.name.c_str();
  std::signal(SIGALRM, time_is_over);
  alarm(timeout_seconds);
  try {
    test.body();
  } catch (const std::exception& error) {
    fail(std::string("exception: ") + error.what());
  }
  alarm(0);
}

bool wait_for(pid_t child) {
  int status = 0;
  waitpid(child, &status, 0);
  if (WIFSIGNALED(status)) std::fprintf(stderr, "  ended by signal %d\n", WTERMSIG(status));
  return status == 0;
}

// Runs each test in its own process, so that a crash or a hang affects only that test.
bool run_alone(const Test& test) {
  const pid_t child = fork();
  if (child == 0) {
    run(test);
    std::exit(failures > 0 ? 1 : 0);  // exit() runs the leak check
  }
  return wait_for(child);
}

// Runs the tests on every rank. Rank 0 reports.
int run_on_ranks(const std::string& filter) {
  mpi::initialize();
  const auto world = mpi::Communicator::duplicate(0);
  int total = 0;
  for (const Test& test : tests()) {
    if (test.where != Runs::on_ranks || test.name.find(filter) == std::string::npos) continue;
    failures = 0;
    run(test);
    const int own = failures;
    std::vector<int> all(static_cast<std::size_t>(world.size()));
    world.all_gather(std::as_bytes(std::span(&own, 1)), std::as_writable_bytes(std::span(all)));
    const bool passed = std::ranges::count(all, 0) == world.size();
    total += passed ? 0 : 1;
    if (world.rank() != 0) continue;
    std::printf("%s %s, on %d ranks\n", passed ? "ok    " : "FAILED", test.name.c_str(), world.size());
    std::fflush(stdout);
  }
  mpi::finalize();
  return total > 0 ? 1 : 0;
}

// Launches this program on `num_ranks`, passes on what it prints and counts its reports.
void launch(const char* self, int num_ranks, const std::string& filter, int& passed, int& failed) {
  const std::string command = std::string(MPIEXEC) + " -n " + std::to_string(num_ranks) + " " + self + " " +
                              rank_option + " '" + filter + "'";
  std::fflush(stdout);
  std::FILE* output = popen(command.c_str(), "r");
  const int failed_before = failed;
  std::array<char, 1000> line{};
  while (output != nullptr && std::fgets(line.data(), line.size(), output) != nullptr) {
    if (std::strncmp(line.data(), "ok    ", 6) == 0) ++passed;
    if (std::strncmp(line.data(), "FAILED", 6) == 0) ++failed;
    std::fputs(line.data(), stdout);
  }
  if (output == nullptr || (pclose(output) != 0 && failed == failed_before)) {
    ++failed;
    std::printf("FAILED launch on %d ranks\n", num_ranks);
  }
}

int run_all(const char* self, const std::string& filter) {
  const char* const chosen = std::getenv("TEST_RANKS");
  const auto is_chosen = [&](int num_ranks) { return std::strchr(chosen ? chosen : "1234", '0' + num_ranks); };
  int passed = 0;
  int failed = 0;
  for (const Test& test : tests()) {
    if (!is_chosen(1) || test.where != Runs::alone || test.name.find(filter) == std::string::npos) continue;
    const bool good = run_alone(test);
    ++(good ? passed : failed);
    std::printf("%s %s\n", good ? "ok    " : "FAILED", test.name.c_str());
    std::fflush(stdout);
  }
  const auto is_wanted = [&](const Test& test) {
    return test.where == Runs::on_ranks && test.name.find(filter) != std::string::npos;
  };
  const int most_ranks = std::ranges::any_of(tests(), is_wanted) ? 4 : 0;
  for (int num_ranks = 1; num_ranks <= most_ranks; ++num_ranks) {
    if (is_chosen(num_ranks)) launch(self, num_ranks, filter, passed, failed);
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed > 0 || passed == 0 ? 1 : 0;
}

}  // namespace

Test::Test(std::string test_name, Runs runs, std::function<void()> test_body)
    : name(std::move(test_name)), where(runs), body(std::move(test_body)) {
  tests().push_back(*this);
}

int num_failures() { return failures; }

void fail(const std::string& what, std::source_location where) {
  static std::mutex mutex;
  const std::scoped_lock lock(mutex);
  if (++failures > 10) return;
  std::fprintf(stderr, "  %s:%u: %s\n", where.file_name(), where.line(), what.c_str());
}

void skip(const std::string& why) { std::fprintf(stderr, "  skipped in %s: %s\n", current_test, why.c_str()); }

void in_child(const std::function<void()>& body, std::source_location where) {
  const pid_t child = fork();
  if (child == 0) {
    failures = 0;
    try {
      body();
    } catch (const std::exception& error) {
      fail(std::string("exception in a child: ") + error.what(), where);
    }
    _exit(failures > 0 ? 1 : 0);
  }
  if (!wait_for(child)) fail("the child failed", where);
}

}  // namespace dtrain::test

int main(int argc, char** argv) {
  // TSan does not work with the hooks that UCX sets in the C library when it is loaded, nor with Open MPI's request for
  // certain addresses.
  if (std::getenv("UCX_MEM_MMAP_HOOK_MODE") == nullptr) {
    setenv("UCX_MEM_MMAP_HOOK_MODE", "none", 1);
    setenv("PMIX_MCA_gds", "hash", 1);
    execv("/proc/self/exe", argv);
  }
  const bool on_ranks = argc > 1 && std::strcmp(argv[1], dtrain::test::rank_option) == 0;
  const int filter = on_ranks ? 2 : 1;
  const std::string name = argc > filter ? argv[filter] : "";
  return on_ranks ? dtrain::test::run_on_ranks(name) : dtrain::test::run_all(argv[0], name);
}
