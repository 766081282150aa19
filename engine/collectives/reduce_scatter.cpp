// SPDX-License-Identifier: Apache-2.0
#include "collectives/reduce_scatter.hpp"

#include <algorithm>
#include <utility>
#include <vector>

#include "collectives/arguments.hpp"
#include "collectives/parts.hpp"

namespace dtrain {
namespace {

Task run_reduce_scatter(Group& group, std::vector<std::span<const std::byte>> inputs, std::span<std::byte> output,
                        Reduction reduction) {
  const auto size = static_cast<std::size_t>(group.size());
  const auto own_rank = static_cast<std::size_t>(group.rank());
  const bool one_node = group.num_nodes() == 1;
  if (reduction.op == ReduceOp::average) reduction.scale = 1.0 / group.size();
  constexpr std::size_t line_bytes = 64;
  const std::size_t step = std::max(LocalGroup::scratch_bytes / size / line_bytes, std::size_t{1}) * line_bytes;

  std::size_t longest = 0;
  for (const auto input : inputs) longest = std::max(longest, input.size());
  std::vector<std::byte> received;
  for (std::size_t start = 0; start < longest; start += step) {
    const std::size_t num_bytes = window(output, start, step).size();
    const auto input_piece = [&](std::size_t rank) { return window(inputs[rank], start, step); };
    std::vector<const std::byte*> sources(size, input_piece(own_rank).data());
    if (one_node) {
      const std::vector<std::byte*> scratch = group.local().next_scratch();
      for (std::size_t rank = 0; rank < size; ++rank) {
        copy(input_piece(rank), scratch[own_rank] + rank * step);
        sources[rank] = scratch[rank] + own_rank * step;
      }
      auto filled = group.local().barrier();
      co_await filled;
    } else {
      received.resize(num_bytes * size);
      std::vector<mpi::Transfer> transfers;
      for (std::size_t rank = 0; rank < size; ++rank) {
        if (rank == own_rank) continue;
        const std::span<std::byte> place(received.data() + rank * num_bytes, num_bytes);
        transfers.push_back(group.receive(place, static_cast<int>(rank), 0));
        transfers.push_back(group.send(input_piece(rank), static_cast<int>(rank), 0));
        sources[rank] = place.data();
      }
      auto exchanged = Until([&transfers] { return mpi::test_all(transfers); });
      co_await exchanged;
    }
    std::byte* const result = window(output, start, step).data();
    reduce(sources, {&result, 1}, num_bytes / element_bytes(reduction.dtype), reduction);
  }
}

}  // namespace

PreparedCall reduce_scatter(Group& group, std::vector<std::span<const std::byte>> inputs, std::span<std::byte> output,
                            const Reduction& reduction) {
  check_reduction("reduce_scatter", reduction);
  check_parts("reduce_scatter", "inputs", inputs, output, group);
  Call call{.collective = Collective::reduce_scatter,
            .dtype = reduction.dtype,
            .op = reduction.op,
            .wire_dtype = reduction.dtype};
  describe_parts(inputs, call);
  return {.group = group,
          .call = call,
          .start = [&group, inputs = std::move(inputs), output,
                    reduction](Operation&) { return run_reduce_scatter(group, inputs, output, reduction); },
          .buffer = output};
}

}  // namespace dtrain
