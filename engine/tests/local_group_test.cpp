// SPDX-License-Identifier: Apache-2.0
// Tests with the members of a group as threads of one process that share one mapping, so that TSan sees all of them.
#include "collectives/local_group.hpp"

#include <atomic>
#include <chrono>
#include <cstring>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "at.hpp"
#include "memory/futex.hpp"
#include "test.hpp"

namespace dtrain {
namespace {

using namespace test;
using std::chrono::microseconds;
using std::chrono::milliseconds;
using std::chrono::steady_clock;

std::shared_ptr<const Allocation> allocate(int size, std::size_t num_bytes) {
  auto allocation = std::make_shared<Allocation>();
  for (int member = 0; member < size; ++member) allocation->emplace_back(create_memory(num_bytes), num_bytes);
  return allocation;
}

// Local groups that share their memory, each to be used by one thread.
struct Members {
  explicit Members(int size) : bells(static_cast<std::size_t>(size)) {
    const auto blocks = allocate(size, LocalGroup::block_bytes());
    std::vector<Doorbell*> places;
    for (Doorbell& bell : bells) places.push_back(&bell);
    for (int member = 0; member < size; ++member) groups.emplace_back(member, blocks, places);
  }

  // Runs `body` for all members at once.
  template <class Body>
  void run(const Body& body) {
    std::vector<std::thread> threads;
    for (std::size_t member = 0; member < groups.size(); ++member) {
      threads.emplace_back([&, member] { body(groups[member], static_cast<int>(member)); });
    }
    for (std::thread& thread : threads) thread.join();
  }

  // Sleeps as the engine does, until `condition()`.
  template <class Condition>
  void wait(int member, Condition condition) {
    const auto deadline = steady_clock::now() + std::chrono::seconds(40);
    Doorbell& own = at(bells, member);
    while (!condition()) {
      if (steady_clock::now() > deadline) throw std::runtime_error("a wait without end");
      own.num_sleepers.fetch_add(1);
      std::atomic_thread_fence(std::memory_order_seq_cst);
      const std::uint32_t rings = own.rings.load();
      if (!condition()) {
        const auto start = steady_clock::now();
        futex_wait(own.rings, rings, milliseconds(2000));
        if (steady_clock::now() - start > milliseconds(1900) && condition()) ++num_missed;
      }
      own.num_sleepers.fetch_sub(1);
    }
  }

  void barrier(LocalGroup& group, int member) {
    auto reached = group.barrier();
    wait(member, [&reached] { return reached.await_ready(); });
  }

