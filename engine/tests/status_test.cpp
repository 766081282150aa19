// SPDX-License-Identifier: Apache-2.0
// Tests of the reports about ranks for which others wait.
#include "runtime/status.hpp"

#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstring>
#include <fstream>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "test.hpp"

namespace dtrain {
namespace {

using namespace test;

template <std::size_t N>
std::array<char, N> text(const char* characters) {
  std::array<char, N> array{};
  std::strncpy(array.data(), characters, N - 1);
  return array;
}

Place place(const char* call, int line, bool is_inside) {
  return {text<32>(call), text<256>("train.py"), 1000, line, is_inside ? 1 : 0};
}

std::vector<Origin> origins(int count) {
  std::vector<Origin> all;
  for (int i = 0; i < count; ++i) all.push_back({text<64>(i < 2 ? "node0" : "node1"), 1, 100 + i});
  return all;
}

const Wait in_barrier{{.collective = Collective::barrier}, 1000};
const Wait in_gather{{.collective = Collective::all_gather, .count = 8}, 1000};

const Test sentence("status: one sentence names the missing ranks, and where the others wait", Runs::alone, [] {
  const std::vector<Snapshot> snapshots{
      {0, State::running, place("train_step", 7, true), in_gather},
      {1, State::running, place("train_step", 7, true), in_gather},
      {2, State::running, place("evaluate", 9, true), in_barrier},
      {3, State::stopped, place("train_step", 7, true), in_gather},  // it waited when it was stopped
      {4, State::silent, {}, {}},
      {5, State::running, {}, {}},
  };
  const std::string said = describe_stall(snapshots, origins(6), "");
  const std::string since = said.substr(said.find("since ") + 6, 8);
  expect_equal(
      said,
      std::string("rank 3 (node1, process 103) is stopped by a signal; it is in train_step, train.py:7, since ") +
          since +
          "; rank 4 (node1, process 104) does not answer: it or its machine is stopped, or the network is cut; "
          "rank 5 (node1, process 105) has not called the trainer yet; ranks 0 and 1 wait in "
          "train_step, train.py:7 (all_gather(8 uint8)); rank 2 waits in evaluate, train.py:9 (barrier())",
      "text");
});

const Test nobody("status: all ranks wait for each other", Runs::alone, [] {
  const std::vector<Snapshot> snapshots{{0, State::running, place("train_step", 7, false), in_gather},
                                        {1, State::running, {}, in_barrier},
                                        {2, State::running, {}, in_barrier}};
  expect_equal(describe_stall(snapshots, origins(3), ""),
               std::string("all ranks wait, but in different calls: rank 0 waits in all_gather(8 uint8); ranks 1 and 2 "
                           "wait in barrier()"),
               "text");
});

const Test dead("status: the cause of a death, if it is known", Runs::alone, [] {
  const std::string said = describe_stall({{1, State::dead, place("train_step", 7, true), {}}}, origins(2),
                                          " (memory)");
  expect(said.starts_with("rank 1 (node0, process 101) is dead: killed, or ended without a message (memory); it is in "
                          "train_step, train.py:7, since "),
         said);
});

const Test processes("status: a process that runs, is stopped or is dead, whatever its name", Runs::alone, [] {
  const pid_t child = fork();
  if (child == 0) {
    prctl(PR_SET_NAME, "a\nb) S (c");
    for (;;) pause();
  }
  const std::string path = "/proc/" + std::to_string(child) + "/comm";
  const auto is_named = [&] {
    std::ifstream file(path);
    return file.get() == 'a' && file.get() == '\n';
  };
  while (!is_named()) std::this_thread::yield();
  expect(state_of_process(child) == State::running, "runs");
  kill(child, SIGSTOP);
  waitpid(child, nullptr, WUNTRACED);
  expect(state_of_process(child) == State::stopped, "stopped");
  kill(child, SIGKILL);
  while (state_of_process(child) != State::dead) std::this_thread::yield();  // a zombie
  waitpid(child, nullptr, 0);
  expect(state_of_process(child) == State::dead, "gone");
});

const Test published("status: a reader never sees half of a value", Runs::alone, [] {
  struct Pair {
    std::uint64_t first, second;
  };
  auto shared = std::make_unique<Published<Pair>>();
  std::atomic<bool> stop = false;
  std::thread writer([&] {
    for (std::uint64_t i = 1; !stop; ++i) shared->write({i, ~i});
  });
  while (shared->read().first == 0) std::this_thread::yield();
  for (int i = 0; i < 100000; ++i) {
    const Pair pair = shared->read();
    expect(pair.second == ~pair.first, "torn");
  }
  stop = true;
  writer.join();
});

}  // namespace
}  // namespace dtrain
