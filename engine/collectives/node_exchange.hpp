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

// Reduces slices that this rank carries with the same slices of the other nodes. A slice is cut into a piece for each
// node; its carrier there gets that piece from all nodes, reduces it in the order of the nodes, and sends it back.
// Steps, each to be complete before the next: scatter(), reduce(), gather().
class NodeExchange {
 public:
  struct Slice {
    std::size_t number;
    std::span<std::byte> bytes;  // this node's partial result, at the end the whole one
  };

  NodeExchange(const Group& group, std::vector<Slice> slices);

  std::vector<mpi::Transfer> scatter();
  void reduce(const Reduction& reduction);
  std::vector<mpi::Transfer> gather();

 private:
  std::span<std::byte> piece(const Slice& slice, int node) const;
  std::span<std::byte> own_piece(const Slice& slice) const { return piece(slice, group_.node()); }

  const Group& group_;
  std::vector<Slice> slices_;
  std::vector<std::byte> received_;  // own piece of each slice, from each other node
};

}  // namespace dtrain
