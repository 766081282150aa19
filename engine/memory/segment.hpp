// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <optional>
#include <span>

namespace dtrain {

// A file descriptor, closed when it goes.
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

// A mapping of memory that several processes share. The memory is a memfd: it has no name in any file system, so
// nothing is left of it when its processes are gone, and /dev/shm's size does not limit it. Children that fork do not
// inherit the mapping.
class Mapping {
 public:
  Mapping() = default;
  // Maps all of `fd`, which must be a file of `num_bytes`; throws std::system_error.
  Mapping(const Descriptor& fd, std::size_t num_bytes);
  Mapping(Mapping&& other) noexcept;
  Mapping& operator=(Mapping&& other) noexcept;
  ~Mapping();

  std::span<std::byte> bytes() const { return bytes_; }

  // Lets children that fork from now on have the mapping as well.
  void inherit();

 private:
  std::span<std::byte> bytes_;
  pid_t owner_ = 0;  // a forked child has this object, but not the mapping
};

// A memfd of `num_bytes` zeros, all of them allocated now (writing to a file that the system can't back is a SIGBUS),
// closed on exec, readable by this user alone and sealed against shrinking. In large pages where the system gives them,
// but for what does not fill one. Throws std::system_error.
Descriptor create_memory(std::size_t num_bytes);

// Descriptor `fd` of process `pid`, opened for this process; none where the system does not allow it.
std::optional<Descriptor> open_descriptor_of(pid_t pid, int fd);

}  // namespace dtrain
