// SPDX-License-Identifier: Apache-2.0
#include "runtime/engine.hpp"

#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <numeric>
#include <stdexcept>
#include <utility>

#include "collectives/errors.hpp"
#include "memory/futex.hpp"
#include "mpi/deadline.hpp"
#include "mpi/library.hpp"

namespace dtrain {
namespace {

using std::chrono::microseconds;
using std::chrono::steady_clock;

// With this many cores to a rank, one of them is better spent on an engine thread than on the model.
constexpr int spare_cores_per_rank = 4;
// A rank that waits has nothing better to do than spin for up to a millisecond; the engine thread takes the core from
// the model. After a few microseconds a spin yields, since the peer may be waiting for this very core.
constexpr microseconds waiter_spin_time(1000);
constexpr int thread_spins = 200;
constexpr int spins_before_yield = 100;
// MPI wakes nobody, so while it has work it is asked this often.
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

constexpr int group_tag = 1;
constexpr Call set_up{.collective = Collective::set_up};

EngineOptions begin_mpi(EngineOptions options) {
  options.initialized_mpi = mpi::initialize() || options.initialized_mpi;
  return options;
}

[[noreturn]] void end_without_mpi() {
  constexpr std::chrono::seconds patience(5);
  std::this_thread::sleep_for(patience);
  std::fputs("distributed_trainer: MPI does not end, since operations were given up; this rank ends without it.\n", stderr);
  _exit(1);
}

}  // namespace

Engine::Engine(const EngineOptions& options) : Engine(begin_mpi(options), mpi::Communicator::duplicate(options.communicator_address)) {
  start_thread();
}

Engine::Engine(const EngineOptions& options, mpi::Communicator world, std::optional<mpi::Communicator> control)
    : options_(options),
      world_(world),
      max_tag_(world_.max_tag()),
      owner_pid_(getpid()) {
  const AllGather all_gather = gather_over(world_);
  node_ = std::make_unique<Node>(rank(), size(), all_gather, options.max_ranks_per_node,
                                 options.numa_node);
  std::vector<int> everyone(static_cast<std::size_t>(size()));
  std::iota(everyone.begin(), everyone.end(), 0);
  status_memory_ = node_->share(static_cast<std::size_t>(sysconf(_SC_PAGESIZE)), everyone, all_gather);

  const std::vector<int>& nodes = node_->node_of_rank();
  status_of_rank_.resize(nodes.size());
  int num_local = 0;
  for (std::size_t peer = 0; peer < nodes.size(); ++peer) {
    if (nodes[peer] != nodes[static_cast<std::size_t>(rank())]) continue;
    const auto page = status_memory_[static_cast<std::size_t>(num_local++)].bytes();
    status_of_rank_[peer] = reinterpret_cast<StatusPage*>(page.data());
  }
  const bool one_node = std::ranges::max(nodes) == 0;
  const int num_cores = std::min(node_->num_cores(), options.cpu_limit.value_or(node_->num_cores()));
  has_thread_ = size() > 1 && (!one_node || num_cores >= spare_cores_per_rank * num_local);
  waiters_spin_ = num_cores >= num_local;
  if (!one_node) control_ = std::make_shared<mpi::Mailbox>(control ? *control : world_.duplicate(), true);
  start_watch(all_gather);
}

Engine::~Engine() {
  if (getpid() != owner_pid_) {
    static_cast<void>(thread_.release());  // it does not exist in a forked child
    return;
  }
  stop_thread();
}

void Engine::start_thread() {
  if (!has_thread_) return;
  thread_ = std::make_unique<std::thread>([this] { run(); });
  pthread_setname_np(thread_->native_handle(), "dtrain-engine");
}

void Engine::stop_thread() {
  if (!thread_) return;
  stopping_ = true;
  own_doorbell().ring();
  thread_->join();
  thread_.reset();
}

AllGather Engine::gather_over(const mpi::Communicator& communicator) const {
  return [this, &communicator, survives = options_.survives_deaths](std::span<const std::byte> mine,
                                                                    std::span<std::byte> all) {
    std::optional<mpi::Deadline> deadline;
    if (survives) {
      deadline.emplace("the set-up of a group or its memory", mpi::Deadline::longest,
                       [this] { return has_lost_rank_.load(); });
    }
    try {
      communicator.all_gather(mine, all);
    } catch (const mpi::Error&) {
      if (survives) communicator.revoke();  // only those that wait for the dead rank itself get an error
      throw;
    }
  };
}

std::shared_ptr<Group> Engine::create_group(std::span<const int> ranks) {
  std::vector<int> sorted(ranks.begin(), ranks.end());
  std::ranges::sort(sorted);
  if (!std::ranges::binary_search(sorted, rank()) || sorted.front() < 0 || sorted.back() >= size() ||
      std::ranges::adjacent_find(sorted) != sorted.end()) {
    throw std::invalid_argument("create_group: the ranks must be different ones of 0 to " + std::to_string(size() - 1) +
                                ", with the calling rank, " + std::to_string(rank()) + ", among them");
  }
  require_open();
  drain();
  const Watch::Waiting waiting(*watch_, ranks, set_up);
  const bool is_everyone = ranks.size() == static_cast<std::size_t>(size()) && std::ranges::is_sorted(ranks);
  std::optional<mpi::Communicator> spare;
  if (is_everyone && !spare_communicators_.empty()) {
    spare = spare_communicators_.back();
    spare_communicators_.pop_back();
  }
  const mpi::Communicator communicator = spare ? *spare : world_.create_group(ranks, group_tag);
  const AllGather all_gather = gather_over(communicator);
  auto blocks = std::make_shared<const Allocation>(node_->share(LocalGroup::block_bytes(), ranks, all_gather));

  const std::vector<int>& nodes = node_->node_of_rank();
  std::vector<int> numbers;  // nodes of the group, in the order of their lowest rank in it
  std::vector<int> node_of_rank;
  std::vector<Doorbell*> doorbells;
  std::vector<int> numa_nodes;
  int local_rank = 0;
  for (const int peer : ranks) {
    const int node = nodes[static_cast<std::size_t>(peer)];
    auto number = std::ranges::find(numbers, node);
    if (number == numbers.end()) number = numbers.insert(number, node);
    node_of_rank.push_back(static_cast<int>(number - numbers.begin()));
    if (node != nodes[static_cast<std::size_t>(rank())]) continue;
    if (peer == rank()) local_rank = static_cast<int>(doorbells.size());
    doorbells.push_back(&status_of_rank_[static_cast<std::size_t>(peer)]->doorbell);
    numa_nodes.push_back(node_->numa_node_of(peer));
  }
  LocalGroup local(local_rank, std::move(blocks), std::move(doorbells), find_domains(numa_nodes));
  // The first rank and how many groups it was in say which group this is.
  const std::uint64_t own_number = ++num_groups_;
  std::vector<std::uint64_t> number_of_rank(ranks.size());
  all_gather(std::as_bytes(std::span(&own_number, 1)), std::as_writable_bytes(std::span(number_of_rank)));
  const std::uint64_t id = number_of_rank[0] << 32 | static_cast<std::uint64_t>(ranks[0]);
  auto group = std::make_shared<Group>(id, communicator, std::vector(ranks.begin(), ranks.end()),
                                       std::move(node_of_rank), std::move(local), counters_);
  const std::scoped_lock lock(drive_mutex_);
  groups_.push_back(group);
  return group;
}

void Engine::close_group(Group& group) {
  if (getpid() != owner_pid_) return;  // a forked child has not the group's memory
  const std::scoped_lock lock(drive_mutex_);
  leave(group);
}

// With drive_mutex_ held.
void Engine::leave(Group& group) {
  const auto entry = std::ranges::find(groups_, &group, &std::shared_ptr<Group>::get);
  if (entry == groups_.end()) return;
  group.local().leave();
  tell_of_leaving(group);
  take_inbox();  // submit() adds nothing to it from here on
  group.fail(std::make_exception_ptr(std::runtime_error("this rank has closed the group or the engine")));
  // MPI may give a freed communicator's number to the next one, and that would get what is still under way.
  if (group.has_abandoned()) {
    abandoned_groups_.push_back(*entry);
  } else {
    left_communicators_.push_back(group.communicator());
  }
  groups_.erase(entry);
}

std::shared_ptr<mpi::Mailbox> Engine::create_mailbox() {
  require_open();
  drain();
  std::vector<int> everyone(static_cast<std::size_t>(size()));
  std::iota(everyone.begin(), everyone.end(), 0);
  const Watch::Waiting waiting(*watch_, everyone, set_up);
  auto mailbox = std::make_shared<mpi::Mailbox>(world_.duplicate());
  mailboxes_.push_back(mailbox);
  return mailbox;
}

std::shared_ptr<const Allocation> Engine::allocate(Group& group, std::size_t num_bytes) {
  require_open();
  drain();
  const Watch::Waiting waiting(*watch_, group.world_ranks(), set_up);
  const auto page_bytes = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  const std::size_t num_pages = std::max<std::size_t>(1, num_bytes / page_bytes + (num_bytes % page_bytes != 0 ? 1 : 0));
  auto allocation = std::make_shared<const Allocation>(
      node_->share(num_pages * page_bytes, group.world_ranks(), gather_over(group.communicator())));
  const std::scoped_lock lock(drive_mutex_, inbox_mutex_);
  group.local().add(allocation);
  return allocation;
}

void Engine::release(Group& group, std::span<const std::byte> memory) {
  drain();
  const std::scoped_lock lock(drive_mutex_, inbox_mutex_);
  group.local().remove(memory);
}

std::shared_ptr<const Mapping> Engine::allocate_shared(Group& group, std::size_t num_bytes) {
  require_open();
  drain();
  const Watch::Waiting waiting(*watch_, group.world_ranks(), set_up);
  Mapping block = node_->share_one(std::max<std::size_t>(1, num_bytes), group.world_ranks(),
                                   gather_over(group.communicator()));
  block.inherit();
  return std::make_shared<const Mapping>(std::move(block));
}

std::shared_ptr<Operation> Engine::submit(Group& group, Call call, std::span<const std::byte> buffer,
                                          std::function<Task(Operation&)> start) {
  std::shared_ptr<Operation> operation;
  {
    const std::scoped_lock lock(inbox_mutex_);
    if (is_closed_) throw std::runtime_error("the engine was closed: no collective can be called any more");
    if (group.local().has_left()) {
      const std::string reason = group.local().reason_of(group.local().rank());
      if (!reason.empty()) throw RankLeft("this rank has given up the group: " + reason);
      throw std::runtime_error("this rank has closed the group: it takes part in nothing more");
    }
    group.local().locate(buffer, call);
    operation = std::make_shared<Operation>(call, std::move(start));
    inbox_.emplace_back(&group, operation);
  }
  if (has_thread_) {
    own_doorbell().ring();
  } else {
    poll();
  }
  return operation;
}

void Engine::require_open() {
  const std::scoped_lock lock(inbox_mutex_);
  if (is_closed_) throw std::runtime_error("the engine was closed: nothing can be set up any more");
  if (has_lost_rank_) throw mpi::Error("a rank was killed: nothing can be set up any more");
}

// With drive_mutex_ held.
void Engine::take_inbox() {
  const std::scoped_lock lock(inbox_mutex_);
  for (auto& [group, operation] : inbox_) group->submit(std::move(operation));
  inbox_.clear();
}

bool Engine::progress() {
  std::unique_lock lock(drive_mutex_, std::defer_lock);
  if (!has_thread_) lock.lock();
  else if (!lock.try_lock()) return false;  // somebody else does it now
  take_inbox();
  bool advanced = fail_groups();
  for (const auto& group : groups_) advanced = group->progress() || advanced;
  // Another thread of this process may sleep until its operation is done.
  if (advanced && !has_thread_) own_doorbell().ring();
  return advanced;
}

void Engine::poll() {
  if (!has_thread_) progress();
}

bool Engine::needs_polling() {
  const std::scoped_lock lock(drive_mutex_);
  return std::ranges::any_of(groups_, [](const auto& group) { return group->needs_polling(); });
}

bool Engine::wait(Operation& operation, microseconds timeout) {
  const auto deadline = steady_clock::now() + timeout;
  int spins = 0;
  // By the clock: where other programs want the cores, a yield may take milliseconds.
  auto spin_end = steady_clock::now() + waiter_spin_time;
  while (!operation.is_done()) {
    // With an engine thread too: it may be asleep, and to wake it takes longer than a small operation.
    if (progress()) {
      spins = 0;
      spin_end = steady_clock::now() + waiter_spin_time;
    } else if (waiters_spin_ && steady_clock::now() < spin_end) {
      spin(++spins);
    } else {
      const auto left = std::chrono::duration_cast<microseconds>(deadline - steady_clock::now());
      if (left.count() <= 0) return false;
      if (has_thread_) {
        futex_wait(operation.done_word(), 0, std::min(left, longest_sleep));
      } else {
        sleep(std::min(left, needs_polling() ? mpi_poll_interval : longest_sleep));
      }
    }
  }
  return true;
}

// See Doorbell::ring for why nothing is missed.
void Engine::sleep(microseconds timeout) {
  look_for_deaths();
  Doorbell& own = own_doorbell();
  own.num_sleepers.fetch_add(1);
  std::atomic_thread_fence(std::memory_order_seq_cst);
  const std::uint32_t rings = own.rings.load();
  if (!progress() && !stopping_) futex_wait(own.rings, rings, timeout);
  own.num_sleepers.fetch_sub(1);
}

// What sets up groups and memory calls MPI from the caller's thread and blocks, so nothing may be left for which a peer
// waits meanwhile.
void Engine::drain() {
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

void Engine::run() {
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
      answer_control();
      sleep(is_polling ? mpi_poll_interval : longest_sleep);
    }
  }
}

void Engine::close() {
  if (getpid() != owner_pid_) return;
  {
    const std::scoped_lock lock(inbox_mutex_);
    if (std::exchange(is_closed_, true)) return;
  }
  stop_thread();
  {
    const std::scoped_lock lock(drive_mutex_);
    while (!groups_.empty()) leave(*groups_.front());
  }
  own_doorbell().ring();
  watch_->close();
  if (replacement_) replacement_->dismiss();
  meet_at_end();
  const std::scoped_lock lock(drive_mutex_);
  for (const auto& mailbox : mailboxes_) mailbox->close();
  if (options_.survives_deaths) {
    // A rank may be in recover(), if another was killed after it had taken part in this one's last operation.
    if (!have_others_ended_) world_.agree_of_living(false);
    if (options_.initialized_mpi) mpi::leave();  // all else is let go of when the process ends
  } else if (options_.initialized_mpi) {
    // MPI may wait for ever for what peers that were given up have not sent.
    if (!abandoned_groups_.empty()) std::thread(end_without_mpi).detach();
    mpi::finalize();
  } else if (!mpi::is_finalized()) {
    for (mpi::Communicator& communicator : left_communicators_) communicator.close();
    world_.close();
  }
}

}  // namespace dtrain
