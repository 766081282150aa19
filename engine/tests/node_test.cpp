// SPDX-License-Identifier: Apache-2.0
#include "memory/node.hpp"

#include <sched.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <numeric>
#include <string>
#include <system_error>
#include <vector>

#include "processes.hpp"
#include "test.hpp"

namespace dtrain {
namespace {

using namespace test;

std::string text(const std::vector<int>& values) {
  std::string joined;
  for (const int value : values) joined += std::to_string(value);
  return joined;
}

bool can_isolate(int namespaces) {
  const pid_t child = fork();
  if (child == 0) _exit(unshare(namespaces) == 0 ? 0 : 1);
  int status = 0;
  waitpid(child, &status, 0);
  return status == 0;
}

// Every rank writes to all it maps; each must find what the others wrote to its own.
void share_and_check(const Node& node, int rank, const std::vector<int>& ranks, const AllGather& all_gather) {
  std::vector<int> own_node;
  for (const int peer : ranks) {
    const auto& nodes = node.node_of_rank();
    if (nodes[static_cast<std::size_t>(peer)] == nodes[static_cast<std::size_t>(rank)]) own_node.push_back(peer);
  }
  const std::vector<Mapping> blocks = node.share(10000, ranks, all_gather);
  expect_equal(blocks.size(), own_node.size(), "blocks");
  for (std::size_t i = 0; i < blocks.size(); ++i) {
    blocks[i].bytes()[static_cast<std::size_t>(rank)] = static_cast<std::byte>(rank * 16 + own_node[i] + 1);
  }
  const std::byte nothing{};
  std::vector<std::byte> all(ranks.size());
  all_gather({&nothing, 1}, all);  // everybody has written
  for (std::size_t i = 0; i < blocks.size(); ++i) {
    for (const int writer : own_node) {
      const int found = static_cast<int>(blocks[i].bytes()[static_cast<std::size_t>(writer)]);
      expect_equal(found, writer * 16 + own_node[i] + 1, "what a peer wrote");
    }
  }
}

int num_open_memories() {
  int number = 0;
  for (const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) {
    std::error_code error;
    number += std::filesystem::read_symlink(entry, error).string().starts_with("/memfd:dtrain") ? 1 : 0;
  }
  return number;
}

// A job of `size` ranks must have these nodes, and share memory in each.
void expect_nodes(int size, int max_ranks, const std::string& wanted, const std::function<void(int)>& isolate = nullptr) {
  std::vector<int> ranks(static_cast<std::size_t>(size));
  std::iota(ranks.begin(), ranks.end(), 0);
  on_processes(
      size,
      [&](int rank, const AllGather& all_gather) {
        const Node node(rank, size, all_gather, max_ranks);
        expect_equal(text(node.node_of_rank()), wanted, "nodes");
        share_and_check(node, rank, ranks, all_gather);
        share_and_check(node, rank, ranks, all_gather);
        if (isolate == nullptr) expect_equal(num_open_memories(), 0, "descriptors left open");
        expect(!node.cores_of(rank).empty() && node.num_cores() >= static_cast<int>(node.cores_of(rank).size()), "cores");
      },
      isolate);
}

const Test nodes("node: ranks of one machine", Runs::alone, [] {
  expect_nodes(1, 0, "0");
  expect_nodes(4, 0, "0000");
});

const Test pretend("node: pretend nodes", Runs::alone, [] {
  expect_nodes(3, 2, "001");
  expect_nodes(4, 3, "0001");
  expect_nodes(4, 1, "0123");
});

const Test subset("node: some of the ranks share, in an order of their own", Runs::alone, [] {
  on_processes(3, [](int rank, const AllGather& all_gather) {
    const Node node(rank, 3, all_gather, 0);
    if (rank != 1) {
      const AllGather of_two = [&](std::span<const std::byte> mine, std::span<std::byte> all) {
        std::vector<std::byte> three(3 * mine.size());
        all_gather(mine, three);
        std::memcpy(all.data(), three.data() + 2 * mine.size(), mine.size());
        std::memcpy(all.data() + mine.size(), three.data(), mine.size());
      };
      const std::vector<Mapping> blocks = node.share(4096, std::vector{2, 0}, of_two);
      expect_equal(blocks.size(), 2U, "blocks");
    } else {
      // The job's all_gather needs everybody: this rank goes along with share()'s two, of the lengths it uses.
      std::vector<std::byte> all(3 * 24);
      all_gather(std::vector<std::byte>(24), all);
      all.resize(3 * 2);
      all_gather(std::vector<std::byte>(2), all);
    }
  });
});

// Process numbers of another namespace mean other processes here, or none: descriptors come over the socket.
const Test handed_over("node: descriptors over the socket where /proc is of no use", Runs::alone, [] {
  if (!can_isolate(CLONE_NEWPID)) return skip("no process namespaces for this user");
  const auto isolate = [](int) { expect(unshare(CLONE_NEWPID) == 0, "unshare"); };
  expect_nodes(2, 0, "00", isolate);
  expect_nodes(4, 0, "0000", isolate);
  expect_nodes(14, 0, "00000000000000", isolate);  // more than a socket queues
  expect_nodes(4, 0, "0000", [](int rank) {
    if (rank >= 2) expect(unshare(CLONE_NEWPID) == 0, "unshare");
  });
});

const Test separate("node: ranks in another network namespace are another node", Runs::alone, [] {
  if (!can_isolate(CLONE_NEWNET)) return skip("no network namespaces for this user");
  expect_nodes(3, 0, "010", [](int rank) {
    if (rank == 1) expect(unshare(CLONE_NEWNET) == 0, "unshare");
  });
});

}  // namespace
}  // namespace dtrain
