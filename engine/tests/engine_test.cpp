// SPDX-License-Identifier: Apache-2.0
// Tests of the engine's promises apart from the collectives: order, threads, errors, end.
#include "runtime/engine.hpp"

#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "collectives/all_gather.hpp"
#include "collectives/all_reduce.hpp"
#include "collectives/barrier.hpp"
#include "collectives/broadcast.hpp"
#include "collectives/errors.hpp"
#include "collectives/parts.hpp"
#include "ranks.hpp"

namespace {
bool pretends_many_cores = false;
}

// Replaces the C library's function: with this flag, a process may use 64 processors.
extern "C" int sched_getaffinity(pid_t pid, std::size_t num_bytes, cpu_set_t* cores) noexcept {
  CPU_ZERO_S(num_bytes, cores);
  if (!pretends_many_cores) return syscall(SYS_sched_getaffinity, pid, num_bytes, cores) < 0 ? -1 : 0;
  for (int core = 0; core < 64; ++core) CPU_SET_S(static_cast<std::size_t>(core), num_bytes, cores);
  return 0;
}

namespace dtrain {
namespace {

using namespace test;
using std::chrono::microseconds;

std::span<std::byte> bytes_of(std::vector<std::int64_t>& values) { return std::as_writable_bytes(std::span(values)); }

constexpr Reduction sum_of_int64{.dtype = DataType::int64};

const Test ahead("engine: more calls in flight than there is room to announce, ranks far apart", Runs::on_ranks, [] {
  for_each_layout([](const Layout& layout) {
    std::vector<std::vector<std::int64_t>> values;
    std::vector<std::shared_ptr<Operation>> operations;
    for (int i = 0; i < 200; ++i) values.push_back({i, layout.group.rank()});
    if (layout.group.rank() == 0) std::this_thread::sleep_for(std::chrono::milliseconds(20));
    for (auto& pair : values) {
      operations.push_back(layout.engine.submit(all_reduce(layout.group, bytes_of(pair), sum_of_int64)));
    }
    const std::int64_t size = layout.group.size();
    finish(layout.engine, operations.back());
    for (std::size_t i = 0; i < values.size(); ++i) {
      expect(operations[i]->is_done(), "in order");
      expect_equal(values[i][0], static_cast<std::int64_t>(i) * size, layout.name);
      expect_equal(values[i][1], size * (size - 1) / 2, layout.name);
    }
  });
});

const Test done_at("engine: an operation is done after the last rank's call, in order", Runs::on_ranks, [] {
  for_each_layout([](const Layout& layout) {
    using Clock = std::chrono::steady_clock;  // one for all ranks: they are on one machine
    std::vector<std::int64_t> first(3), second(3);
    if (layout.group.rank() == layout.group.size() - 1) std::this_thread::sleep_for(std::chrono::milliseconds(5));
    const Clock::rep own = Clock::now().time_since_epoch().count();
    const auto early = layout.engine.submit(all_reduce(layout.group, bytes_of(first), sum_of_int64));
    const auto late = layout.engine.submit(all_reduce(layout.group, bytes_of(second), sum_of_int64));
    finish(layout.engine, late);
    const Clock::time_point now = Clock::now();
    std::vector<Clock::rep> called(static_cast<std::size_t>(layout.group.size()));
    const auto places = even_parts(std::as_writable_bytes(std::span(called)), called.size());
    finish(layout.engine, all_gather(layout.group, std::as_bytes(std::span(&own, 1)), places, DataType::int64));
    expect(early->done_at().time_since_epoch().count() >= std::ranges::max(called), layout.name + ": after all calls");
    expect(early->done_at() <= late->done_at(), layout.name + ": in order");
    expect(late->done_at() <= now, layout.name + ": before the wait's end");
  });
});

const Test threads("engine: two threads, each with its own groups", Runs::on_ranks, [] {
  for (const int max_ranks_per_node : {0, 1, 2}) {
    Ranks ranks(max_ranks_per_node);
    const std::shared_ptr<Group> groups[] = {ranks.all(), ranks.all()};
    const auto work = [&ranks](Group& group, std::int64_t start) {
      for (std::int64_t i = start; i < start + 200; ++i) {
        std::vector<std::int64_t> values(static_cast<std::size_t>(i % 50 + 1), i);
        finish(ranks.engine, all_reduce(group, bytes_of(values), sum_of_int64));
        expect(std::ranges::count(values, i * group.size()) == i % 50 + 1, "sum");
      }
    };
    std::thread other(work, std::ref(*groups[1]), 1000);
    work(*groups[0], 0);
    other.join();
  }
});

const Test mismatch("engine: ranks that call different collectives get the same error", Runs::on_ranks, [] {
  for (const int max_ranks_per_node : {0, 1}) {
    Ranks ranks(max_ranks_per_node);
    Engine& engine = ranks.engine;
    const auto control = ranks.all();
    const auto group = ranks.all();
    if (engine.size() == 1) return;
    std::vector<std::int64_t> values(3);
    finish(engine, all_reduce(*group, bytes_of(values), sum_of_int64));
    const bool is_last = engine.rank() == engine.size() - 1;
    const auto different = is_last ? engine.submit(broadcast(*group, bytes_of(values), 1, DataType::int64))
                                   : engine.submit(all_reduce(*group, bytes_of(values), sum_of_int64));
    const auto queued = engine.submit(barrier(*group));
    const std::string last = std::to_string(engine.size() - 1);
    const std::string text = "collective 1 of this group: rank 0 calls all_reduce(sum, 3 int64), rank " + last +
                             " calls broadcast(root 1, 3 int64)";
    expect_throws<Mismatch>([&] { finish(engine, different); }, text);
    expect_throws<Mismatch>([&] { finish(engine, queued); }, text);
    expect_throws<Mismatch>([&] { finish(engine, barrier(*group)); }, text);
    finish(engine, barrier(*control));  // other groups continue
  }
});

const Test left("engine: a rank that leaves is named to those who wait for it, on every node", Runs::on_ranks, [] {
  for (const int max_ranks_per_node : {0, 1, 2}) {
    Ranks ranks(max_ranks_per_node);
    Engine& engine = ranks.engine;
    const auto group = ranks.all();
    const int last = engine.size() - 1;
    std::vector<std::int64_t> values(3, 1);
    finish(engine, all_reduce(*group, bytes_of(values), sum_of_int64));
    expect_equal(values[2], engine.size(), "before");
    if (engine.rank() == last) continue;
    std::vector<int> staying;
    for (int rank = 0; rank < last; ++rank) staying.push_back(rank);
    const auto those_who_stay = engine.create_group(staying);
    const std::string text = "rank " + std::to_string(last) + " has left the job, or closed its trainer, while rank " +
                             std::to_string(engine.rank()) + " waits for it in all_reduce(sum, 3 int64), collective 1";
    const auto operation = engine.submit(all_reduce(*group, bytes_of(values), sum_of_int64));
    expect_throws<RankLeft>([&] { finish(engine, operation); }, text);
    expect_throws<RankLeft>([&] { finish(engine, barrier(*group)); }, text);
    finish(engine, barrier(*those_who_stay));  // otherwise the first of them to leave would be named to the others
  }
});

const Test closed_group("engine: closing one group fails it alone", Runs::on_ranks, [] {
  for (const int max_ranks_per_node : {0, 1}) {
    Ranks ranks(max_ranks_per_node);
    Engine& engine = ranks.engine;
    const auto group = ranks.all();
    const auto other = ranks.all();
    std::vector<std::int64_t> values(3);
    finish(engine, barrier(*group));
    const bool closes = engine.rank() == engine.size() - 1;
    const auto operation = closes ? nullptr : engine.submit(all_reduce(*group, bytes_of(values), sum_of_int64));
    if (closes) {
      engine.close_group(*group);
      engine.close_group(*group);
      expect_throws<std::runtime_error>([&] { engine.submit(barrier(*group)); }, "this rank has closed the group");
    } else {
      expect_throws<RankLeft>([&] { finish(engine, operation); }, "has left the job, or closed its trainer");
      engine.close_group(*group);
      expect_equal(group->has_abandoned(), max_ranks_per_node == 1, "MPI may still have it, between nodes");
    }
    finish(engine, barrier(*other));
  }
});

// Some ranks complete the last collective before others do, and leave; that is no error.
const Test last_collective("engine: a rank may leave as soon as its last collective is done", Runs::on_ranks, [] {
  for (const int max_ranks_per_node : {0, 1, 2, 3}) {
    for (int round = 0; round < 10; ++round) {
      Ranks ranks(max_ranks_per_node);
      const auto group = ranks.all();
      Bytes input(50000);
      Bytes output(input.size() * static_cast<std::size_t>(group->size()));
      const auto parts = even_parts<std::byte>(output, static_cast<std::size_t>(group->size()));
      const auto operation = round % 3 == 0   ? ranks.engine.submit(all_gather(*group, input, parts, DataType::uint8))
                             : round % 3 == 1 ? ranks.engine.submit(broadcast(*group, input, 0, DataType::uint8))
                                              : ranks.engine.submit(barrier(*group));
      finish(ranks.engine, operation);
    }
  }
});

const Test closing("engine: closing fails what is in flight, and all that comes later", Runs::on_ranks, [] {
  for (const int max_ranks_per_node : {0, 1}) {
    Ranks ranks(max_ranks_per_node);
    Engine& engine = ranks.engine;
    const auto group = ranks.all();
    std::vector<std::int64_t> values(3);
    std::vector<std::shared_ptr<Operation>> pending;
    if (engine.rank() == 0 && engine.size() > 1) {  // no other rank calls it
      for (int i = 0; i < 3; ++i) pending.push_back(engine.submit(all_reduce(*group, bytes_of(values), sum_of_int64)));
    }
    std::thread waiter([&] {
      if (!pending.empty()) expect_throws<std::runtime_error>([&] { finish(engine, pending[0]); }, "");
    });
    engine.close();
    engine.close();
    waiter.join();
    for (const auto& operation : pending) {
      expect_throws<std::runtime_error>([&] { finish(engine, operation); }, "");  // closed, or a peer has left
    }
    expect_throws<std::runtime_error>([&] { engine.submit(barrier(*group)); }, "the engine was closed");
    expect_throws<std::runtime_error>([&] { engine.allocate(*group, 1); }, "the engine was closed");
    expect_throws<std::runtime_error>([&] { ranks.all(); }, "the engine was closed");
    engine.release(*group, {});
  }
});

const Test arguments("engine: arguments are checked before anything is sent", Runs::on_ranks, [] {
  Ranks ranks;
  Engine& engine = ranks.engine;
  const auto group = ranks.all();
  const int rank = engine.rank();
  const std::vector<std::vector<int>> wrong{{}, {rank, rank}, {rank, engine.size()}, {-1, rank}, {(rank + 1) % 4}};
  for (const std::vector<int>& members : wrong) {
    if (members == std::vector{rank}) continue;
    expect_throws<std::invalid_argument>([&] { engine.create_group(members); }, "with the calling rank");
  }
  std::vector<std::int64_t> values(3);
  const Reduction average{.dtype = DataType::int64, .op = ReduceOp::average};
  expect_throws<std::invalid_argument>([&] { all_reduce(*group, bytes_of(values), average); }, "average of int64");
  finish(engine, barrier(*group));
});

const Test cores("engine: an engine thread where each rank has four cores, and time on them", Runs::on_ranks, [] {
  const int size = Ranks().engine.size();
  pretends_many_cores = true;
  for (const int missing : {0, 1}) {
    Engine engine({.cpu_limit = 4 * size - missing});
    expect_equal(engine.has_thread(), size > 1 && missing == 0, std::to_string(missing) + " missing");
    engine.close();
  }
  pretends_many_cores = false;
});

const Test forked("engine: a forked child can drop its copy", Runs::on_ranks, [] {
  for (const int max_ranks_per_node : {0, 1}) {
    auto engine = std::make_unique<Engine>(EngineOptions{.max_ranks_per_node = max_ranks_per_node});
    std::vector<int> everyone;
    for (int rank = 0; rank < engine->size(); ++rank) everyone.push_back(rank);
    auto group = engine->create_group(everyone);
    in_child([&] {
      engine->close();
      group.reset();
      engine.reset();
    });
    finish(*engine, barrier(*group));
    engine->close();
    engine->close();
  }
});

const Test mailbox("mailbox: messages between any two ranks", Runs::on_ranks, [] {
  Ranks ranks;
  const auto box = ranks.engine.create_mailbox();
  const auto group = ranks.all();
  for (int round = 0; round < 3; ++round) {
    for (int peer = 0; peer < box->size(); ++peer) {
      const std::vector<int> message(static_cast<std::size_t>(round * 20000), box->rank());
      box->post(std::as_bytes(std::span(message)), peer);
    }
  }
  std::size_t num_bytes = 0;
  for (int received = 0; received < 3 * box->size();) {
    const auto message = box->collect();
    box->is_flushed();
    if (!message) continue;
    ++received;
    num_bytes += message->size();
  }
  expect_equal(num_bytes, 60000 * sizeof(int) * static_cast<std::size_t>(box->size()), "bytes");
  while (!box->is_flushed()) std::this_thread::yield();
  finish(ranks.engine, barrier(*group));
});

}  // namespace
}  // namespace dtrain