  std::vector<Doorbell> bells;
  std::vector<LocalGroup> groups;
  std::atomic<int> num_missed = 0;  // number of missed wake-ups
};

const Test barrier("local group: nobody leaves a barrier before all have arrived", Runs::alone, [] {
  for (const int size : {1, 2, 3, 4}) {
    Members members(size);
    std::vector<int> rounds(static_cast<std::size_t>(size), 0);  // not atomic: the barrier orders it
    members.run([&](LocalGroup& group, int member) {
      for (int round = 1; round <= 300; ++round) {
        at(rounds, member) = round;
        members.barrier(group, member);
        for (const int other : rounds) expect_equal(other, round, "round of a member");
        members.barrier(group, member);
      }
    });
    expect_equal(members.num_missed.load(), 0, "missed wake-ups");
  }
});

// A slow member still sees the flags of the last barrier, whatever flags a fast member brings to its next barriers.
const Test flags("local group: a barrier reports whether any member brought a flag", Runs::alone, [] {
  for (const int size : {1, 2, 3, 4}) {
    Members members(size);
    members.run([&](LocalGroup& group, int member) {
      std::minstd_rand random(static_cast<unsigned>(member));
      const auto brings = [size](int round, int who) {
        return round % (size + 2) == who;
      };  // at most one member brings a flag
      for (int round = 0; round < 300; ++round) {
        auto reached = group.barrier(brings(round, member));
        members.wait(member, [&reached] { return reached.await_ready(); });
        if (random() % 16 == 0) std::this_thread::sleep_for(microseconds(200));
        expect_equal(group.any_flag(), round % (size + 2) < size, "any flag");
      }
    });
  }
});

const Test scratch("local group: the halves of the scratch memory take turns", Runs::alone, [] {
  for (const int size : {2, 3}) {
    Members members(size);
    members.run([&](LocalGroup& group, int member) {
      std::minstd_rand random(static_cast<unsigned>(member));
      for (int turn = 0; turn < 300; ++turn) {
        const auto places = group.next_scratch();
        std::memset(at(places, member), (turn + member) & 0xff, 256);
        members.barrier(group, member);  // one barrier in each turn is enough
        if (random() % 16 == 0) std::this_thread::sleep_for(microseconds(200));
        for (int peer = 0; peer < size; ++peer) {
          const std::byte* const theirs = at(places, peer);
          expect(theirs[0] == static_cast<std::byte>(turn + peer) && theirs[255] == theirs[0], "what a peer wrote");
        }
      }
    });
  }
});

const Test ring("local group: more announcements than the ring holds", Runs::alone, [] {
  for (const int size : {1, 2, 4}) {
    Members members(size);
    members.run([&](LocalGroup& group, int member) {
      const std::uint64_t num_calls = 500;
      std::uint64_t num_posted = 0;
      for (std::uint64_t sequence = 0; sequence < num_calls; ++sequence) {
        const auto post_ahead = [&] {
          while (num_posted < num_calls && group.post(num_posted, {.root = member, .count = num_posted})) ++num_posted;
          return group.all_posted(sequence);
        };
        members.wait(member, post_ahead);
        expect(num_posted <= sequence + 64, "no more than 64 ahead");
        for (int peer = 0; peer < size; ++peer) {
          const Call& call = group.call_of(peer, sequence);
          expect(call.count == sequence && call.root == peer, "the announcement of a peer");
        }
        group.complete(sequence);
      }
    });
    expect_equal(members.num_missed.load(), 0, "missed wake-ups");
  }
});

const Test window("local group: the slowest member bounds the ring", Runs::alone, [] {
  Members members(2);
  LocalGroup& fast = members.groups[0];
  LocalGroup& slow = members.groups[1];
  for (std::uint64_t sequence = 0; sequence < 64; ++sequence) {
    expect(fast.post(sequence, {}), "room");
    fast.complete(sequence);
  }
  expect(!fast.post(64, {}), "the slow one has not read the first announcement");
  expect(slow.post(0, {}), "room");
  slow.complete(0);
  expect(fast.post(64, {}) && !fast.post(65, {}), "room for one more");
});

const Test leaving("local group: members that have left, and their last calls", Runs::alone, [] {
  Members members(3);
  for (LocalGroup& group : members.groups) expect(group.post(0, {}), "room");
  members.groups[1].complete(0);
  expect_equal(members.groups[0].first_left(0), -1, "nobody has left");
  members.groups[1].leave();
  expect_equal(members.groups[0].first_left(0), -1, "it has done its part of call 0");
  expect_equal(members.groups[0].first_left(1), 1, "it will not do call 1");
  expect_equal(members.groups[2].first_left(1), 1, "all see it");
  members.groups[2].leave();
  expect_equal(members.groups[0].first_left(0), 2, "this one has not done call 0");
});

const Test in_place("local group: buffers in memory allocated together", Runs::alone, [] {
  Members members(2);
  const auto first = allocate(2, 4096);
  const auto second = allocate(2, 8192);
  for (LocalGroup& group : members.groups) {
    group.add(first);
    group.add(second);
  }
  const auto own = [](const std::shared_ptr<const Allocation>& from, std::size_t member, std::size_t offset,
                      std::size_t num_bytes) { return (*from)[member].bytes().subspan(offset, num_bytes); };
  const auto places = [&](std::uint64_t sequence, std::span<const std::byte> a, std::span<const std::byte> b) {
    Call calls[2];
    members.groups[0].locate(a, calls[0]);
    members.groups[1].locate(b, calls[1]);
    for (std::size_t i = 0; i < 2; ++i) expect(members.groups[i].post(sequence, calls[i]), "room");
    const auto found = members.groups[0].shared_buffers(sequence, a.size());
    expect(found == members.groups[1].shared_buffers(sequence, a.size()), "both find the same");
    return found;
  };
  const auto all = places(0, own(second, 0, 64, 100), own(second, 1, 8092, 100));
  expect(all.size() == 2 && all[0] == own(second, 0, 64, 1).data() && all[1] == own(second, 1, 8092, 1).data(),
         "places");
  expect_throws<std::runtime_error>([&] { members.groups[0].shared_buffers(0, 101); },
                                    "member 1 on this node says that its buffer of 101 bytes begins at 8092 of an "
                                    "allocation of 8192 bytes");
  std::vector<std::byte> elsewhere(100);
  expect(places(1, own(second, 0, 0, 100), elsewhere).empty(), "one elsewhere");
  expect(places(2, own(first, 0, 0, 100), own(second, 1, 0, 100)).empty(), "not in the same allocation");
  members.groups[1].remove(own(first, 1, 0, 4096));
  expect(places(3, own(first, 0, 0, 100), own(first, 1, 0, 100)).empty(), "one has removed it");
  expect_equal(places(4, own(second, 0, 0, 100), own(second, 1, 0, 100)).size(), 2U, "others stay");
  expect(places(5, {}, {}).empty(), "nothing is nowhere");
});

}  // namespace
}  // namespace dtrain
