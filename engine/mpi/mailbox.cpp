// SPDX-License-Identifier: Apache-2.0
#include "mpi/mailbox.hpp"

#include "mpi/library.hpp"

namespace dtrain::mpi {
namespace {

constexpr int message_tag = 0;

}  // namespace

void Mailbox::post(std::span<const std::byte> message, int destination) {
  const std::scoped_lock lock(mutex_);
  require_open();
  Outgoing& outgoing = outgoing_.emplace_back();
  outgoing.message.assign(message.begin(), message.end());
  outgoing.transfer = is_synchronous_ ? communicator_.send_synchronously(outgoing.message, destination, message_tag)
                                      : communicator_.send(outgoing.message, destination, message_tag);
}

bool Mailbox::is_flushed() {
  const std::scoped_lock lock(mutex_);
  require_open();
  while (!outgoing_.empty() && outgoing_.front().transfer.test()) outgoing_.pop_front();
  return outgoing_.empty();
}

std::optional<std::vector<std::byte>> Mailbox::collect() {
  const std::scoped_lock lock(mutex_);
  require_open();
  return communicator_.receive_any(message_tag);
}

Transfer Mailbox::barrier() {
  const std::scoped_lock lock(mutex_);
  require_open();
  return communicator_.barrier();
}

void Mailbox::close() {
  const std::scoped_lock lock(mutex_);
  is_closed_ = true;
}

void Mailbox::require_open() const {
  if (is_closed_) throw Error("the engine was closed: it no longer passes messages on");
}

}  // namespace dtrain::mpi
