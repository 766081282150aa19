// SPDX-License-Identifier: Apache-2.0
// How a user's message begins that is longer than message_bytes.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <span>

namespace dtrain {

// Collectives cut the bytes that cross between nodes into messages of at most this length. MPIs send messages of up to
// 64 KiB at once. For longer ones they first ask whether the receiver is ready, and over TCP the answer waits behind
// everything that the receiver is sending.
inline constexpr std::size_t message_bytes = std::size_t{60} << 10;

// MPI's tags are, in this order: those of collectives; those of the pieces of long messages, which messages use in
// turn; those of users.
inline constexpr int first_piece_tag = 1 << 16;
inline constexpr int num_piece_tags = 1 << 15;
inline constexpr int first_user_tag = first_piece_tag + num_piece_tags;

// Header of a long message. It lets the receiver cut the message as the sender does. The pieces have a tag of their
// own, since other messages of the user's tag may be under way at once, before and after it. Between nodes the first
// bytes travel with the header: meanwhile the receiver tells MPI where the next bytes belong, so that MPI need not copy
// them.
struct LongHeader {
  std::array<std::uint64_t, 2> mark;
  std::uint64_t num_bytes;
  std::int64_t piece_tag;
};
inline constexpr std::array<std::uint64_t, 2> long_mark{0x6d8f3b1c92e45a07U, 0xb15c0e7a43d9f286U};

// Number of bytes that come with the header of a message whose pieces have `step` bytes.
constexpr std::size_t bytes_with_header(std::size_t step) {
  return step == message_bytes ? message_bytes - sizeof(LongHeader) : 0;
}

// Returns the header of a message that begins with `first` and is cut into pieces of `step` bytes; none if `first` is
// the whole message.
inline std::optional<LongHeader> parse_long_header(std::span<const std::byte> first, std::size_t step) {
  LongHeader header{};
  if (first.size() != sizeof(header) + bytes_with_header(step)) return std::nullopt;
  std::memcpy(&header, first.data(), sizeof(header));
  const bool is_piece_tag = header.piece_tag >= first_piece_tag && header.piece_tag < first_user_tag;
  if (header.mark != long_mark || header.num_bytes <= message_bytes || !is_piece_tag) return std::nullopt;
  return header;
}

}  // namespace dtrain
