// SPDX-License-Identifier: Apache-2.0
#include "collectives/exchange.hpp"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>

#include "collectives/errors.hpp"
#include "collectives/messages.hpp"
#include "collectives/parts.hpp"

namespace dtrain {
namespace {

// Lengths that every rank sends to every other rank and expects from it: for each rank, a row of 2 N numbers of bytes.
class Lengths {
 public:
  Lengths(std::size_t size, std::vector<std::uint64_t> rows) : size_(size), rows_(std::move(rows)) {}

  static std::vector<std::uint64_t> row(const std::vector<std::span<const std::byte>>& sends,
                                        const std::vector<std::span<std::byte>>& receives) {
    std::vector<std::uint64_t> lengths;
    for (const auto send : sends) lengths.push_back(send.size());
    for (const auto receive : receives) lengths.push_back(receive.size());
    return lengths;
  }

  std::uint64_t sent(std::size_t from, std::size_t to) const { return rows_[from * 2 * size_ + to]; }
  std::uint64_t expected(std::size_t from, std::size_t to) const { return rows_[to * 2 * size_ + size_ + from]; }

  void check(std::uint64_t sequence, std::size_t element_bytes) const {
    for (std::size_t from = 0; from < size_; ++from) {
      for (std::size_t to = 0; to < size_; ++to) {
        if (sent(from, to) == expected(from, to)) continue;
        throw Mismatch("ranks disagree on collective " + std::to_string(sequence) + " of this group: rank " +
                       std::to_string(from) + " has " + std::to_string(sent(from, to) / element_bytes) +
                       " elements for rank " + std::to_string(to) + ", which has room for " +
                       std::to_string(expected(from, to) / element_bytes) +
                       ". Let each rank send as many elements as its peer receives");
      }
    }
  }

 private:
  std::size_t size_;
  std::vector<std::uint64_t> rows_;
};

// The k-th rank to which `from` sends. It begins with the rank after it, so that not all ranks send to the same one at
// once.
std::size_t target(std::size_t from, std::size_t k, std::size_t size) { return (from + k) % size; }

// Offset of `from`'s message for `to` in the row of its messages.
std::size_t offset(const Lengths& lengths, std::size_t from, std::size_t to, std::size_t size) {
  std::size_t start = 0;
  for (std::size_t k = 1; target(from, k, size) != to; ++k) start += lengths.sent(from, target(from, k, size));
  return start;
}

}  // namespace

Task exchange(Group& group, std::vector<std::span<const std::byte>> sends, std::vector<std::span<std::byte>> receives,
              std::size_t element_bytes) {
  const auto size = static_cast<std::size_t>(group.size());
  const auto own = static_cast<std::size_t>(group.rank());
  const bool one_node = group.num_nodes() == 1;
  const std::vector<std::uint64_t> row = Lengths::row(sends, receives);
  const auto row_bytes = std::as_bytes(std::span(row));
  std::vector<std::uint64_t> rows(row.size() * size);
  if (group.has_even_parts()) {
    rows.assign(rows.size(), sends[own].size());
  } else if (one_node) {
    const std::vector<std::byte*> scratch = group.local().next_scratch();
    std::memcpy(scratch[own], row_bytes.data(), row_bytes.size());
    auto filled = group.local().barrier();
    co_await filled;
    for (std::size_t rank = 0; rank < size; ++rank) {
      std::memcpy(rows.data() + rank * row.size(), scratch[rank], row_bytes.size());
    }
  } else {
    mpi::Transfer transfer = group.gather_to_all(row_bytes, std::as_writable_bytes(std::span(rows)));
    auto arrived = Until([&transfer] { return transfer.test(); });
    co_await arrived;
  }
  const Lengths lengths(size, std::move(rows));
  lengths.check(group.sequence(), element_bytes);
  copy(sends[own], receives[own].data());

  if (!one_node) {
    std::vector<mpi::Transfer> transfers;
    for (std::size_t k = 1; k < size; ++k) {
      const std::size_t from = target(own, size - k, size);
      receive_pieces(group, receives[from], static_cast<int>(from), 0, transfers);
    }
    for (std::size_t k = 1; k < size; ++k) {
      const std::size_t to = target(own, k, size);
      send_pieces(group, sends[to], static_cast<int>(to), 0, transfers);
    }
    auto exchanged = Until([&transfers] { return mpi::test_all(transfers); });
    co_await exchanged;
    co_return;
  }

  std::size_t longest = 0;
  for (std::size_t from = 0; from < size; ++from) {
    longest = std::max(longest, offset(lengths, from, from,
                                       size));  // the end of the row: a rank's message to itself would be last
  }
  for (std::size_t start = 0; start < longest; start += LocalGroup::scratch_bytes) {
    // Every row of messages is cut at the same places; `piece` is the part of a message between two of them.
    const auto piece = [&](auto message, std::size_t message_start) {
      const std::size_t skipped = start > message_start ? start - message_start : 0;
      const std::size_t behind = message_start > start ? message_start - start : 0;
      const std::size_t room = behind < LocalGroup::scratch_bytes ? LocalGroup::scratch_bytes - behind : 0;
      return std::pair(window(message, skipped, room), behind);
    };
    const std::vector<std::byte*> scratch = group.local().next_scratch();
    for (std::size_t k = 1; k < size; ++k) {
      const std::size_t to = target(own, k, size);
      const auto [bytes, place] = piece(sends[to], offset(lengths, own, to, size));
      copy(bytes, scratch[own] + place);
    }
    auto filled = group.local().barrier();
    co_await filled;
    for (std::size_t k = 1; k < size; ++k) {
      const std::size_t from = target(own, size - k, size);
      const auto [bytes, place] = piece(receives[from], offset(lengths, from, own, size));
      copy({scratch[from] + place, bytes.size()}, bytes.data());
    }
  }
}

}  // namespace dtrain
