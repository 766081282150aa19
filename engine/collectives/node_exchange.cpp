// SPDX-License-Identifier: Apache-2.0
#include "collectives/node_exchange.hpp"

#include <algorithm>
#include <utility>

#include "collectives/parts.hpp"

namespace dtrain {

std::size_t num_slices(const Group& group) {
  std::size_t most = 0;
  for (int node = 0; node < group.num_nodes(); ++node) most = std::max(most, group.ranks_of_node(node).size());
  return most;
}

int carrier(const Group& group, std::size_t slice, int node) {
  const std::vector<int>& ranks = group.ranks_of_node(node);
  return ranks[slice % ranks.size()];
}

NodeExchange::NodeExchange(const Group& group, std::vector<Slice> slices) : group_(group), slices_(std::move(slices)) {
  std::size_t num_bytes = 0;
  for (const Slice& slice : slices_) num_bytes += own_piece(slice).size();
  received_.resize(num_bytes * static_cast<std::size_t>(group.num_nodes() - 1));
}

std::span<std::byte> NodeExchange::piece(const Slice& slice, int node) const {
  return part_of(slice.bytes, static_cast<std::size_t>(node), static_cast<std::size_t>(group_.num_nodes()));
}

std::vector<mpi::Transfer> NodeExchange::scatter() {
  std::vector<mpi::Transfer> transfers;
  std::byte* next = received_.data();
  for (const Slice& slice : slices_) {
    const auto tag = static_cast<int>(slice.number);
    for (int node = 0; node < group_.num_nodes(); ++node) {
      if (node == group_.node()) continue;
      const int peer = carrier(group_, slice.number, node);
      const std::span<std::byte> incoming(next, own_piece(slice).size());
      next += incoming.size();
      if (!incoming.empty()) transfers.push_back(group_.communicator().receive(incoming, peer, tag));
      const auto outgoing = piece(slice, node);
      if (!outgoing.empty()) transfers.push_back(group_.communicator().send(outgoing, peer, tag));
    }
  }
  return transfers;
}

void NodeExchange::reduce(const Reduction& reduction) {
  const std::byte* next = received_.data();
  std::vector<const std::byte*> partials;
  for (const Slice& slice : slices_) {
    const auto own = own_piece(slice);
    partials.clear();
    for (int node = 0; node < group_.num_nodes(); ++node) {
      partials.push_back(node == group_.node() ? own.data() : next);
      if (node != group_.node()) next += own.size();
    }
    std::byte* const result = own.data();
    dtrain::reduce(partials, {&result, 1}, own.size() / element_bytes(reduction.dtype), reduction);
  }
}

std::vector<mpi::Transfer> NodeExchange::gather() {
  std::vector<mpi::Transfer> transfers;
  for (const Slice& slice : slices_) {
    const auto tag = static_cast<int>(slice.number);
    for (int node = 0; node < group_.num_nodes(); ++node) {
      if (node == group_.node()) continue;
      const int peer = carrier(group_, slice.number, node);
      const auto incoming = piece(slice, node);
      if (!incoming.empty()) transfers.push_back(group_.communicator().receive(incoming, peer, tag));
      const auto outgoing = own_piece(slice);
      if (!outgoing.empty()) transfers.push_back(group_.communicator().send(outgoing, peer, tag));
    }
  }
  return transfers;
}

}  // namespace dtrain
