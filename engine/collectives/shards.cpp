// SPDX-License-Identifier: Apache-2.0
#include "collectives/shards.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "collectives/node_exchange.hpp"
#include "collectives/parts.hpp"

namespace dtrain {
namespace {

// The shards of one owner, and room for them side by side.
struct Message {
  int peer;
  std::vector<std::span<std::byte>> parts;  // in the buffer
  std::vector<std::byte> bytes;
};

std::vector<std::span<std::byte>> shards_of(const Group& group, int owner, std::span<std::byte> buffer,
                                            const std::vector<Block>& blocks) {
  std::vector<std::span<std::byte>> shards;
  for (const Block& block : blocks) {
    const auto shard = part_of(buffer.subspan(block.offset_bytes, block.num_bytes), static_cast<std::size_t>(owner),
                               static_cast<std::size_t>(group.size()));
    if (!shard.empty()) shards.push_back(shard);
  }
  return shards;
}

Message message(int peer, std::vector<std::span<std::byte>> parts) {
  std::size_t num_bytes = 0;
  for (const auto& part : parts) num_bytes += part.size();
  return {peer, std::move(parts), std::vector<std::byte>(num_bytes)};
}

// One for each shard owner on another node for which this rank is the carrier.
std::vector<Message> carried_messages(const Group& group, std::span<std::byte> buffer,
                                      const std::vector<Block>& blocks) {
  std::vector<Message> messages;
  for (int node = 0; node < group.num_nodes(); ++node) {
    if (node == group.node()) continue;
    const std::vector<int>& owners = group.ranks_of_node(node);
    for (std::size_t i = 0; i < owners.size(); ++i) {
      if (carrier(group, i, group.node()) != group.rank()) continue;
      messages.push_back(message(owners[i], shards_of(group, owners[i], buffer, blocks)));
    }
  }
  return messages;
}

// One for each other node, to or from the carrier there of this rank's shards; in the order of the nodes.
std::vector<Message> own_messages(Group& group, std::span<std::byte> buffer, const std::vector<Block>& blocks) {
  std::vector<Message> messages;
  for (int node = 0; node < group.num_nodes(); ++node) {
    if (node == group.node()) continue;
    const int peer = carrier(group, static_cast<std::size_t>(group.local().rank()), node);
    messages.push_back(message(peer, shards_of(group, group.rank(), buffer, blocks)));
  }
  return messages;
}

std::vector<mpi::Transfer> exchange(Group& group, std::vector<Message>& incoming, std::vector<Message>& outgoing) {
  std::vector<mpi::Transfer> transfers;
  const auto in_pieces = [](std::span<std::byte> bytes, auto&& transfer) {
    for (std::size_t start = 0; start < bytes.size(); start += mpi::max_transfer_bytes) {
      transfer(bytes.subspan(start, std::min(mpi::max_transfer_bytes, bytes.size() - start)));
    }
  };
  for (Message& in : incoming) {
    in_pieces(in.bytes, [&](auto piece) { transfers.push_back(group.receive(piece, in.peer, 0)); });
  }
  for (Message& out : outgoing) {
    in_pieces(out.bytes, [&](auto piece) { transfers.push_back(group.send(piece, out.peer, 0)); });
  }
  return transfers;
}

}  // namespace

Task reduce_shards(Group& group, std::span<std::byte> buffer, std::vector<Block> blocks, Reduction reduction) {
  // All ranks of the node have called, so their buffers hold what is to be added: no barrier is needed before reading.
  std::size_t num_bytes = 0;
  for (const Block& block : blocks) num_bytes = std::max<std::size_t>(num_bytes, block.offset_bytes + block.num_bytes);
  std::vector<std::byte*> places = group.shared_buffers(num_bytes);
  if (group.size() == 1) {
    if (!reduction.check_finite) co_return;
    places = {buffer.data()};
  }
  if (places.empty()) {
    throw std::invalid_argument("reduce_shards: the buffers do not lie in memory that all ranks allocated together");
  }
  const bool one_node = group.num_nodes() == 1;
  const std::size_t width = element_bytes(reduction.dtype);
  Reduction last = reduction;  // the average's division and the check come with the last reduction of an element
  if (reduction.op == ReduceOp::average) last.scale = 1.0 / group.size();
  reduction.check_finite = false;
  bool found_nonfinite = false;

  std::vector<const std::byte*> sources(places.size());
  const auto reduce_node = [&](std::span<const std::byte> part, std::byte* result, const Reduction& how) {
    const auto offset = part.data() - buffer.data();
    std::ranges::transform(places, sources.begin(), [offset](const std::byte* place) { return place + offset; });
    return reduce_by_domains(group.local().domains(), sources, {&result, 1}, part.size() / width, how);
  };

  const auto own = shards_of(group, group.rank(), buffer, blocks);
  std::vector<Message> outgoing = carried_messages(group, buffer, blocks);
  for (Message& out : outgoing) {
    std::byte* next = out.bytes.data();
    for (const auto& part : out.parts) {
      reduce_node(part, next, reduction);
      next += part.size();
    }
  }
  std::vector<Message> incoming = own_messages(group, buffer, blocks);
  std::vector<mpi::Transfer> transfers = exchange(group, incoming, outgoing);
  for (const auto& part : own) found_nonfinite |= reduce_node(part, part.data(), one_node ? last : reduction);
  group.report_nonfinite(found_nonfinite);
  if (one_node) co_return;

  auto exchanged = Until([&transfers] { return mpi::test_all(transfers); });
  co_await exchanged;
  std::size_t offset = 0;
  std::vector<const std::byte*> partials;
  for (const auto& part : own) {
    partials.clear();
    for (const Message& in : incoming) partials.push_back(in.bytes.data() + offset);
    partials.insert(partials.begin() + group.node(), part.data());
    std::byte* const result = part.data();
    found_nonfinite |= reduce(partials, {&result, 1}, part.size() / width, last);
    offset += part.size();
  }
  group.report_nonfinite(found_nonfinite);
}

Task gather_shards(Group& group, std::span<std::byte> buffer, std::vector<Block> blocks) {
  // This runs once every rank of the node has called it, having written its shards.
  if (group.num_nodes() == 1) co_return;
  std::vector<Message> outgoing = own_messages(group, buffer, blocks);
  for (Message& out : outgoing) {
    std::byte* next = out.bytes.data();
    for (const auto& part : out.parts) next = std::ranges::copy(part, next).out;
  }
  std::vector<Message> incoming = carried_messages(group, buffer, blocks);
  std::vector<mpi::Transfer> transfers = exchange(group, incoming, outgoing);
  auto exchanged = Until([&transfers] { return mpi::test_all(transfers); });
  co_await exchanged;
  for (const Message& in : incoming) {
    const std::byte* next = in.bytes.data();
    for (const auto& part : in.parts) {
      std::memcpy(part.data(), next, part.size());
      next += part.size();
    }
  }
  auto written = group.local().barrier();
  co_await written;
}

}  // namespace dtrain
