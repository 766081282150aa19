// SPDX-License-Identifier: Apache-2.0
#include "memory/node.hpp"

#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <system_error>

#include "at.hpp"

namespace dtrain {

using Nonce = std::array<std::uint8_t, 16>;

struct Node::Identity {
  std::array<char, 40> boot_id;  // identifies the running kernel: differs between machines and between boots
  std::uint64_t network_namespace;
  Nonce nonce;
  pid_t pid;
  cpu_set_t cores;
  int numa_node;
};

namespace {

std::vector<int> numbers_of(const cpu_set_t& set) {
  std::vector<int> cores;
  for (int core = 0; core < CPU_SETSIZE; ++core) {
    if (CPU_ISSET(static_cast<std::size_t>(core), &set)) cores.push_back(core);
  }
  return cores;
}

// An owner's description of its descriptor, from which a peer can tell whether it opened the right file.
struct Announcement {
  int fd;
  dev_t device;
  ino_t inode;

  static Announcement of(const Descriptor& fd) {
    struct stat status{};
    if (fstat(fd.get(), &status) != 0) throw std::system_error(errno, std::generic_category(), "fstat");
    return {fd.get(), status.st_dev, status.st_ino};
  }
  bool same_file(const Announcement& other) const { return device == other.device && inode == other.inode; }
};

template <class T>
std::span<const std::byte> bytes_of(const T& value) {
  return std::as_bytes(std::span(&value, 1));
}

template <class T>
std::vector<T> gather(const AllGather& all_gather, const T& mine, std::size_t size) {
  std::vector<T> all(size);
  all_gather(bytes_of(mine), std::as_writable_bytes(std::span(all)));
  return all;
}

sockaddr_un socket_name(const Nonce& nonce, socklen_t& length) {
  sockaddr_un name{};
  name.sun_family = AF_UNIX;
  int used = std::snprintf(name.sun_path + 1, sizeof(name.sun_path) - 1,
                           "dtrain-");  // a leading 0 makes the name abstract
  for (const std::uint8_t byte : nonce) {
    used += std::snprintf(name.sun_path + 1 + used, sizeof(name.sun_path) - 1 - static_cast<std::size_t>(used), "%02x",
                          byte);
  }
  length = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + static_cast<std::size_t>(used));
  return name;
}

bool send_descriptor(int socket, const Nonce& receiver, int sender, const Descriptor& fd) {
  socklen_t length = 0;
  sockaddr_un name = socket_name(receiver, length);
  iovec payload{.iov_base = &sender, .iov_len = sizeof(sender)};
  alignas(cmsghdr) std::array<char, CMSG_SPACE(sizeof(int))> control{};
  msghdr message{};
  message.msg_name = &name;
  message.msg_namelen = length;
  message.msg_iov = &payload;
  message.msg_iovlen = 1;
  message.msg_control = control.data();
  message.msg_controllen = control.size();
  cmsghdr* header = CMSG_FIRSTHDR(&message);
  header->cmsg_level = SOL_SOCKET;
  header->cmsg_type = SCM_RIGHTS;
  header->cmsg_len = CMSG_LEN(sizeof(int));
  const int value = fd.get();
  std::memcpy(CMSG_DATA(header), &value, sizeof(value));
  return sendmsg(socket, &message, MSG_DONTWAIT | MSG_NOSIGNAL) >= 0;
}

// Receives a descriptor and returns the rank of its sender; -1 if nothing usable arrived. Messages of other users'
// processes are ignored.
int receive_descriptor(int socket, Descriptor& fd) {
  int sender = -1;
  iovec payload{.iov_base = &sender, .iov_len = sizeof(sender)};
  alignas(cmsghdr) std::array<char, CMSG_SPACE(sizeof(int)) + CMSG_SPACE(sizeof(ucred))> control{};
  msghdr message{};
  message.msg_iov = &payload;
  message.msg_iovlen = 1;
  message.msg_control = control.data();
  message.msg_controllen = control.size();
  const ssize_t num_bytes = recvmsg(socket, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
  if (num_bytes < 0) return -1;
  bool same_user = false;
  std::size_t num_descriptors = 0;  // this process owns all of them now, whoever sent them
  for (cmsghdr* header = CMSG_FIRSTHDR(&message); header != nullptr; header = CMSG_NXTHDR(&message, header)) {
    if (header->cmsg_level != SOL_SOCKET) continue;
    if (header->cmsg_type == SCM_RIGHTS) {
      for (std::size_t end = CMSG_LEN(sizeof(int)); end <= header->cmsg_len; end += sizeof(int), ++num_descriptors) {
        int value = -1;
        std::memcpy(&value, CMSG_DATA(header) + num_descriptors * sizeof(int), sizeof(value));
        fd = Descriptor(value);
      }
    } else if (header->cmsg_type == SCM_CREDENTIALS) {
      ucred credentials{};
      std::memcpy(&credentials, CMSG_DATA(header), sizeof(credentials));
      same_user = credentials.uid == geteuid();
    }
  }
  return same_user && num_descriptors == 1 && num_bytes == sizeof(sender) ? sender : -1;
}

// Finds nodes as greedy cliques: a rank joins the first node with all of whose members it shares memory in both
// directions.
std::vector<int> find_nodes(std::span<const std::uint8_t> reaches, std::size_t size, int max_ranks) {
  std::vector<std::vector<std::size_t>> nodes;
  std::vector<int> node_of_rank(size, -1);
  for (std::size_t rank = 0; rank < size; ++rank) {
    const auto fits = [&](const std::vector<std::size_t>& members) {
      const bool has_room = max_ranks <= 0 || members.size() < static_cast<std::size_t>(max_ranks);
      return has_room && std::ranges::all_of(members, [&](std::size_t member) {
               return reaches[rank * size + member] != 0 && reaches[member * size + rank] != 0;
             });
    };
    auto node = std::ranges::find_if(nodes, fits);
    if (node == nodes.end()) node = nodes.insert(node, std::vector<std::size_t>{});
    node->push_back(rank);
    node_of_rank[rank] = static_cast<int>(node - nodes.begin());
  }
  return node_of_rank;
}

}  // namespace

int find_numa_node(const std::vector<int>& cores, const std::filesystem::path& nodes) {
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator(nodes, error)) {
    int number = -1;
    if (std::sscanf(entry.path().filename().c_str(), "node%d", &number) != 1 || cores.empty()) continue;
    const auto is_here = [&](int core) {
      return std::filesystem::exists(entry.path() / ("cpu" + std::to_string(core)), error);
    };
    if (std::ranges::all_of(cores, is_here)) return number;
  }
  return -1;
}

