// SPDX-License-Identifier: Apache-2.0
// Exchange of a reduction's partial results between nodes.
#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "collectives/group.hpp"

namespace dtrain {

// Returns the number of slices that a reduction has: the largest number of local ranks on any node.
std::size_t num_slices(const Group& group);

// Returns the rank that carries `slice` on `node`.
int carrier(const Group& group, std::size_t slice, int node);

// Reduces the slices that this rank carries with the same slices of the other nodes, whose carriers do the same. The
// steps are scatter(), reduce() and gather(); each must be complete before the next. Several exchanges of a group may
// be under way at once if every rank takes each of their steps in the same order.
//
// - two_hops: a slice is cut into a piece for each node. That node's carrier gets the piece from all nodes, reduces it
//   in the order of the nodes, and sends the result back. Each byte crosses once each way, however many nodes there
//   are.
// - one_hop: each carrier gets the whole slice from all nodes and reduces it in the order of the nodes. gather() has
//   nothing to do. The bits are the same.
class NodeExchange {
 public:
  enum class Route { two_hops, one_hop };

  struct Slice {
    std::size_t number;
    std::span<std::byte> bytes;  // this node's partial result; at the end the result over all nodes
  };

  // Returns the faster route for slices of `num_bytes`: the one with fewer messages, or the one with fewer bytes. With
  // two nodes one_hop has fewer messages and no more bytes.
  static Route choose_route(const Group& group, std::size_t num_bytes);
  // Returns the number of bytes of memory that an exchange of `slices` needs.
  static std::size_t memory_bytes(const Group& group, std::span<const Slice> slices, Route route);

  // `memory` holds what the other nodes send; without it, or if it is too small, the exchange allocates its own.
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
  std::span<std::byte> received_;  // this node's piece of each slice, from each other node
};

}  // namespace dtrain
