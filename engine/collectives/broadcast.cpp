// SPDX-License-Identifier: Apache-2.0
#include "collectives/broadcast.hpp"

#include <algorithm>
#include <cstring>
#include <vector>

#include "collectives/messages.hpp"
#include "collectives/parts.hpp"

namespace dtrain {

// Up to here it pays that MPI sends each piece at once; longer ones it cuts itself.
static constexpr std::size_t longest_in_pieces = std::size_t{1} << 20;

Task broadcast(Group& group, std::span<std::byte> buffer, int root) {
  if (group.size() == 1 || buffer.empty()) co_return;
  const bool one_node = group.num_nodes() == 1;
  const std::size_t step = one_node ? LocalGroup::scratch_bytes : mpi::max_transfer_bytes;
  for (std::size_t start = 0; start < buffer.size(); start += step) {
    const auto work = buffer.subspan(start, std::min(step, buffer.size() - start));
    if (one_node) {
      std::byte* const place = group.local().next_scratch()[static_cast<std::size_t>(root)];
      if (group.rank() == root) std::memcpy(place, work.data(), work.size());
      auto filled = group.local().barrier();
      co_await filled;
      if (group.rank() != root) std::memcpy(work.data(), place, work.size());
    } else {
      std::vector<mpi::Transfer> transfers;
      const std::size_t piece = work.size() <= longest_in_pieces ? message_bytes : work.size();
      for (std::size_t i = 0; i < work.size(); i += piece) transfers.push_back(group.broadcast(window(work, i, piece), root));
      auto arrived = Until([&transfers] { return mpi::test_all(transfers); });
      co_await arrived;
    }
  }
}

}  // namespace dtrain
