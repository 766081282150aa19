// SPDX-License-Identifier: Apache-2.0
// Messages between two ranks: messages of a collective, cut into pieces that MPI moves well, and messages that users
// send.
#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "collectives/long_message.hpp"
#include "collectives/prepared_call.hpp"

namespace dtrain {

// Start to receive or send the pieces of a collective's message. `tag` is a collective's: less than first_piece_tag.
void receive_pieces(const Group& group, std::span<std::byte> bytes, int source, int tag,
                    std::vector<mpi::Transfer>& transfers);
void send_pieces(const Group& group, std::span<const std::byte> bytes, int destination, int tag,
                 std::vector<mpi::Transfer>& transfers);

// A user's message concerns only two ranks: it has no place in the group's sequence, and may overtake the collectives
// in it.

// Sends `bytes` to rank `destination` of `group`. Messages of one tag between two ranks keep their order.
PreparedCall send(Group& group, std::span<const std::byte> bytes, int destination, int tag, DataType dtype);

// Receives a message of rank `source` of `group`, or of any_source; operation.source() is the rank that sent it. The
// operation throws Mismatch if the message is not as long as `bytes`.
PreparedCall receive(Group& group, std::span<std::byte> bytes, int source, int tag, DataType dtype);

}  // namespace dtrain
