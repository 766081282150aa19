// SPDX-License-Identifier: Apache-2.0
#include "collectives/node_exchange.hpp"

#include <algorithm>
#include <utility>

#include "collectives/messages.hpp"
#include "collectives/parts.hpp"

namespace dtrain {
namespace {

// Returns the part of a slice that node number `node` reduces.
std::span<std::byte> route_piece(const Group& group, std::span<std::byte> slice, int node, NodeExchange::Route route) {
  if (route == NodeExchange::Route::one_hop) return slice;
  return part_of(slice, static_cast<std::size_t>(node), static_cast<std::size_t>(group.num_nodes()));
}

// Exchanges under way at once must not take each other's messages, so the two steps have tags of their own.
int scatter_tag(std::size_t slice) { return static_cast<int>(2 * slice); }
int gather_tag(std::size_t slice) { return static_cast<int>(2 * slice + 1); }

}  // namespace

std::size_t num_slices(const Group& group) {
  std::size_t most = 0;
  for (int node = 0; node < group.num_nodes(); ++node) most = std::max(most, group.ranks_of_node(node).size());
  return most;
}

int carrier(const Group& group, std::size_t slice, int node) {
  const std::vector<int>& ranks = group.ranks_of_node(node);
  return ranks[slice % ranks.size()];
}

// With N nodes and slices of S bytes, one hop costs (N-1) S bytes and one latency; two hops cost 2 (N-1)/N S bytes and
// two latencies. So one hop is better while its additional bytes, (N-1)(N-2)/N S, take less time than a latency.
NodeExchange::Route NodeExchange::choose_route(const Group& group, std::size_t num_bytes) {
  constexpr std::size_t bytes_per_latency = 16 << 10;  // 100 us at 1.3 Gbit/s
  const auto nodes = static_cast<std::size_t>(group.num_nodes());
  const std::size_t more = num_bytes / nodes * (nodes - 1) * (nodes - 2);
  return more <= bytes_per_latency ? Route::one_hop : Route::two_hops;
}

std::size_t NodeExchange::memory_bytes(const Group& group, std::span<const Slice> slices, Route route) {
  std::size_t num_bytes = 0;
  for (const Slice& slice : slices) num_bytes += route_piece(group, slice.bytes, group.node(), route).size();
  return num_bytes * static_cast<std::size_t>(group.num_nodes() - 1);
}

NodeExchange::NodeExchange(const Group& group, std::vector<Slice> slices, Route route, std::span<std::byte> memory)
    : group_(&group), slices_(std::move(slices)), route_(route), received_(memory) {
  const std::size_t needed = memory_bytes(group, slices_, route);
  if (received_.size() < needed) {
    own_memory_.resize(needed);
    received_ = own_memory_;
  }
}

std::span<std::byte> NodeExchange::piece(const Slice& slice, int node) const {
  return route_piece(*group_, slice.bytes, node, route_);
}

std::vector<mpi::Transfer> NodeExchange::scatter() {
  std::vector<mpi::Transfer> transfers;
  std::byte* next = received_.data();
  for (const Slice& slice : slices_) {
    const int tag = scatter_tag(slice.number);
    for (int node = 0; node < group_->num_nodes(); ++node) {
      if (node == group_->node()) continue;
      const int peer = carrier(*group_, slice.number, node);
      const std::span<std::byte> incoming(next, own_piece(slice).size());
      next += incoming.size();
      receive_pieces(*group_, incoming, peer, tag, transfers);
      send_pieces(*group_, piece(slice, node), peer, tag, transfers);
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
    for (int node = 0; node < group_->num_nodes(); ++node) {
      partials.push_back(node == group_->node() ? own.data() : next);
      if (node != group_->node()) next += own.size();
    }
    std::byte* const result = own.data();
    dtrain::reduce(partials, {&result, 1}, own.size() / element_bytes(reduction.dtype), reduction);
  }
}

std::vector<mpi::Transfer> NodeExchange::gather() {
  std::vector<mpi::Transfer> transfers;
  if (route_ == Route::one_hop) return transfers;
  for (const Slice& slice : slices_) {
    const int tag = gather_tag(slice.number);
    for (int node = 0; node < group_->num_nodes(); ++node) {
      if (node == group_->node()) continue;
      const int peer = carrier(*group_, slice.number, node);
      receive_pieces(*group_, piece(slice, node), peer, tag, transfers);
      send_pieces(*group_, own_piece(slice), peer, tag, transfers);
    }
  }
  return transfers;
}

}  // namespace dtrain
