// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <deque>
#include <mutex>
#include <optional>
#include <span>
#include <vector>

#include "mpi/communicator.hpp"

namespace dtrain::mpi {

// Short messages between any two ranks, without a receiver that waits for them. Calls may come from any thread; they
// advance the messages but never block. They throw Error once the mailbox is closed, which must happen before MPI is
// finalised.
class Mailbox {
 public:
  // Takes over `communicator`, on which nothing else may be sent. `is_synchronous`: is_flushed() then returns whether
  // everything posted has been collected.
  explicit Mailbox(Communicator communicator, bool is_synchronous = false)
      : communicator_(communicator), is_synchronous_(is_synchronous) {}

  int rank() const { return communicator_.rank(); }
  int size() const { return communicator_.size(); }

  void post(std::span<const std::byte> message, int destination);
  // Whether everything posted has left this rank.
  bool is_flushed();
  // Returns a message that has arrived from any rank, or none. Messages of one rank arrive in order.
  std::optional<std::vector<std::byte>> collect();
  // Starts a barrier, which is complete when all ranks have called it. Collective, does not block.
  Transfer barrier();
  // Makes the mailbox's communicator fail; see Communicator::revoke().
  void revoke() { communicator_.revoke(); }
  void close();

 private:
  void require_open() const;

  struct Outgoing {
    std::vector<std::byte> message;
    Transfer transfer;
  };

  std::mutex mutex_;
  Communicator communicator_;
  const bool is_synchronous_;
  bool is_closed_ = false;
  std::deque<Outgoing> outgoing_;
};

}  // namespace dtrain::mpi
