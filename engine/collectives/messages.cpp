// SPDX-License-Identifier: Apache-2.0
#include "collectives/messages.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "collectives/arguments.hpp"
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

namespace {

// Within a node MPI copies large messages at once; between nodes it moves short ones better.
std::size_t piece_bytes(const Group& group, int peer) {
  const std::vector<int>& neighbours = group.ranks_of_node(group.node());
  return std::ranges::binary_search(neighbours, peer) ? mpi::max_transfer_bytes : message_bytes;
}

void check_tag(const char* call, int tag, const Group& group) {
  const int largest = group.max_tag() - first_user_tag;
  if (tag >= 0 && tag <= largest) return;
  throw std::invalid_argument(std::string(call) + ": the tag is " + std::to_string(tag) + ", this MPI takes 0 to " +
                              std::to_string(largest));
}

Task run_send(Group& group, std::span<const std::byte> bytes, int destination, int tag) {
  std::vector<std::byte> first;  // lives until it is sent
  std::vector<mpi::Transfer> transfers;
  if (bytes.size() <= message_bytes) {
    transfers.push_back(group.send(bytes, destination, first_user_tag + tag));
  } else {
    const int piece_tag = first_piece_tag + static_cast<int>(group.number_long_message() % num_piece_tags);
    const LongHeader header{long_mark, bytes.size(), piece_tag};
    const std::size_t step = piece_bytes(group, destination);
    const std::size_t begun = bytes_with_header(step);
    first.resize(sizeof(header) + begun);
    std::memcpy(first.data(), &header, sizeof(header));
    std::memcpy(first.data() + sizeof(header), bytes.data(), begun);
    transfers.push_back(group.send(first, destination, first_user_tag + tag));
    for (std::size_t start = begun; start < bytes.size(); start += step) {
      transfers.push_back(group.send(window(bytes, start, step), destination, piece_tag));
    }
  }
  auto sent = Until([&transfers] { return mpi::test_all(transfers); });
  co_await sent;
}

Task run_receive(Group& group, std::span<std::byte> bytes, int source, int tag, Operation& operation) {
  const auto refuse = [&](const std::string& what) {
    throw Mismatch("rank " + std::to_string(group.rank()) + " receives " + std::to_string(bytes.size()) +
                   " bytes with tag " + std::to_string(tag) + ", but " + what + ". Make both tensors the same size");
  };
  mpi::Transfer first = group.receive(window(bytes, 0, message_bytes), source, first_user_tag + tag);
  auto arrived = Until([&] {
    try {
      return first.test();
    } catch (const mpi::Error& error) {  // the message is too long
      refuse(error.what());
      return true;
    }
  });
  co_await arrived;
  const int from = first.source();
  const std::size_t step = piece_bytes(group, from);
  const auto header = parse_long_header(bytes.first(first.num_bytes()), step);
  const std::size_t num_bytes = header ? header->num_bytes : first.num_bytes();
  if (num_bytes != bytes.size()) {
    refuse("rank " + std::to_string(from) + " sent " + std::to_string(num_bytes));
  }
  if (header) {
    std::vector<mpi::Transfer> transfers;
    const int piece_tag = static_cast<int>(header->piece_tag);
    const std::size_t begun = bytes_with_header(step);
    std::memmove(bytes.data(), bytes.data() + sizeof(LongHeader), begun);
    for (std::size_t start = begun; start < bytes.size(); start += step) {
      transfers.push_back(group.receive(window(bytes, start, step), from, piece_tag));
    }
    auto all_arrived = Until([&transfers] { return mpi::test_all(transfers); });
    co_await all_arrived;
  }
  operation.set_source(from);
}

}  // namespace

PreparedCall send(Group& group, std::span<const std::byte> bytes, int destination, int tag, DataType dtype) {
  check_rank("send", "destination", destination, group);
  check_tag("send", tag, group);
  return {.group = group,
          .call = {.collective = Collective::send,
                   .dtype = dtype,
                   .root = destination,
                   .count = bytes.size() / element_bytes(dtype)},
          .start = [&group, bytes, destination, tag](Operation&) { return run_send(group, bytes, destination, tag); }};
}

PreparedCall receive(Group& group, std::span<std::byte> bytes, int source, int tag, DataType dtype) {
  if (source != mpi::any_source) check_rank("receive", "source", source, group);
  check_tag("receive", tag, group);
  return {.group = group,
          .call = {.collective = Collective::receive,
                   .dtype = dtype,
                   .root = source,
                   .count = bytes.size() / element_bytes(dtype)},
          .start = [&group, bytes, source, tag](Operation& operation) {
            return run_receive(group, bytes, source, tag, operation);
          }};
}

}  // namespace dtrain
