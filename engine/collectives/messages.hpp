// SPDX-License-Identifier: Apache-2.0
// Messages between two ranks: those of a collective, cut into pieces that MPI moves well, and those that users send.
#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "collectives/group.hpp"

namespace dtrain {

// Collectives cut what crosses into messages of at most this length. MPIs send messages up to 64 KiB at once; for
// longer ones they ask first whether the receiver is ready, and over TCP the answer waits behind all that the receiver
// is sending.
inline constexpr std::size_t message_bytes = std::size_t{60} << 10;

// `tag` is a collective's: less than first_piece_tag.
void receive_pieces(const Group& group, std::span<std::byte> bytes, int source, int tag,
                    std::vector<mpi::Transfer>& transfers);
void send_pieces(const Group& group, std::span<const std::byte> bytes, int destination, int tag,
                 std::vector<mpi::Transfer>& transfers);

// MPI's tags: those of collectives, then those of long messages' pieces, which messages take in turn, then users'.
inline constexpr int first_piece_tag = 1 << 16;
inline constexpr int num_piece_tags = 1 << 15;
inline constexpr int first_user_tag = first_piece_tag + num_piece_tags;

// A user's message to rank `destination` of the group. Messages of one tag between two ranks keep their order.
Task send(Group& group, std::span<const std::byte> bytes, int destination, int tag);

// A user's message of rank `source`, or of any_source; operation.source() tells whose it was. Throws Mismatch where the
// message is not as long as `bytes`.
Task receive(Group& group, std::span<std::byte> bytes, int source, int tag, Operation& operation);

}  // namespace dtrain
