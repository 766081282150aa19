// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstring>
#include <sstream>
#include <string>
#include <string_view>
#include <vector>

#include "collectives/long_message.hpp"
#include "fuzz/targets.hpp"
#include "mpi/version_exchange.hpp"
#include "runtime/status.hpp"

namespace dtrain::fuzz {

void texts(std::span<const std::byte> bytes) {
  const std::string text(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  state_in_stat({reinterpret_cast<const char*>(bytes.data()), bytes.size()});  // no copy: a read past its end is seen
  for (const char* start : {"0::", ":memory:"}) {
    std::istringstream cgroups(text);
    cgroup_path(cgroups, start);
  }
  std::istringstream counts(text);
  num_killed_in(counts);
  mpi::texts_in(bytes);

  // Receive as many bytes as the header says: the bytes that come with it, then the pieces.
  for (const std::size_t step : {message_bytes, std::size_t{1} << 30}) {
    std::vector<std::byte> first(bytes.begin(), bytes.end());
    parse_long_header(first, step);
    first.resize(sizeof(LongHeader) + bytes_with_header(step));
    const auto header = parse_long_header(first, step);
    if (!header || header->num_bytes > 2 * message_bytes) continue;
    std::vector<std::byte> buffer(header->num_bytes);
    std::ranges::copy(first, buffer.begin());
    std::memmove(buffer.data(), buffer.data() + sizeof(LongHeader), bytes_with_header(step));
    std::vector<bool> is_taken(num_piece_tags);
    is_taken.at(static_cast<std::size_t>(header->piece_tag - first_piece_tag)) = true;
  }
}

}  // namespace dtrain::fuzz
