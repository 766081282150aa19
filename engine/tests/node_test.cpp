// SPDX-License-Identifier: Apache-2.0
#include "memory/node.hpp"

#include <sched.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <numeric>
#include <string>
#include <system_error>
#include <vector>

#include "at.hpp"
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

// Writes to all memory that the rank maps; each rank must find what the others wrote to its own.
void share_and_check(const Node& node, int rank, const std::vector<int>& ranks, const AllGather& all_gather) {
  std::vector<int> own_node;
  for (const int peer : ranks) {
    const auto& nodes = node.node_of_rank();
    if (at(nodes, peer) == at(nodes, rank)) own_node.push_back(peer);
  }
  const std::vector<Mapping> blocks = node.share(10000, ranks, all_gather);
  expect_equal(blocks.size(), own_node.size(), "blocks");
  for (std::size_t i = 0; i < blocks.size(); ++i) {
    at(blocks[i].bytes(), rank) = static_cast<std::byte>(rank * 16 + own_node[i] + 1);
  }
  const std::byte nothing{};
  std::vector<std::byte> all(ranks.size());
  all_gather({&nothing, 1}, all);  // every rank has written
  for (std::size_t i = 0; i < blocks.size(); ++i) {
    for (const int writer : own_node) {
      const int found = static_cast<int>(at(blocks[i].bytes(), writer));
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

// Expects a job of `size` ranks to have these nodes, and to share memory in each.
void expect_nodes(int size, int max_ranks, const std::string& wanted,
                  const std::function<void(int)>& isolate = nullptr) {
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
        expect(!node.cores_of(rank).empty() && node.num_cores() >= static_cast<int>(node.cores_of(rank).size()),
               "cores");
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

const Test subset("node: some of the ranks share, in another order", Runs::alone, [] {
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
      // The job's all_gather needs every rank, so this rank takes part in the two of share(), with the lengths that
      // share() uses.
      std::vector<std::byte> all(3 * 24);
      all_gather(std::vector<std::byte>(24), all);
      all.resize(3 * 2);
      all_gather(std::vector<std::byte>(2), all);
    }
  });
});

// Process numbers of another namespace mean other processes here, or none, so descriptors arrive over the socket.
const Test handed_over("node: descriptors over the socket where /proc does not help", Runs::alone, [] {
  if (!can_isolate(CLONE_NEWPID)) return skip("no process namespaces for this user");
  const auto isolate = [](int) { expect(unshare(CLONE_NEWPID) == 0, "unshare"); };
  expect_nodes(2, 0, "00", isolate);
  expect_nodes(4, 0, "0000", isolate);
  expect_nodes(14, 0, "00000000000000", isolate);  // more than a socket queues
  expect_nodes(4, 0, "0000", [](int rank) {
    if (rank >= 2) expect(unshare(CLONE_NEWPID) == 0, "unshare");
  });
});

// Returns the names of this user's sockets that wait for descriptors, including those of other jobs.
std::vector<std::string> socket_names() {
  std::vector<std::string> names;
  std::ifstream file("/proc/net/unix");
  for (std::string line; std::getline(file, line);) {
    const std::size_t found = line.find("@dtrain-");
    if (found != std::string::npos) names.push_back(line.substr(found));
  }
  return names;
}

void send_datagram(const std::string& name, std::span<const std::byte> bytes, std::size_t num_descriptors) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  name.copy(address.sun_path + 1, name.size() - 1, 1);
  const std::vector<int> descriptors(num_descriptors, STDERR_FILENO);
  std::vector<char> control(CMSG_SPACE(sizeof(int) * num_descriptors));
  iovec payload{.iov_base = const_cast<std::byte*>(bytes.data()), .iov_len = bytes.size()};
  msghdr message{};
  message.msg_name = &address;
  message.msg_namelen = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + name.size());
  message.msg_iov = &payload;
  message.msg_iovlen = 1;
  message.msg_control = control.data();
  message.msg_controllen = control.size();
  cmsghdr* header = CMSG_FIRSTHDR(&message);
  header->cmsg_level = SOL_SOCKET;
  header->cmsg_type = SCM_RIGHTS;
  header->cmsg_len = CMSG_LEN(sizeof(int) * num_descriptors);
  std::memcpy(CMSG_DATA(header), descriptors.data(), sizeof(int) * num_descriptors);
  const Descriptor socket(::socket(AF_UNIX, SOCK_DGRAM, 0));
  expect(sendmsg(socket.get(), &message, 0) == static_cast<ssize_t>(bytes.size()), "sent");
}

const Test strangers("node: unexpected descriptors are closed", Runs::alone, [] {
  const auto count_descriptors = [] {
    using std::filesystem::directory_iterator;
    return std::distance(directory_iterator("/proc/self/fd"), directory_iterator());
  };
  const std::vector<std::string> before = socket_names();
  std::ptrdiff_t num_descriptors = 0;
  int num_gathered = 0;
  // Rank 1 announces the same as this rank, except for the file of its memory, so it has to send that file's
  // descriptor.
  const AllGather all_gather = [&](std::span<const std::byte> mine, std::span<std::byte> all) {
    std::ranges::copy(mine, all.begin());
    std::ranges::copy(mine, all.begin() + static_cast<std::ptrdiff_t>(mine.size()));
    ++num_gathered;
    if (num_gathered == 2) all.back() ^= std::byte{1};
    if (num_gathered == 3) {  // the ranks' missing files: next, this rank waits for rank 1
      for (const std::string& name : socket_names()) {
        if (std::ranges::find(before, name) != before.end()) continue;
        const int sender = 1;
        send_datagram(name, std::as_bytes(std::span(&sender, 1)).first(1), 1);
        send_datagram(name, std::as_bytes(std::span(&sender, 1)), 2);
        send_datagram(name, std::as_bytes(std::span(&sender, 1)), 1);
      }
      num_descriptors = count_descriptors();
    }
    if (num_gathered == 4) expect_equal(count_descriptors(), num_descriptors, "descriptors");
  };
  const Node node(0, 2, all_gather, 0);
  expect_equal(num_gathered, 4, "gathered");
  expect_equal(text(node.node_of_rank()), std::string("01"), "nodes");
});

const Test separate("node: ranks in another network namespace are another node", Runs::alone, [] {
  if (!can_isolate(CLONE_NEWNET)) return skip("no network namespaces for this user");
  expect_nodes(3, 0, "010", [](int rank) {
    if (rank == 1) expect(unshare(CLONE_NEWNET) == 0, "unshare");
  });
});

}  // namespace
}  // namespace dtrain
