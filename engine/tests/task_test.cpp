// SPDX-License-Identifier: Apache-2.0
#include "collectives/task.hpp"

#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "collectives/parts.hpp"
#include "test.hpp"

namespace dtrain {
namespace {

using namespace test;

// A coroutine's parameters and locals live until it is destroyed; an object that it refers to must outlive it.
Task count_up(int& stage, const bool& gate, std::shared_ptr<int> token) {
  const std::vector<int> local(1000, *token);
  for (int i = 0; i < 2; ++i) {
    stage = 2 * i + 1;
    auto open = Until([&gate] { return gate; });
    co_await open;
    stage = 2 * i + local[999];
  }
}

const Test steps("task: runs from wait to wait", Runs::alone, [] {
  int stage = 0;
  bool gate = false;
  const auto token = std::make_shared<int>(2);
  {
    Task task = count_up(stage, gate, token);
    expect(stage == 0 && task.is_ready() && !task.done(), "nothing runs before the first advance");
    expect(task.advance() && stage == 1 && !task.is_ready(), "to the first wait");
    expect(!task.advance() && stage == 1, "not past it");
    gate = true;
    expect(task.is_ready() && task.advance() && task.done(), "a condition that holds is no wait");
    expect_equal(stage, 4, "stage");
    expect_equal(token.use_count(), 2, "the frame lives");
  }
  expect_equal(token.use_count(), 1, "and goes with the task");
});

const Test destruction("task: may be destroyed before its end", Runs::alone, [] {
  int stage = 0;
  const bool gate = false;
  const auto token = std::make_shared<int>(2);
  {
    const Task never_started = count_up(stage, gate, token);
    Task waiting = count_up(stage, gate, token);
    waiting.advance();
    Task moved(std::move(waiting));
    moved = count_up(stage, gate, token);
    expect_equal(token.use_count(), 3, "two frames");
  }
  expect_equal(token.use_count(), 1, "all gone");
});

Task fail_after_wait(const bool& gate) {
  auto open = Until([&gate] { return gate; });
  co_await open;
  throw std::runtime_error("from the coroutine");
}

Task wait_for_what_fails() {
  int calls = 0;
  auto broken = Until([&calls] { return ++calls > 1 ? throw std::runtime_error("from the condition") : false; });
  co_await broken;
}

const Test errors("task: advance throws what the coroutine and its conditions throw", Runs::alone, [] {
  bool gate = false;
  Task task = fail_after_wait(gate);
  expect(task.advance() && !task.advance(), "waits");
  gate = true;
  expect_throws<std::runtime_error>([&] { task.advance(); }, "from the coroutine");
  Task other = wait_for_what_fails();
  expect(other.advance(), "waits");
  expect_throws<std::runtime_error>([&] { other.advance(); }, "from the condition");
});

const Test parts("parts: cover all, in order, cut at cache lines, differ by a line", Runs::alone, [] {
  std::vector<std::byte> memory(20000);
  for (const std::size_t num_bytes : {0U, 1U, 63U, 64U, 65U, 127U, 128U, 1000U, 10007U, 20000U}) {
    for (const std::size_t num_parts : {1U, 2U, 3U, 4U, 7U, 100U}) {
      const std::span<std::byte> whole(memory.data(), num_bytes);
      std::size_t end = 0;
      std::size_t least = num_bytes;
      std::size_t most = 0;
      for (std::size_t i = 0; i < num_parts; ++i) {
        const auto part = part_of(whole, i, num_parts);
        const auto start = static_cast<std::size_t>(part.data() - memory.data());
        expect(start == end, "follows the one before");
        expect(start % 64 == 0 || part.empty(), "starts a line");
        end = start + part.size();
        least = std::min(least, part.size());
        most = std::max(most, part.size());
      }
      expect_equal(end, num_bytes, "covered");
      expect(most - least <= 128, "even: a line more at the most, and a partial last one");
    }
  }
});

}  // namespace
}  // namespace dtrain