Node::Node(int rank, int size, const AllGather& all_gather, int max_ranks, std::optional<int> numa_node) : rank_(rank) {
  Identity own{};
  const Descriptor boot_id(::open("/proc/sys/kernel/random/boot_id", O_RDONLY | O_CLOEXEC));
  if (!boot_id || read(boot_id.get(), own.boot_id.data(), own.boot_id.size() - 1) <= 0) {
    throw std::system_error(errno, std::generic_category(), "reading /proc/sys/kernel/random/boot_id");
  }
  struct stat status{};
  if (stat("/proc/self/ns/net", &status) == 0) own.network_namespace = status.st_ino;
  if (getrandom(own.nonce.data(), own.nonce.size(), 0) != static_cast<ssize_t>(own.nonce.size())) {
    throw std::system_error(errno, std::generic_category(), "getrandom");
  }
  own.pid = getpid();
  CPU_ZERO(&own.cores);
  sched_getaffinity(0, sizeof(own.cores), &own.cores);
  own.numa_node = numa_node.value_or(find_numa_node(numbers_of(own.cores)));

  socket_ = Descriptor(::socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  const int on = 1;
  socklen_t length = 0;
  const sockaddr_un name = socket_name(own.nonce, length);
  if (!socket_ || setsockopt(socket_.get(), SOL_SOCKET, SO_PASSCRED, &on, sizeof(on)) != 0 ||
      bind(socket_.get(), reinterpret_cast<const sockaddr*>(&name), length) != 0) {
    socket_ = Descriptor();  // peers that need it time out, and are then on other nodes
  }

  const auto num_ranks = static_cast<std::size_t>(size);
  identities_ = gather(all_gather, own, num_ranks);

  // Share one page that holds the nonce with every candidate, and check which of the candidates' pages can be read.
  const auto page_bytes = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  const Descriptor page = create_memory(page_bytes);
  const Mapping own_page(page, page_bytes);
  std::memcpy(own_page.bytes().data(), own.nonce.data(), own.nonce.size());
  std::vector<int> everyone(num_ranks);
  for (std::size_t peer = 0; peer < num_ranks; ++peer) everyone[peer] = static_cast<int>(peer);
  const std::vector<Mapping> pages = map_peers(page, std::vector(num_ranks, page_bytes), everyone, all_gather);

  std::vector<std::uint8_t> reached(num_ranks, 0);
  for (std::size_t peer = 0; peer < num_ranks; ++peer) {
    const auto bytes = pages[peer].bytes();
    reached[peer] = !bytes.empty() && std::memcmp(bytes.data(), identities_[peer].nonce.data(), own.nonce.size()) == 0;
  }
  std::vector<std::uint8_t> reaches(num_ranks * num_ranks);
  all_gather(std::as_bytes(std::span(reached)), std::as_writable_bytes(std::span(reaches)));
  node_of_rank_ = find_nodes(reaches, num_ranks, max_ranks);

  cpu_set_t cores{};
  CPU_ZERO(&cores);
  for (std::size_t peer = 0; peer < num_ranks; ++peer) {
    if (is_candidate(static_cast<int>(peer))) CPU_OR(&cores, &cores, &identities_[peer].cores);
  }
  num_cores_ = std::max(1, CPU_COUNT(&cores));
}

Node::~Node() = default;

std::vector<int> Node::cores_of(int rank) const { return numbers_of(at(identities_, rank).cores); }

int Node::numa_node_of(int rank) const { return at(identities_, rank).numa_node; }

bool Node::is_candidate(int peer) const {
  if (!node_of_rank_.empty()) return at(node_of_rank_, rank_) == at(node_of_rank_, peer);
  const Identity& own = at(identities_, rank_);
  const Identity& other = at(identities_, peer);
  return own.boot_id == other.boot_id && own.network_namespace == other.network_namespace;
}

std::vector<Mapping> Node::share(std::size_t num_bytes, std::span<const int> ranks, const AllGather& all_gather) const {
  const Descriptor fd = create_memory(num_bytes);
  std::vector<Mapping> all = map_peers(fd, std::vector(ranks.size(), num_bytes), ranks, all_gather);
  std::vector<Mapping> of_node;
  for (std::size_t i = 0; i < ranks.size(); ++i) {
    if (!is_candidate(ranks[i])) continue;
    require_mapped(all[i], ranks[i]);
    of_node.push_back(std::move(all[i]));
  }
  return of_node;
}

Mapping Node::share_one(std::size_t num_bytes, std::span<const int> ranks, const AllGather& all_gather) const {
  std::size_t first = 0;
  while (!is_candidate(ranks[first])) ++first;
  const auto page_bytes = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  std::vector<std::size_t> bytes_of(ranks.size(), page_bytes);  // the other ranks must announce something
  bytes_of[first] = num_bytes;
  const Descriptor fd = create_memory(ranks[first] == rank_ ? num_bytes : page_bytes);
  std::vector<Mapping> all = map_peers(fd, bytes_of, ranks, all_gather);
  require_mapped(all[first], ranks[first]);
  return std::move(all[first]);
}

void Node::require_mapped(const Mapping& mapping, int peer) const {
  if (!mapping.bytes().empty()) return;
  throw std::runtime_error("rank " + std::to_string(rank_) + " could not map the shared memory of rank " +
                           std::to_string(peer) + " on the same node, though it could at start");
}

std::vector<Mapping> Node::map_peers(const Descriptor& fd, std::span<const std::size_t> num_bytes,
                                     std::span<const int> ranks, const AllGather& all_gather) const {
  const std::size_t size = ranks.size();
  const auto announced = gather(all_gather, Announcement::of(fd), size);
  std::vector<Mapping> mappings(size);
  std::vector<std::uint8_t> missing(size, 0);
  for (std::size_t i = 0; i < size; ++i) {
    if (ranks[i] == rank_) {
      mappings[i] = Mapping(fd, num_bytes[i]);
    } else if (is_candidate(ranks[i])) {
      const auto opened = open_descriptor_of(at(identities_, ranks[i]).pid, announced[i].fd);
      if (opened && Announcement::of(*opened).same_file(announced[i])) {
        mappings[i] = Mapping(*opened, num_bytes[i]);
      } else {
        missing[i] = 1;
      }
    }
  }
  // Once this gather is over, all ranks have opened the descriptors that they can, so each may close its own.
  std::vector<std::uint8_t> all_missing(size * size);
  all_gather(std::as_bytes(std::span(missing)), std::as_writable_bytes(std::span(all_missing)));
  std::vector<int> receivers;
  std::vector<int> senders;
  std::size_t own_index = 0;
  while (ranks[own_index] != rank_) ++own_index;
  for (std::size_t i = 0; i < size; ++i) {
    if (all_missing[i * size + own_index] != 0) receivers.push_back(ranks[i]);
    if (missing[i] != 0) senders.push_back(ranks[i]);
  }
  exchange_descriptors(fd, receivers, senders, [&](int sender, const Descriptor& received) {
    const auto place = std::ranges::find(ranks, sender) - ranks.begin();
    if (!Announcement::of(received).same_file(at(announced, place)))
      return false;  // it arrived late, from an earlier exchange
    at(mappings, place) = Mapping(received, at(num_bytes, place));
    return true;
  });
  return mappings;
}

// Sends `fd` to receivers and receives from senders. A socket queues few datagrams at a time, so sending and receiving
// alternate until both are complete. A peer that stays silent for `patience` is not reachable.
void Node::exchange_descriptors(const Descriptor& fd, std::span<const int> receivers, std::span<const int> senders,
                                const std::function<bool(int sender, const Descriptor&)>& received) const {
  constexpr std::chrono::seconds patience(2);
  const auto deadline = std::chrono::steady_clock::now() + patience;
  std::size_t num_sent = 0;
  std::size_t num_received = 0;
  while (socket_ && (num_sent < receivers.size() || num_received < senders.size()) &&
         std::chrono::steady_clock::now() < deadline) {
    if (num_sent < receivers.size()) {
      const Nonce& nonce = at(identities_, receivers[num_sent]).nonce;
      if (send_descriptor(socket_.get(), nonce, rank_, fd)) {
        ++num_sent;
        continue;
      }
      if (errno != EAGAIN) ++num_sent;  // the socket does not exist: that rank will be on another node
    }
    Descriptor incoming;
    const int sender = receive_descriptor(socket_.get(), incoming);
    if (sender >= 0 && std::ranges::find(senders, sender) != senders.end()) {
      if (received(sender, incoming)) ++num_received;
      continue;
    }
    pollfd readable{.fd = socket_.get(), .events = POLLIN, .revents = 0};
    poll(&readable, 1, 1);
  }
}

}  // namespace dtrain
