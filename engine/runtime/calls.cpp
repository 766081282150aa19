// SPDX-License-Identifier: Apache-2.0
// The collectives and messages that an engine offers: what each is called with is checked here, as far as one rank can,
// and put into the words by which ranks compare what they call.
#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

#include "collectives/all_gather.hpp"
#include "collectives/all_reduce.hpp"
#include "collectives/barrier.hpp"
#include "collectives/broadcast.hpp"
#include "collectives/exchange.hpp"
#include "collectives/messages.hpp"
#include "collectives/reduce_scatter.hpp"
#include "runtime/engine.hpp"

namespace dtrain {
namespace {

void check_reduction(const char* collective, const Reduction& reduction) {
  const auto refuse = [&](const char* who) {
    throw std::invalid_argument(std::string(collective) + ": " + name(reduction.op) + " of " + name(reduction.dtype) +
                                ": only " + who + " have it");
  };
  if (reduction.op == ReduceOp::average && !is_floating(reduction.dtype)) refuse("floating types");
  if (is_bitwise(reduction.op) && is_floating(reduction.dtype)) refuse("integers and booleans");
}

void check_rank(const char* call, const char* what, int rank, const Group& group) {
  if (rank >= 0 && rank < group.size()) return;
  throw std::invalid_argument(std::string(call) + ": " + what + " is " + std::to_string(rank) +
                              ", the group has ranks 0 to " + std::to_string(group.size() - 1));
}

void check_tag(const char* call, int tag, int max_tag) {
  if (tag >= 0 && tag <= max_tag - first_user_tag) return;
  throw std::invalid_argument(std::string(call) + ": the tag is " + std::to_string(tag) + ", this MPI takes 0 to " +
                              std::to_string(max_tag - first_user_tag));
}

template <class Byte>
void check_parts(const char* collective, const char* what, const std::vector<std::span<Byte>>& parts,
                 std::span<const std::byte> own, const Group& group) {
  const auto size = static_cast<std::size_t>(group.size());
  const auto rank = static_cast<std::size_t>(group.rank());
  if (parts.size() == size && parts[rank].size() == own.size()) return;
  throw std::invalid_argument(std::string(collective) + ": " + std::to_string(parts.size()) + " " + what + " for " +
                              std::to_string(size) + " ranks" +
                              (parts.size() != size ? std::string()
                                                    : ", of which this rank's has " + std::to_string(parts[rank].size()) +
                                                          " bytes and should have " + std::to_string(own.size())));
}

// Says in `call` of what lengths the ranks' parts are.
template <class Byte>
void describe_parts(const std::vector<std::span<Byte>>& parts, Call& call) {
  bool is_even = true;
  std::uint64_t hash = 14695981039346656037U;  // FNV-1a
  std::uint64_t num_bytes = 0;
  for (const auto part : parts) {
    is_even = is_even && part.size() == parts[0].size();
    hash = (hash ^ part.size()) * 1099511628211U;
    num_bytes += part.size();
  }
  call.count = (is_even ? parts[0].size() : num_bytes) / element_bytes(call.dtype);
  call.parts = is_even ? 0 : hash;
}

// Bytes in all `blocks`, which are to lie in `buffer` and to hold whole elements.
std::size_t check_blocks(const char* collective, std::span<const std::byte> buffer, std::span<const Block> blocks,
                         std::size_t element_bytes) {
  std::size_t num_bytes = 0;
  for (const Block& block : blocks) {
    if (block.offset_bytes > buffer.size() || block.num_bytes > buffer.size() - block.offset_bytes ||
        block.num_bytes % element_bytes != 0) {
      throw std::invalid_argument(std::string(collective) + ": a block of " + std::to_string(block.num_bytes) +
                                  " bytes at " + std::to_string(block.offset_bytes) + " is not within the buffer of " +
                                  std::to_string(buffer.size()) + " bytes, or cuts an element of " +
                                  std::to_string(element_bytes) + " bytes");
    }
    num_bytes += block.num_bytes;
  }
  return num_bytes;
}

}  // namespace

std::shared_ptr<Operation> Engine::all_reduce(Group& group, std::span<std::byte> buffer, const Reduction& reduction) {
  check_reduction("all_reduce", reduction);
  const Call call{.collective = Collective::all_reduce, .dtype = reduction.dtype, .op = reduction.op,
                  .wire_dtype = reduction.wire_dtype.value_or(reduction.dtype),
                  .count = buffer.size() / element_bytes(reduction.dtype), .check_finite = reduction.check_finite};
  return submit(group, call, buffer, [&group, buffer, reduction](Operation&) { return dtrain::all_reduce(group, buffer, reduction); });
}

std::shared_ptr<Operation> Engine::reduce(Group& group, std::span<std::byte> buffer, const Reduction& reduction,
                                          int root) {
  check_reduction("reduce", reduction);
  check_rank("reduce", "root", root, group);
  const Call call{.collective = Collective::reduce, .dtype = reduction.dtype, .op = reduction.op,
                  .wire_dtype = reduction.dtype, .root = root, .count = buffer.size() / element_bytes(reduction.dtype)};
  return submit(group, call, buffer, [&group, buffer, reduction](Operation&) { return dtrain::all_reduce(group, buffer, reduction); });
}

std::shared_ptr<Operation> Engine::broadcast(Group& group, std::span<std::byte> buffer, int root, DataType dtype) {
  check_rank("broadcast", "root", root, group);
  const Call call{.collective = Collective::broadcast, .dtype = dtype, .root = root,
                  .count = buffer.size() / element_bytes(dtype)};
  return submit(group, call, buffer, [&group, buffer, root](Operation&) { return dtrain::broadcast(group, buffer, root); });
}

std::shared_ptr<Operation> Engine::all_gather(Group& group, std::span<const std::byte> input,
                                              std::vector<std::span<std::byte>> outputs, DataType dtype) {
  check_parts("all_gather", "outputs", outputs, input, group);
  Call call{.collective = Collective::all_gather, .dtype = dtype};
  describe_parts(outputs, call);
  return submit(group, call, {}, [&group, input, outputs = std::move(outputs)](Operation&) {
    return dtrain::all_gather(group, input, outputs);
  });
}

std::shared_ptr<Operation> Engine::reduce_scatter(Group& group, std::vector<std::span<const std::byte>> inputs,
                                                  std::span<std::byte> output, const Reduction& reduction) {
  check_reduction("reduce_scatter", reduction);
  check_parts("reduce_scatter", "inputs", inputs, output, group);
  Call call{.collective = Collective::reduce_scatter, .dtype = reduction.dtype, .op = reduction.op,
            .wire_dtype = reduction.dtype};
  describe_parts(inputs, call);
  return submit(group, call, output, [&group, inputs = std::move(inputs), output, reduction](Operation&) {
    return dtrain::reduce_scatter(group, inputs, output, reduction);
  });
}

std::shared_ptr<Operation> Engine::all_to_all(Group& group, std::vector<std::span<const std::byte>> sends,
                                              std::vector<std::span<std::byte>> receives, DataType dtype) {
  const auto size = static_cast<std::size_t>(group.size());
  if (sends.size() != size || receives.size() != size) {
    throw std::invalid_argument("all_to_all: " + std::to_string(sends.size()) + " inputs and " +
                                std::to_string(receives.size()) + " outputs for " + std::to_string(size) + " ranks");
  }
  check_parts("all_to_all", "outputs", receives, sends[static_cast<std::size_t>(group.rank())], group);
  Call call{.collective = Collective::all_to_all, .dtype = dtype};
  const auto is_even = [&](const auto part) { return part.size() == sends[0].size(); };
  if (std::ranges::all_of(sends, is_even) && std::ranges::all_of(receives, is_even)) {
    call.even_bytes = sends[0].size() + 1;
  }
  return submit(group, call, {}, [&group, sends = std::move(sends), receives = std::move(receives), dtype](Operation&) {
    return dtrain::exchange(group, sends, receives, element_bytes(dtype));
  });
}

std::shared_ptr<Operation> Engine::gather(Group& group, std::span<const std::byte> input,
                                          std::vector<std::span<std::byte>> outputs, int root, DataType dtype) {
  check_rank("gather", "root", root, group);
  const auto size = static_cast<std::size_t>(group.size());
  if (group.rank() == root) check_parts("gather", "outputs", outputs, input, group);
  if (group.rank() != root) outputs.assign(size, {});
  std::vector<std::span<const std::byte>> sends(size);
  sends[static_cast<std::size_t>(root)] = input;
  const Call call{.collective = Collective::gather, .dtype = dtype, .root = root,
                  .count = input.size() / element_bytes(dtype)};
  return submit(group, call, {}, [&group, sends = std::move(sends), outputs = std::move(outputs), dtype](Operation&) {
    return dtrain::exchange(group, sends, outputs, element_bytes(dtype));
  });
}

std::shared_ptr<Operation> Engine::scatter(Group& group, std::vector<std::span<const std::byte>> inputs,
                                           std::span<std::byte> output, int root, DataType dtype) {
  check_rank("scatter", "root", root, group);
  const auto size = static_cast<std::size_t>(group.size());
  if (group.rank() == root) check_parts("scatter", "inputs", inputs, output, group);
  if (group.rank() != root) inputs.assign(size, {});
  std::vector<std::span<std::byte>> receives(size);
  receives[static_cast<std::size_t>(root)] = output;
  const Call call{.collective = Collective::scatter, .dtype = dtype, .root = root,
                  .count = output.size() / element_bytes(dtype)};
  return submit(group, call, {}, [&group, inputs = std::move(inputs), receives = std::move(receives), dtype](Operation&) {
    return dtrain::exchange(group, inputs, receives, element_bytes(dtype));
  });
}

std::shared_ptr<Operation> Engine::barrier(Group& group) {
  return submit(group, Call{}, {}, [&group](Operation&) { return dtrain::barrier(group); });
}

std::shared_ptr<Operation> Engine::reduce_shards(Group& group, std::span<std::byte> buffer, std::vector<Block> blocks,
                                                 const Reduction& reduction) {
  check_reduction("reduce_shards", reduction);
  const std::size_t width = element_bytes(reduction.dtype);
  const Call call{.collective = Collective::reduce_shards, .dtype = reduction.dtype, .op = reduction.op,
                  .count = check_blocks("reduce_shards", buffer, blocks, width) / width,
                  .check_finite = reduction.check_finite};
  return submit(group, call, buffer, [&group, buffer, blocks = std::move(blocks), reduction](Operation&) {
    return dtrain::reduce_shards(group, buffer, blocks, reduction);
  });
}

std::shared_ptr<Operation> Engine::gather_shards(Group& group, std::span<std::byte> buffer, std::vector<Block> blocks) {
  const Call call{.collective = Collective::gather_shards, .dtype = DataType::uint8,
                  .count = check_blocks("gather_shards", buffer, blocks, 1)};
  return submit(group, call, buffer, [&group, buffer, blocks = std::move(blocks)](Operation&) {
    return dtrain::gather_shards(group, buffer, blocks);
  });
}

std::shared_ptr<Operation> Engine::send(Group& group, std::span<const std::byte> bytes, int destination, int tag,
                                        DataType dtype) {
  check_rank("send", "destination", destination, group);
  check_tag("send", tag, max_tag_);
  const Call call{.collective = Collective::send, .dtype = dtype, .root = destination,
                  .count = bytes.size() / element_bytes(dtype)};
  return submit(group, call, {}, [&group, bytes, destination, tag](Operation&) {
    return dtrain::send(group, bytes, destination, tag);
  });
}

std::shared_ptr<Operation> Engine::receive(Group& group, std::span<std::byte> bytes, int source, int tag,
                                           DataType dtype) {
  if (source != mpi::any_source) check_rank("receive", "source", source, group);
  check_tag("receive", tag, max_tag_);
  const Call call{.collective = Collective::receive, .dtype = dtype, .root = source,
                  .count = bytes.size() / element_bytes(dtype)};
  return submit(group, call, {}, [&group, bytes, source, tag](Operation& operation) {
    return dtrain::receive(group, bytes, source, tag, operation);
  });
}

}  // namespace dtrain
