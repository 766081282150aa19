// SPDX-License-Identifier: Apache-2.0
#include "collectives/all_gather.hpp"

#include <algorithm>
#include <utility>

#include "collectives/arguments.hpp"
#include "collectives/parts.hpp"

namespace dtrain {
namespace {

Task run_all_gather(Group& group, std::span<const std::byte> input, std::vector<std::span<std::byte>> outputs) {
  const auto size = static_cast<std::size_t>(group.size());
  const auto own = static_cast<std::size_t>(group.rank());
  const bool one_node = group.num_nodes() == 1;
  std::size_t longest = 0;
  for (const auto output : outputs) longest = std::max(longest, output.size());
  std::vector<std::byte>
      received;  // pieces arrive side by side and lie apart in the outputs; the last place is this rank's input
  for (std::size_t start = 0; start < longest; start += LocalGroup::scratch_bytes) {
    const std::size_t num_bytes = std::min(LocalGroup::scratch_bytes, longest - start);
    const auto work = window(input, start, num_bytes);
    std::vector<std::byte*> pieces;
    if (one_node) {
      pieces = group.local().next_scratch();
      copy(work, pieces[own]);
      auto filled = group.local().barrier();
      co_await filled;
    } else {
      received.resize(num_bytes * (size + 1));
      for (std::size_t rank = 0; rank <= size; ++rank) pieces.push_back(received.data() + rank * num_bytes);
      copy(work, pieces[size]);
      mpi::Transfer transfer = group.gather_to_all({pieces[size], num_bytes}, {pieces[0], num_bytes * size});
      auto arrived = Until([&transfer] { return transfer.test(); });
      co_await arrived;
    }
    for (std::size_t rank = 0; rank < size; ++rank) {
      const auto output = window(outputs[rank], start, num_bytes);
      const std::byte* const piece = rank == own ? work.data() : pieces[rank];
      if (output.data() != piece) copy({piece, output.size()}, output.data());
    }
  }
}

}  // namespace

PreparedCall all_gather(Group& group, std::span<const std::byte> input, std::vector<std::span<std::byte>> outputs,
                        DataType dtype) {
  check_parts("all_gather", "outputs", outputs, input, group);
  Call call{.collective = Collective::all_gather, .dtype = dtype};
  describe_parts(outputs, call);
  return {.group = group, .call = call, .start = [&group, input, outputs = std::move(outputs)](Operation&) {
            return run_all_gather(group, input, outputs);
          }};
}

}  // namespace dtrain
