// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <span>

#include "collectives/group.hpp"

namespace dtrain {

// Reduces `buffer` over all ranks of a `group` with several nodes, in place. Collective; every rank ends with the same
// bits.
//
// P local ranks on this node, N nodes, L = the largest P of any node. The buffer is cut into segments, and a segment
// into L slices; slice s belongs to local rank s mod P, its carrier, on each node. A segment goes through three stages:
// 1. begin: each rank's data is where its node can read it: in place if all ranks allocated the buffer together, or if
//    no node has two ranks; else it is copied to the scratch memory. The carrier reduces its slice over the node's
//    ranks, in their order (within each domain, then over the domains, if there are any), and starts to send it.
// 2. turn: the slices that the other nodes sent have arrived; they are reduced in the order of the nodes and, with two
//    hops, sent back.
// 3. end: the result has arrived. The carrier writes it to all ranks' buffers, or each rank fetches it from scratch
//    memory. With check_finite the carrier looks at the values as it writes them, and its findings travel with the
//    barrier that follows. Each node has the whole result, so all nodes report the same.
// Several segments are under way at a time, each in another stage, so that the network need not wait for reductions.
//
// With wire_dtype, a node's partial result is rounded to it, all of them are summed in float32 in the order of the
// nodes, and the sum is rounded to it again, also on a node that has it in float32. So the bits depend neither on the
// carrier of an element nor on the route.
// Invariant: every element is reduced in one fixed order (within each domain, within each node, then over the nodes).
Task all_reduce_nodes(Group& group, std::span<std::byte> buffer, Reduction reduction);

}  // namespace dtrain
