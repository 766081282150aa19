// SPDX-License-Identifier: Apache-2.0
#include "runtime/driver.hpp"

#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "collectives/errors.hpp"
#include "memory/futex.hpp"
#include "mpi/library.hpp"

namespace dtrain {
namespace {

using std::chrono::microseconds;
using std::chrono::steady_clock;

// A thread that waits may spin for up to a millisecond, since it has nothing better to do; the engine thread spins
// less, since it takes the core from the model. After a few microseconds a spin yields, since the peer may be waiting
// for this very core.
constexpr microseconds waiter_spin_time(1000);
constexpr int thread_spins = 200;
constexpr int spins_before_yield = 100;
// MPI cannot wake a sleeping thread, so while it has work it is polled at this interval.
constexpr microseconds mpi_poll_interval(50);
constexpr microseconds longest_sleep(100000);

void spin(int num_spins) {
  if (num_spins > spins_before_yield) {
    std::this_thread::yield();
    return;
  }
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

Driver::Driver(Doorbell& doorbell, const Options& options, Hooks hooks)
    : doorbell_(doorbell), options_(options), hooks_(std::move(hooks)), owner_pid_(getpid()) {}

Driver::~Driver() { stop_thread(); }

void Driver::start_thread() {
  if (!options_.has_thread) return;
  thread_ = std::make_unique<std::thread>([this] { run(); });
  pthread_setname_np(thread_->native_handle(), "dtrain-engine");
}

void Driver::stop_thread() {
  if (!thread_) return;
  if (getpid() != owner_pid_) {
    static_cast<void>(thread_.release());  // the thread does not exist in a forked child
    return;
  }
  stopping_ = true;
  wake();
  thread_->join();
  thread_.reset();
}

std::shared_ptr<Operation> Driver::submit(PreparedCall prepared) {
  LocalGroup& local = prepared.group.local();
  std::shared_ptr<Operation> operation;
  {
    const std::scoped_lock lock(inbox_mutex_);
    if (is_closed_) throw std::runtime_error("the engine was closed: no collective can be called any more");
    if (local.has_left()) {
      const std::string reason = local.reason_of(local.rank());
      if (!reason.empty()) throw RankLeft("this rank has given up the group: " + reason);
      throw std::runtime_error("this rank has closed the group: it takes part in nothing more");
    }
    local.locate(prepared.buffer, prepared.call);
    operation = std::make_shared<Operation>(prepared.call, std::move(prepared.start));
    inbox_.emplace_back(&prepared.group, operation);
  }
  if (options_.has_thread) {
    wake();
  } else {
    poll();
  }
  return operation;
}

bool Driver::close() {
  const std::scoped_lock lock(inbox_mutex_);
  return !std::exchange(is_closed_, true);
}

void Driver::require_open() {
  const std::scoped_lock lock(inbox_mutex_);
  if (is_closed_) throw std::runtime_error("the engine was closed: nothing can be set up any more");
  if (has_lost_rank_) throw mpi::Error("a rank was killed: nothing can be set up any more");
}

void Driver::lose_rank() {
  has_lost_rank_ = true;
  wake();
}

void Driver::add_memory(Group& group, std::shared_ptr<const Allocation> allocation) {
  const std::scoped_lock lock(drive_mutex_, inbox_mutex_);
  group.local().add(std::move(allocation));
}

void Driver::remove_memory(Group& group, std::span<const std::byte> own_block) {
  const std::scoped_lock lock(drive_mutex_, inbox_mutex_);
  group.local().remove(own_block);
}

void Driver::Pause::fail_all() {
  driver_.take_inbox();
  driver_.fail_groups();
}

void Driver::Pause::remove(Group& group) {
  group.local().leave();
  driver_.take_inbox();  // from now on submit() adds nothing to it
  group.fail(std::make_exception_ptr(std::runtime_error("this rank has closed the group or the engine")));
  std::erase_if(driver_.groups_, [&group](const auto& entry) { return entry.get() == &group; });
}

// With drive_mutex_ held.
void Driver::take_inbox() {
  const std::scoped_lock lock(inbox_mutex_);
  for (auto& [group, operation] : inbox_) group->submit(std::move(operation));
  inbox_.clear();
}

// Fails all groups if a rank was lost; returns whether any group was left to fail. With drive_mutex_ held.
bool Driver::fail_groups() {
  if (!has_lost_rank_) return false;
  bool has_failed = false;
  for (const auto& group : groups_) {
    if (group->local().has_left()) continue;
    fail(*group, "a rank was killed");
    has_failed = true;
  }
  return has_failed;
}

// With drive_mutex_ held.
void Driver::fail(Group& group, const std::string& reason) {
  group.local().leave(reason);
  take_inbox();
  group.fail(std::make_exception_ptr(RankLeft("this rank has given up the group: " + reason)));
}

bool Driver::progress() {
  std::unique_lock lock(drive_mutex_, std::defer_lock);
  if (!options_.has_thread) lock.lock();
  else if (!lock.try_lock()) return false;  // another thread drives now
  take_inbox();
  bool advanced = fail_groups();
  for (const auto& group : groups_) advanced = group->progress() || advanced;
  // Another thread of this process may be asleep until its operation is done.
  if (advanced && !options_.has_thread) wake();
  return advanced;
}

void Driver::poll() {
  if (!options_.has_thread) progress();
}

bool Driver::needs_polling() {
  const std::scoped_lock lock(drive_mutex_);
  return std::ranges::any_of(groups_, [](const auto& group) { return group->needs_polling(); });
}

bool Driver::wait(Operation& operation, microseconds timeout) {
  const auto deadline = steady_clock::now() + timeout;
  int spins = 0;
  // The spin ends by the clock: if other programs want the cores, a yield may take milliseconds.
  auto spin_end = steady_clock::now() + waiter_spin_time;
  while (!operation.is_done()) {
    // Drives even if there is an engine thread: that may be asleep, and to wake it takes longer than a small operation.
    if (progress()) {
      spins = 0;
      spin_end = steady_clock::now() + waiter_spin_time;
    } else if (options_.waiters_spin && steady_clock::now() < spin_end) {
      spin(++spins);
    } else {
      const auto left = std::chrono::duration_cast<microseconds>(deadline - steady_clock::now());
      if (left.count() <= 0) return false;
      if (options_.has_thread) {
        futex_wait(operation.done_word(), 0, std::min(left, longest_sleep));
      } else {
        sleep(std::min(left, needs_polling() ? mpi_poll_interval : longest_sleep));
      }
    }
  }
  return true;
}

// Sleeps until the doorbell rings. See Doorbell::ring for why no ring is missed.
void Driver::sleep(microseconds timeout) {
  hooks_.look_for_deaths();
  doorbell_.num_sleepers.fetch_add(1);
  std::atomic_thread_fence(std::memory_order_seq_cst);
  const std::uint32_t rings = doorbell_.rings.load();
  if (!progress() && !stopping_) futex_wait(doorbell_.rings, rings, timeout);
  doorbell_.num_sleepers.fetch_sub(1);
}

void Driver::drain() {
  for (;;) {
    poll();
    std::shared_ptr<Operation> last;
    {
      const std::scoped_lock lock(drive_mutex_, inbox_mutex_);
      for (const auto& group : groups_) {
        if (!group->is_idle()) last = group->last_queued();
      }
      if (!inbox_.empty()) last = inbox_.back().second;
    }
    if (!last) return;
    wait(*last, longest_sleep);
  }
}

// Runs in the engine thread.
void Driver::run() {
  int spins = 0;
  while (!stopping_) {
    if (progress()) {
      spins = 0;
      continue;
    }
    const bool is_polling = needs_polling();
    bool is_idle = !is_polling;
    {
      const std::scoped_lock lock(drive_mutex_);
      for (const auto& group : groups_) is_idle = is_idle && group->is_idle();
    }
    if (!is_idle && spins < thread_spins) {
      spin(++spins);
    } else {
      hooks_.answer_control();
      sleep(is_polling ? mpi_poll_interval : longest_sleep);
    }
  }
}

}  // namespace dtrain
