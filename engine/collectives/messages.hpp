// SPDX-License-Identifier: Apache-2.0
// Messages between two ranks: those of a collective, cut into pieces that MPI moves well, and those that users send.
#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "collectives/group.hpp"
#include "collectives/long_message.hpp"

namespace dtrain {

// `tag` is a collective's: less than first_piece_tag.
void receive_pieces(const Group& group, std::span<std::byte> bytes, int source, int tag,
                    std::vector<mpi::Transfer>& transfers);
void send_pieces(const Group& group, std::span<const std::byte> bytes, int destination, int tag,
                 std::vector<mpi::Transfer>& transfers);

// A user's message to rank `destination` of the group. Messages of one tag between two ranks keep their order.
Task send(Group& group, std::span<const std::byte> bytes, int destination, int tag);

// A user's message of rank `source`, or of any_source; operation.source() tells whose it was. Throws Mismatch where the
// message is not as long as `bytes`.
Task receive(Group& group, std::span<std::byte> bytes, int source, int tag, Operation& operation);

}  // namespace dtrain
