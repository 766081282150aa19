// SPDX-License-Identifier: Apache-2.0
// Finds the ranks that share this machine's memory, and shares memory between them.
//
// The launcher is not trusted in this: ranks with the same boot ID and network namespace are candidates, and those that
// really map each other's memory form a node. A rank reaches a peer's memfd through /proc/<pid>/fd. If the two live in
// different process or user namespaces, the peer sends the descriptor over an abstract socket. If neither works, the
// two are on different nodes and communicate by MPI.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "memory/segment.hpp"

namespace dtrain {

// Gathers the same number of bytes from every rank, in rank order. Collective, blocks.
using AllGather = std::function<void(std::span<const std::byte> mine, std::span<std::byte> all)>;

// Returns the NUMA node that has all of `cores`, or -1. `nodes` has a folder for each NUMA node, with an entry for each
// of its cores.
int find_numa_node(const std::vector<int>& cores, const std::filesystem::path& nodes = "/sys/devices/system/node");

// Shares memory between the ranks of one node. Lives as long as the engine.
class Node {
 public:
  // Collective over all ranks of `all_gather`. `max_ranks` > 0 makes nodes of at most that many consecutive ranks, so
  // that one machine can stand for several in a test. `numa_node`, if given, is what numa_node_of() returns for this
  // rank.
  Node(int rank, int size, const AllGather& all_gather, int max_ranks, std::optional<int> numa_node = std::nullopt);
  ~Node();
  Node(const Node&) = delete;
  Node& operator=(const Node&) = delete;

  // Node number of each rank; nodes are numbered by their lowest rank.
  const std::vector<int>& node_of_rank() const { return node_of_rank_; }

  // Number of processors that the ranks of this rank's node may use together.
  int num_cores() const { return num_cores_; }

  // Processors that `rank`, on any node, may use.
  std::vector<int> cores_of(int rank) const;

  // The NUMA node that has all processors that `rank` may use, on its machine; or -1.
  int numa_node_of(int rank) const;

  // Collective over the ranks in `ranks` (numbered as in the constructor), which may be on several nodes. Each rank
  // allocates `num_bytes`, and gets the memory of the ranks on its own node, in the order of `ranks`.
  std::vector<Mapping> share(std::size_t num_bytes, std::span<const int> ranks, const AllGather& all_gather) const;

  // Collective over `ranks`, as for share(). The first of them on each node allocates `num_bytes`, and all ranks on
  // that node map it.
  Mapping share_one(std::size_t num_bytes, std::span<const int> ranks, const AllGather& all_gather) const;

  // Ends sharing; memory that is shared stays mapped. An engine that has a successor calls it, since Python may keep
  // the engine alive for long. Local.
  void close() { socket_ = Descriptor(); }

 private:
  struct Identity;

  bool is_candidate(int peer) const;
  std::vector<Mapping> map_peers(const Descriptor& fd, std::span<const std::size_t> num_bytes,
                                 std::span<const int> ranks, const AllGather& all_gather) const;
  void require_mapped(const Mapping& mapping, int peer) const;
  void exchange_descriptors(const Descriptor& fd, std::span<const int> receivers, std::span<const int> senders,
                            const std::function<bool(int sender, const Descriptor&)>& received) const;

  int rank_;
  std::vector<Identity> identities_;
  std::vector<int> node_of_rank_;
  int num_cores_ = 1;
  Descriptor socket_;
};

}  // namespace dtrain
