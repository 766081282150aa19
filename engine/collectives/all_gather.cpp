// SPDX-License-Identifier: Apache-2.0
#include "collectives/all_gather.hpp"

#include <algorithm>
#include <cstring>
#include <vector>

namespace dtrain {

Task all_gather(Group& group, std::span<const std::byte> input, std::span<std::byte> output) {
  const auto size = static_cast<std::size_t>(group.size());
  const bool one_node = group.num_nodes() == 1;
  std::vector<std::byte> received;  // pieces arrive side by side, but lie apart in the output
  for (std::size_t start = 0; start < input.size(); start += LocalGroup::scratch_bytes) {
    const auto work = input.subspan(start, std::min(LocalGroup::scratch_bytes, input.size() - start));
    std::vector<std::byte*> pieces;
    if (one_node) {
      pieces = group.local().next_scratch();
      std::memcpy(pieces[static_cast<std::size_t>(group.rank())], work.data(), work.size());
      auto filled = group.local().barrier();
      co_await filled;
    } else {
      received.resize(work.size() * size);
      for (std::size_t rank = 0; rank < size; ++rank) pieces.push_back(received.data() + rank * work.size());
      mpi::Transfer transfer = group.gather_to_all(work, received);
      auto arrived = Until([&transfer] { return transfer.test(); });
      co_await arrived;
    }
    for (std::size_t rank = 0; rank < size; ++rank) {
      std::memcpy(output.data() + rank * input.size() + start, pieces[rank], work.size());
    }
  }
}

}  // namespace dtrain
