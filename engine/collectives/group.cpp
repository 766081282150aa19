// SPDX-License-Identifier: Apache-2.0
#include "collectives/group.hpp"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <utility>

#include "at.hpp"
#include "collectives/errors.hpp"
#include "memory/futex.hpp"

namespace dtrain {

void Operation::rethrow() const {
  if (error_) std::rethrow_exception(error_);
}

bool Operation::found_nonfinite() const {
  if (call_.check_finite && is_done() && !error_) return found_nonfinite_;
  throw std::invalid_argument("found_nonfinite: " + call_.description() + " is not done, or was not asked to check");
}

Group::Group(std::uint64_t id, mpi::Communicator communicator, std::vector<int> world_ranks,
             std::vector<int> node_of_rank, LocalGroup local, std::shared_ptr<Counters> counters)
    : id_(id),
      communicator_(communicator),
      max_tag_(communicator_.max_tag()),
      world_ranks_(std::move(world_ranks)),
      node_of_rank_(std::move(node_of_rank)),
      local_(std::move(local)),
      counters_(std::move(counters)) {
  ranks_of_node_.resize(static_cast<std::size_t>(std::ranges::max(node_of_rank_)) + 1);
  for (int member = 0; member < size(); ++member) {
    at(ranks_of_node_, at(node_of_rank_, member)).push_back(member);
  }
}

mpi::Transfer Group::send(std::span<const std::byte> bytes, int destination, int tag) const {
  if (at(node_of_rank_, destination) != node()) {
    ++counters_->messages_sent;
    counters_->bytes_sent += bytes.size();
  }
  return communicator_.send(bytes, destination, tag);
}

mpi::Transfer Group::receive(std::span<std::byte> bytes, int source, int tag) const {
  if (source != mpi::any_source && at(node_of_rank_, source) != node()) {
    ++counters_->messages_received;
    counters_->bytes_received += bytes.size();
  }
  return communicator_.receive(bytes, source, tag);
}

mpi::Transfer Group::broadcast(std::span<std::byte> bytes, int root) const {
  ++counters_->mpi_collectives;
  return communicator_.broadcast(bytes, root);
}

mpi::Transfer Group::gather_to_all(std::span<const std::byte> mine, std::span<std::byte> all) const {
  ++counters_->mpi_collectives;
  return communicator_.gather_to_all(mine, all);
}

std::span<std::byte> Group::staging(std::size_t num_bytes) {
  if (staging_.size() < num_bytes) staging_.resize(num_bytes);
  return staging_;
}

void Group::submit(std::shared_ptr<Operation> operation) {
  if (operation->is_message()) {
    messages_.push_back(std::move(operation));
    if (failure_) fail(failure_);
    return;
  }
  queue_.push_back(std::move(operation));
  if (failure_) {
    finish_head(failure_);
  } else {
    post_waiting();
  }
}

void Group::post_waiting() {
  std::uint64_t sequence = num_finished_;
  for (const auto& operation : queue_) {
    if (!operation->posted_) {
      operation->posted_ = local_.post(sequence, operation->call_);
      if (!operation->posted_) return;
    }
    ++sequence;
  }
}

bool Group::progress() {
  const bool advanced = !messages_.empty() && advance_messages();
  if (queue_.empty()) return advanced;
  try {
    post_waiting();
    return advance_head() || advanced;
  } catch (...) {
    fail(std::current_exception());
    return true;
  }
}

// Advances messages in the order of their calls, since MPI matches messages of one tag in that order.
bool Group::advance_messages() {
  std::size_t num_done = 0;
  for (const auto& message : messages_) {
    try {
      if (!message->task_) message->task_ = message->start_(*message);
      while (!message->task_->done() && message->task_->advance()) {}
      if (!message->task_->done()) continue;
      finish(message, nullptr);
    } catch (...) {
      finish(message, std::current_exception());  // only two ranks are concerned; the group continues
    }
    ++num_done;
  }
  if (num_done > 0) std::erase_if(messages_, [](const auto& message) { return message->is_done(); });
  return num_done > 0;
}

bool Group::advance_head() {
  Operation& head = *queue_.front();
  if (!head.task_) {
    if (!head.posted_ || !local_.all_posted(num_finished_)) {
      check_all_here();
      return false;
    }
    if (!know_all_calls()) {
      check_all_here();
      return false;
    }
    check_calls();
    head.task_ = head.start_(head);
  }
  if (!head.task_->advance()) {
    check_all_here();
    return false;
  }
  if (head.task_->done()) {
    local_.complete(num_finished_);
    finish_head(nullptr);
  }
  return true;
}

// Returns whether this rank has all ranks' calls. On one node they are in shared memory. Between nodes they are
// exchanged before each operation: if ranks disagreed on a length, MPI would write past a buffer.
bool Group::know_all_calls() {
  if (num_nodes() == 1) return true;
  if (!calls_transfer_) {
    calls_.resize(static_cast<std::size_t>(size()));
    calls_transfer_ = gather_to_all(std::as_bytes(std::span(&queue_.front()->call_, 1)),
                                    std::as_writable_bytes(std::span(calls_)));
  }
  if (!calls_transfer_->test()) return false;
  calls_transfer_.reset();
  return true;
}

const Call& Group::call_of(int member) const {
  return num_nodes() == 1 ? local_.call_of(member, num_finished_) : at(calls_, member);
}

// Compares all ranks' calls. Every rank looks at the same calls, so all of them throw the same message.
void Group::check_calls() const {
  const Call& first = call_of(0);
  for (int member = 1; member < size(); ++member) {
    const Call& other = call_of(member);
    if (other.agrees_with(first)) continue;
    throw Mismatch("ranks disagree on collective " + std::to_string(num_finished_) + " of this group: rank 0 calls " +
                   first.description() + ", rank " + std::to_string(member) + " calls " + other.description() +
                   ". Call the same collectives in the same order on every rank");
  }
}

bool Group::has_even_parts() const {
  const std::uint64_t even_bytes = call_of(0).even_bytes;
  for (int member = 1; member < size(); ++member) {
    if (call_of(member).even_bytes != even_bytes) return false;
  }
  return even_bytes != 0;
}

std::vector<std::byte*> Group::shared_buffers(std::size_t num_bytes) const {
  for (int member = 1; member < size(); ++member) {
    if (call_of(member).allocation != call_of(0).allocation) return {};
  }
  return local_.shared_buffers(num_finished_, num_bytes);
}

void Group::check_all_here() const {
  const Operation& head = *queue_.front();
  const auto leaves = [&](int member) {
    return RankLeft("rank " + std::to_string(member) + " has left the job, or closed its trainer, while rank " +
                    std::to_string(rank()) + " waits for it in " + head.call_.description() + ", collective " +
                    std::to_string(num_finished_) + " of this group. Make the same number of calls on every rank");
  };
  for (const auto& [member, num_completed] : left_elsewhere_) {
    if (num_completed <= num_finished_) throw leaves(member);
  }
  const int neighbour = local_.first_left(num_finished_);
  if (neighbour < 0 || neighbour == local_.rank()) return;
  const int member = at(ranks_of_node(node()), neighbour);
  const std::string reason = local_.reason_of(neighbour);
  // The neighbour may have left after it arrived where this rank waits; then the wait is over by now.
  if (reason.empty() && (!head.task_ ? local_.all_posted(num_finished_) : head.task_->is_ready())) return;
  if (!reason.empty()) throw RankLeft("rank " + std::to_string(member) + " has given up this group: " + reason);
  throw leaves(member);
}

// Returns the ranks that have not called the head of the queue, as far as this rank knows.
std::vector<std::pair<int, std::optional<LastSeen>>> Group::absent() const {
  std::vector<std::pair<int, std::optional<LastSeen>>> ranks;
  const std::vector<int>& neighbours = ranks_of_node(node());
  for (int member = 0; member < size(); ++member) {
    const auto neighbour = std::ranges::find(neighbours, member);
    std::optional<LastSeen> seen;
    if (neighbour != neighbours.end()) {
      seen = local_.last_seen(static_cast<int>(neighbour - neighbours.begin()));
    } else if (!others_.empty()) {
      seen = at(others_, member);
    }
    if (!seen || seen->num_calls <= num_finished_) ranks.emplace_back(member, seen);
  }
  return ranks;
}

bool Group::knows_all() const {
  for (int member = 0; member < size(); ++member) {
    if (at(node_of_rank_, member) != node() && !at(others_, member)) {
      return false;
    }
  }
  return true;
}

std::string Group::describe_wait(const Operation& operation) const {
  const auto number = [this](const Operation& one) {
    const auto place = std::ranges::find(queue_, &one, &std::shared_ptr<Operation>::get);
    return num_finished_ + static_cast<std::uint64_t>(place - queue_.begin());
  };
  const auto tell = [](const std::optional<LastSeen>& seen) -> std::string {
    if (!seen) return " does not answer";
    if (seen->num_calls == 0) return " has called nothing in this group";
    char ago[32];
    std::snprintf(ago, sizeof(ago), "%.1f s ago", seen->seconds_ago);
    return " was last seen in collective " + std::to_string(seen->num_calls - 1) + ", " + seen->call.description() +
           ", which it called " + ago;
  };
  std::string text = "rank " + std::to_string(rank()) + " waits in " + operation.call_.description();
  if (operation.is_message()) {
    for (const auto& [member, seen] : absent()) {
      if (member == operation.call_.root) text += "; rank " + std::to_string(member) + tell(seen);
    }
    return text;
  }
  text += ", collective " + std::to_string(number(operation)) + " of a group of " + std::to_string(size()) + " ranks";
  const auto missing = absent();
  for (const auto& [member, seen] : missing) text += "; rank " + std::to_string(member) + tell(seen);
  if (missing.empty())
    text += "; all ranks have arrived, but the data has not: check whether a rank was stopped or killed";
  return text;
}

void Group::finish_head(std::exception_ptr error) {
  const std::shared_ptr<Operation> head = std::move(queue_.front());
  queue_.pop_front();
  ++num_finished_;
  if (!error) ++counters_->collectives;
  finish(head, std::move(error));
}

void Group::finish(const std::shared_ptr<Operation>& operation, std::exception_ptr error) {
  // Collectives of one node make no MPI calls; messages always do.
  if (error && (num_nodes() > 1 || operation->is_message())) {
    abandoned_.push_back(operation);  // MPI may still write into its buffers
  } else {
    operation->task_.reset();  // frees its temporary memory
  }
  operation->error_ = std::move(error);
  operation->done_at_ = std::chrono::steady_clock::now();
  operation->done_.store(1, std::memory_order_release);
  futex_wake_all(operation->done_);
}

void Group::fail(std::exception_ptr error) {
  if (!failure_) failure_ = std::move(error);
  while (!queue_.empty()) finish_head(failure_);
  for (const auto& message : messages_) finish(message, failure_);
  messages_.clear();
}

}  // namespace dtrain
