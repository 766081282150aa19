// SPDX-License-Identifier: Apache-2.0
#include "runtime/engine.hpp"

#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <numeric>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>

#include "at.hpp"
#include "mpi/deadline.hpp"
#include "mpi/library.hpp"

namespace dtrain {
namespace {

// With this many cores for each rank, one of them is better spent on an engine thread than on the model.
constexpr int spare_cores_per_rank = 4;

constexpr int group_tag = 1;
constexpr Call set_up{.collective = Collective::set_up};

EngineOptions begin_mpi(EngineOptions options) {
  options.initialized_mpi = mpi::initialize() || options.initialized_mpi;
  return options;
}

[[noreturn]] void end_without_mpi() {
  constexpr std::chrono::seconds patience(5);
  std::this_thread::sleep_for(patience);
  std::fputs("distributed_trainer: MPI does not end, since operations were given up; this rank ends without it.\n",
             stderr);
  _exit(1);
}

std::vector<int> all_ranks(int size) {
  std::vector<int> ranks(static_cast<std::size_t>(size));
  std::iota(ranks.begin(), ranks.end(), 0);
  return ranks;
}

// Returns the node of each of `ranks`, numbered 0, 1, ... in the order of the nodes' first ranks here.
std::vector<int> number_nodes(std::span<const int> ranks, const std::vector<int>& node_of_rank) {
  std::vector<int> numbers;
  std::vector<int> numbered;
  for (const int rank : ranks) {
    const int node = at(node_of_rank, rank);
    auto number = std::ranges::find(numbers, node);
    if (number == numbers.end()) number = numbers.insert(number, node);
    numbered.push_back(static_cast<int>(number - numbers.begin()));
  }
  return numbered;
}

}  // namespace

Engine::Engine(const EngineOptions& options)
    : Engine(begin_mpi(options), mpi::Communicator::duplicate(options.communicator_address)) {
  driver_->start_thread();
}

Engine::Engine(const EngineOptions& options, mpi::Communicator world, std::optional<mpi::Communicator> control)
    : options_(options), world_(world), owner_pid_(getpid()) {
  const AllGather all_gather = gather_over(world_);
  node_ = std::make_unique<Node>(rank(), size(), all_gather, options.max_ranks_per_node, options.numa_node);
  share_status(all_gather);

  const std::vector<int>& nodes = node_->node_of_rank();
  const bool one_node = std::ranges::max(nodes) == 0;
  const auto num_local = static_cast<int>(status_memory_.size());
  const int num_cores = std::min(node_->num_cores(), options.cpu_limit.value_or(node_->num_cores()));
  driver_ = std::make_unique<Driver>(
      at(status_of_rank_, rank())->doorbell,
      Driver::Options{.has_thread = size() > 1 && (!one_node || num_cores >= spare_cores_per_rank * num_local),
                      .waiters_spin = num_cores >= num_local},
      Driver::Hooks{.look_for_deaths = [this] { recovery_->look_for_deaths(); },
                    .answer_control = [this] { control_->answer(*monitor_); }});
  std::unique_ptr<mpi::Mailbox> mailbox;
  if (!one_node) mailbox = std::make_unique<mpi::Mailbox>(control ? *control : world_.duplicate(), true);
  control_ = std::make_unique<ControlChannel>(*driver_, std::move(mailbox), nodes, options_.survives_deaths);
  start_monitor(all_gather);
  recovery_ = std::make_unique<Recovery>(world_, Recovery::Parts{*driver_, *control_, *monitor_},
                                         options_.survives_deaths);
}

Engine::~Engine() { driver_->stop_thread(); }

void Engine::share_status(const AllGather& all_gather) {
  status_memory_ = node_->share(static_cast<std::size_t>(sysconf(_SC_PAGESIZE)), all_ranks(size()), all_gather);
  const std::vector<int>& nodes = node_->node_of_rank();
  status_of_rank_.resize(nodes.size());
  std::size_t num_local = 0;
  for (std::size_t peer = 0; peer < nodes.size(); ++peer) {
    if (nodes[peer] != at(nodes, rank())) continue;
    const auto page = status_memory_[num_local++].bytes();
    status_of_rank_[peer] = reinterpret_cast<StatusPage*>(page.data());
  }
}

void Engine::start_monitor(const AllGather& all_gather) {
  const Origin own = Origin::own();
  std::vector<Origin> origins(static_cast<std::size_t>(size()));
  all_gather(std::as_bytes(std::span(&own, 1)), std::as_writable_bytes(std::span(origins)));
  StallMonitor::Hooks hooks;
  hooks.ask = [this](int peer, bool is_wanted) { control_->ask(peer, is_wanted); };
  hooks.fail = [this](const std::string& reason) {
    const auto groups =
        Driver::Pause(*driver_).groups();  // a copy, since the driver must not be paused while a group is given up
    for (const auto& group : groups) control_->give_up(*group, reason);
  };
  if (options_.survives_deaths) hooks.lose_rank = [this] { driver_->lose_rank(); };
  monitor_ = std::make_unique<StallMonitor>(rank(), std::move(origins), status_of_rank_, std::move(hooks));
}

AllGather Engine::gather_over(const mpi::Communicator& communicator) const {
  return [this, &communicator, survives = options_.survives_deaths](std::span<const std::byte> mine,
                                                                    std::span<std::byte> all) {
    std::optional<mpi::Deadline> deadline;
    if (survives) {
      deadline.emplace("the set-up of a group or its memory", mpi::Deadline::longest,
                       [this] { return driver_ && driver_->has_lost_rank(); });
    }
    try {
      communicator.all_gather(mine, all);
    } catch (const mpi::Error&) {
      if (survives) communicator.revoke();  // otherwise only ranks that wait for the dead rank itself get an error
      throw;
    }
  };
}

void Engine::begin_set_up() {
  driver_->require_open();
  driver_->drain();
}

std::shared_ptr<Group> Engine::create_group(std::span<const int> ranks) {
  std::vector<int> sorted(ranks.begin(), ranks.end());
  std::ranges::sort(sorted);
  if (!std::ranges::binary_search(sorted, rank()) || sorted.front() < 0 || sorted.back() >= size() ||
      std::ranges::adjacent_find(sorted) != sorted.end()) {
    throw std::invalid_argument("create_group: the ranks must be different ones of 0 to " + std::to_string(size() - 1) +
                                ", with the calling rank, " + std::to_string(rank()) + ", among them");
  }
  begin_set_up();
  const StallMonitor::Waiting waiting(*monitor_, ranks, set_up);
  std::optional<mpi::Communicator> spare;
  if (std::ranges::equal(ranks, all_ranks(size()))) spare = recovery_->take_spare();
  const mpi::Communicator communicator = spare ? *spare : world_.create_group(ranks, group_tag);
  const AllGather all_gather = gather_over(communicator);
  auto blocks = std::make_shared<const Allocation>(node_->share(LocalGroup::block_bytes(), ranks, all_gather));

  std::vector<Doorbell*> doorbells;
  std::vector<int> numa_nodes;
  int local_rank = 0;
  for (const int peer : ranks) {
    StatusPage* const status = at(status_of_rank_, peer);
    if (status == nullptr) continue;
    if (peer == rank()) local_rank = static_cast<int>(doorbells.size());
    doorbells.push_back(&status->doorbell);
    numa_nodes.push_back(node_->numa_node_of(peer));
  }
  LocalGroup local(local_rank, std::move(blocks), std::move(doorbells), find_numa_domains(numa_nodes));
  // The first rank, and its number of groups so far, identify the group.
  const std::uint64_t own_number = ++num_groups_;
  std::vector<std::uint64_t> number_of_rank(ranks.size());
  all_gather(std::as_bytes(std::span(&own_number, 1)), std::as_writable_bytes(std::span(number_of_rank)));
  const std::uint64_t id = number_of_rank[0] << 32 | static_cast<std::uint64_t>(ranks[0]);
  auto group = std::make_shared<Group>(id, communicator, std::vector(ranks.begin(), ranks.end()),
                                       number_nodes(ranks, node_->node_of_rank()), std::move(local), counters_);
  Driver::Pause(*driver_).add(group);
  return group;
}

void Engine::close_group(Group& group) {
  if (getpid() != owner_pid_) return;  // a forked child does not have the group's memory
  Driver::Pause pause(*driver_);
  const auto entry = std::ranges::find(pause.groups(), &group, &std::shared_ptr<Group>::get);
  if (entry != pause.groups().end()) leave(pause, std::shared_ptr(*entry));
}

void Engine::leave(Driver::Pause& pause, const std::shared_ptr<Group>& group) {
  control_->announce_leaving(pause, *group);
  pause.remove(*group);
  // MPI may give a freed communicator's number to the next communicator, which would then receive messages that are
  // still under way.
  if (group->has_abandoned()) {
    abandoned_groups_.push_back(group);
  } else {
    left_communicators_.push_back(group->communicator());
  }
}

std::shared_ptr<mpi::Mailbox> Engine::create_mailbox() {
  begin_set_up();
  const StallMonitor::Waiting waiting(*monitor_, all_ranks(size()), set_up);
  auto mailbox = std::make_shared<mpi::Mailbox>(world_.duplicate());
  mailboxes_.push_back(mailbox);
  return mailbox;
}

std::shared_ptr<const Allocation> Engine::allocate(Group& group, std::size_t num_bytes) {
  begin_set_up();
  const StallMonitor::Waiting waiting(*monitor_, group.world_ranks(), set_up);
  const auto page_bytes = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  const std::size_t num_pages = std::max<std::size_t>(1,
                                                      num_bytes / page_bytes + (num_bytes % page_bytes != 0 ? 1 : 0));
  auto allocation = std::make_shared<const Allocation>(
      node_->share(num_pages * page_bytes, group.world_ranks(), gather_over(group.communicator())));
  driver_->add_memory(group, allocation);
  return allocation;
}

void Engine::release(Group& group, std::span<const std::byte> memory) {
  driver_->drain();
  driver_->remove_memory(group, memory);
}

std::shared_ptr<const Mapping> Engine::allocate_shared(Group& group, std::size_t num_bytes) {
  begin_set_up();
  const StallMonitor::Waiting waiting(*monitor_, group.world_ranks(), set_up);
  Mapping block = node_->share_one(std::max<std::size_t>(1, num_bytes), group.world_ranks(),
                                   gather_over(group.communicator()));
  block.inherit();
  return std::make_shared<const Mapping>(std::move(block));
}

std::shared_ptr<Engine> Engine::recover() {
  const std::optional<mpi::Communicator> living = recovery_->agree_on_living();
  return living ? continue_over(*living) : nullptr;
}

std::shared_ptr<Engine> Engine::admit() { return continue_over(recovery_->admit()); }

std::shared_ptr<Engine> Engine::join() {
  const std::optional<mpi::Communicator> all = recovery_->join();
  return all ? continue_over(*all) : nullptr;
}

// Makes the engine that replaces this one. Collective over `members`. Ranks may die meanwhile, and MPI's calls then
// fail on some ranks and not on others, or wait for ever (MPI_Comm_create_group). So all ranks agree on whether the
// engine is made, and the communicators of its groups are made here by shrink(), which does neither.
std::shared_ptr<Engine> Engine::continue_over(mpi::Communicator members) {
  constexpr int num_spare = 3;  // number of a trainer's groups
  monitor_->close();
  for (;;) {
    const mpi::Deadline deadline("the set-up of the ranks that live",
                                 mpi::Deadline::longest_of(members.rank(), members.size()));
    const mpi::Communicator control = members.shrink();
    std::shared_ptr<Engine> next;
    try {
      next.reset(new Engine(options_, members, control));
    } catch (const mpi::Error&) {
      members.revoke();  // others may wait for this rank
    }
    bool is_made = members.agree(next != nullptr);
    for (int i = 0; is_made && i < num_spare; ++i) {
      const mpi::Communicator spare = members.shrink();
      next->recovery_->add_spare(spare);
      is_made = spare.size() == members.size();
    }
    if (is_made) {
      next->recovery_->take_replacement(*recovery_);
      next->monitor_->take_settings(*monitor_);
      retire();
      next->driver_->start_thread();
      return next;
    }
    if (next) next->retire();
    members.await_failures(1);
    members = members.shrink();
  }
}

// Ends an engine that has a successor, or that was not made on all ranks. No communicator is freed: Open MPI gives a
// freed communicator's number to the next one. If processes that were started at different times then agreed in the
// next one, they might receive what is left of the old one's agreements, and never end.
void Engine::retire() {
  driver_->close();
  Driver::Pause(*driver_).forget_groups();
  node_->close();
}

void Engine::close() {
  if (getpid() != owner_pid_ || !driver_->close()) return;
  driver_->stop_thread();
  {
    Driver::Pause pause(*driver_);
    while (!pause.groups().empty()) leave(pause, std::shared_ptr(pause.groups().front()));
  }
  driver_->wake();
  monitor_->close();
  recovery_->dismiss_replacement();
  control_->meet_at_end(*monitor_, abandoned_groups_.empty());
  const Driver::Pause pause(*driver_);
  for (const auto& mailbox : mailboxes_) mailbox->close();
  if (options_.survives_deaths) {
    recovery_->agree_on_end();
    if (options_.initialized_mpi) mpi::leave();  // the rest is freed when the process ends
  } else if (options_.initialized_mpi) {
    // MPI may wait for ever for messages that peers never sent in operations that were given up.
    if (!abandoned_groups_.empty()) std::thread(end_without_mpi).detach();
    mpi::finalize();
  } else if (!mpi::is_finalized()) {
    for (mpi::Communicator& communicator : left_communicators_) communicator.close();
    world_.close();
  }
}

}  // namespace dtrain
