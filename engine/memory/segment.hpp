// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <optional>
#include <span>

namespace dtrain {

// A file descriptor, closed by the destructor.
class Descriptor {
 public:
  explicit Descriptor(int fd = -1) : fd_(fd) {}
  Descriptor(Descriptor&& other) noexcept;
  Descriptor& operator=(Descriptor&& other) noexcept;
  ~Descriptor();

  int get() const { return fd_; }
  explicit operator bool() const { return fd_ >= 0; }

 private:
  int fd_;
};

// A mapping of memory that several processes share. The memory is a memfd: it has no name in any file system, so it is
// freed when its processes are gone, and the size of /dev/shm does not limit it. Forked children do not inherit the
// mapping.
class Mapping {
 public:
  Mapping() = default;
  // Maps all of `fd`, which must be a file of `num_bytes`; throws std::system_error.
  Mapping(const Descriptor& fd, std::size_t num_bytes);
  Mapping(Mapping&& other) noexcept;
  Mapping& operator=(Mapping&& other) noexcept;
  ~Mapping();

  std::span<std::byte> bytes() const { return bytes_; }

  // Lets children that are forked from now on inherit the mapping.
  void inherit();

 private:
  std::span<std::byte> bytes_;
  pid_t owner_ = 0;  // a forked child has this object, but not the mapping
};

// Returns a memfd of `num_bytes` zeros, closed on exec, readable by this user only and sealed against a change of size.
// All of it is allocated now, since writing to a file that the system cannot back raises SIGBUS. It is in large pages
// where the system gives them, except for the rest that does not fill a large page. Throws std::system_error.
Descriptor create_memory(std::size_t num_bytes);

// Opens descriptor `fd` of process `pid` for this process; returns none if the system does not allow it.
std::optional<Descriptor> open_descriptor_of(pid_t pid, int fd);

}  // namespace dtrain
