// SPDX-License-Identifier: Apache-2.0
#include "collectives/messages.hpp"

#include <algorithm>
#include <string>

#include "collectives/errors.hpp"
#include "collectives/parts.hpp"
#include "mpi/library.hpp"

namespace dtrain {

void receive_pieces(const Group& group, std::span<std::byte> bytes, int source, int tag,
                    std::vector<mpi::Transfer>& transfers) {
  for (std::size_t start = 0; start < bytes.size(); start += message_bytes) {
    transfers.push_back(group.receive(window(bytes, start, message_bytes), source, tag));
  }
}

void send_pieces(const Group& group, std::span<const std::byte> bytes, int destination, int tag,
                 std::vector<mpi::Transfer>& transfers) {
  for (std::size_t start = 0; start < bytes.size(); start += message_bytes) {
    transfers.push_back(group.send(window(bytes, start, message_bytes), destination, tag));
  }
}

Task send(Group& group, std::span<const std::byte> bytes, int destination, int tag) {
  std::size_t start = 0;
  do {  // an empty tensor is a message too
    mpi::Transfer transfer =
        group.send(window(bytes, start, mpi::max_transfer_bytes), destination, first_user_tag + tag);
    auto sent = Until([&transfer] { return transfer.test(); });
    co_await sent;
    start += mpi::max_transfer_bytes;
  } while (start < bytes.size());
}

Task receive(Group& group, std::span<std::byte> bytes, int source, int tag, Operation& operation) {
  std::size_t start = 0;
  do {
    const auto piece = window(bytes, start, mpi::max_transfer_bytes);
    mpi::Transfer transfer = group.receive(piece, source, first_user_tag + tag);
    auto arrived = Until([&transfer] { return transfer.test(); });
    co_await arrived;
    source = transfer.source();  // the rest is of the same rank
    if (transfer.num_bytes() != piece.size()) {
      throw Mismatch("rank " + std::to_string(group.rank()) + " receives " + std::to_string(bytes.size()) +
                     " bytes with tag " + std::to_string(tag) + ", but rank " + std::to_string(source) + " sent " +
                     std::to_string(start + transfer.num_bytes()) + ". Make both tensors the same size");
    }
    start += mpi::max_transfer_bytes;
  } while (start < bytes.size());
  operation.set_source(source);
}

}  // namespace dtrain
