// SPDX-License-Identifier: Apache-2.0
// The part of a reduction that crosses between nodes.
#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "collectives/group.hpp"

namespace dtrain {

// The largest number of local ranks on any node: so many slices a reduction has.
std::size_t num_slices(const Group& group);

// The rank that carries `slice` on `node`.
int carrier(const Group& group, std::size_t slice, int node);

// Reduces slices that this rank carries with the same slices of the other nodes, whose carriers of them do the same.
// Steps, each to be complete before the next: scatter(), reduce(), gather(). Exchanges of a group may be under way side
// by side if every rank takes each step of them in the same order.
//
// - two_hops: a slice is cut into a piece for each node, whose carrier gets that piece from all nodes, reduces it in
//   the order of the nodes, and sends it back. Each byte crosses once each way, whatever the number of nodes.
// - one_hop: each carrier gets the whole slice from all nodes and reduces it in the order of the nodes. gather() has
//   nothing to do. The bits are the same.
class NodeExchange {
 public:
  enum class Route { two_hops, one_hop };

  struct Slice {
    std::size_t number;
    std::span<std::byte> bytes;  // this node's partial result, at the end the whole one
  };

  // The better route for slices of `num_bytes`: messages are few, or bytes are. With two nodes both are with one_hop.
  static Route choose_route(const Group& group, std::size_t num_bytes);
  // Bytes of memory that an exchange of `slices` needs.
  static std::size_t memory_bytes(const Group& group, std::span<const Slice> slices, Route route);

  // `memory`: for what the other nodes send; none makes the exchange have its own.
  NodeExchange(const Group& group, std::vector<Slice> slices, Route route = Route::two_hops,
               std::span<std::byte> memory = {});
  NodeExchange(NodeExchange&&) = default;
  NodeExchange& operator=(NodeExchange&&) = default;

  std::vector<mpi::Transfer> scatter();
  void reduce(const Reduction& reduction);
  std::vector<mpi::Transfer> gather();

 private:
  std::span<std::byte> piece(const Slice& slice, int node) const;
  std::span<std::byte> own_piece(const Slice& slice) const { return piece(slice, group_->node()); }

  const Group* group_;
  std::vector<Slice> slices_;
  Route route_;
  std::vector<std::byte> own_memory_;
  std::span<std::byte> received_;  // own piece of each slice, from each other node
};

}  // namespace dtrain
