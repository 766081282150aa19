// SPDX-License-Identifier: Apache-2.0
#include "collectives/broadcast.hpp"

#include <algorithm>
#include <cstring>
#include <vector>

#include "at.hpp"
#include "collectives/arguments.hpp"
#include "collectives/messages.hpp"
#include "collectives/parts.hpp"

namespace dtrain {
namespace {

// Up to this length, separate broadcasts of short pieces are faster, since MPI sends each of them at once; longer
// broadcasts MPI cuts itself.
constexpr std::size_t longest_in_pieces = std::size_t{1} << 20;

Task run_broadcast(Group& group, std::span<std::byte> buffer, int root) {
  if (group.size() == 1 || buffer.empty()) co_return;
  const bool one_node = group.num_nodes() == 1;
  const std::size_t step = one_node ? LocalGroup::scratch_bytes : mpi::max_transfer_bytes;
  for (std::size_t start = 0; start < buffer.size(); start += step) {
    const auto work = buffer.subspan(start, std::min(step, buffer.size() - start));
    if (one_node) {
      std::byte* const place = at(group.local().next_scratch(), root);
      if (group.rank() == root) std::memcpy(place, work.data(), work.size());
      auto filled = group.local().barrier();
      co_await filled;
      if (group.rank() != root) std::memcpy(work.data(), place, work.size());
    } else {
      std::vector<mpi::Transfer> transfers;
      const std::size_t piece = work.size() <= longest_in_pieces ? message_bytes : work.size();
      for (std::size_t i = 0; i < work.size(); i += piece) {
        transfers.push_back(group.broadcast(window(work, i, piece), root));
      }
      auto arrived = Until([&transfers] { return mpi::test_all(transfers); });
      co_await arrived;
    }
  }
}

}  // namespace

PreparedCall broadcast(Group& group, std::span<std::byte> buffer, int root, DataType dtype) {
  check_rank("broadcast", "root", root, group);
  return {.group = group,
          .call = {.collective = Collective::broadcast,
                   .dtype = dtype,
                   .root = root,
                   .count = buffer.size() / element_bytes(dtype)},
          .start = [&group, buffer, root](Operation&) { return run_broadcast(group, buffer, root); },
          .buffer = buffer};
}

}  // namespace dtrain
