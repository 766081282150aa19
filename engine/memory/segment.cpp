// SPDX-License-Identifier: Apache-2.0
#include "memory/segment.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <fstream>
#include <string>
#include <system_error>
#include <utility>

namespace dtrain {
namespace {

[[noreturn]] void fail(int error, const std::string& what) {
  throw std::system_error(error, std::generic_category(), what);
}

// Allocates large pages. If the system gives them only to shared memory that asks for them, posix_fallocate gets none:
// only a fault through a mapping that asks does. Whatever this function does not get is left to posix_fallocate.
void populate_with_large_pages(const Descriptor& fd, std::size_t num_bytes) {
  constexpr std::size_t large_page_bytes = std::size_t{2} << 20;
  if (num_bytes < large_page_bytes) return;
  std::ifstream setting("/sys/kernel/mm/transparent_hugepage/shmem_enabled");  // "always within_size [advise] never"
  std::string word;
  while (word != "[advise]") {
    if (!(setting >> word)) return;
  }
  if (ftruncate(fd.get(), static_cast<off_t>(num_bytes)) != 0) return;
  void* address = mmap(nullptr, num_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd.get(), 0);
  if (address == MAP_FAILED) return;
  constexpr int populate_write = 23;  // MADV_POPULATE_WRITE, of Linux 5.14: older headers lack it
  if (madvise(address, num_bytes, MADV_HUGEPAGE) == 0) madvise(address, num_bytes, populate_write);
  munmap(address, num_bytes);
}

}  // namespace

Descriptor::Descriptor(Descriptor&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}

Descriptor& Descriptor::operator=(Descriptor&& other) noexcept {
  std::swap(fd_, other.fd_);
  return *this;
}

Descriptor::~Descriptor() {
  if (fd_ >= 0) ::close(fd_);
}

Mapping::Mapping(const Descriptor& fd, std::size_t num_bytes) {
  struct stat status{};
  if (fstat(fd.get(), &status) != 0) fail(errno, "fstat of shared memory");
  if (static_cast<std::size_t>(status.st_size) != num_bytes) {
    fail(EINVAL,
         "shared memory has " + std::to_string(status.st_size) + " bytes, expected " + std::to_string(num_bytes));
  }
  void* address = mmap(nullptr, num_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd.get(), 0);
  if (address == MAP_FAILED) fail(errno, "mapping " + std::to_string(num_bytes) + " bytes of shared memory");
  bytes_ = {static_cast<std::byte*>(address), num_bytes};
  owner_ = getpid();
  if (madvise(address, num_bytes, MADV_DONTFORK) != 0) fail(errno, "MADV_DONTFORK");
}

Mapping::Mapping(Mapping&& other) noexcept
    : bytes_(std::exchange(other.bytes_, {})), owner_(std::exchange(other.owner_, 0)) {}

Mapping& Mapping::operator=(Mapping&& other) noexcept {
  std::swap(bytes_, other.bytes_);
  std::swap(owner_, other.owner_);
  return *this;
}

Mapping::~Mapping() {
  if (!bytes_.empty() && owner_ == getpid()) munmap(bytes_.data(), bytes_.size());
}

void Mapping::inherit() {
  if (madvise(bytes_.data(), bytes_.size(), MADV_DOFORK) != 0) fail(errno, "MADV_DOFORK");
}

Descriptor create_memory(std::size_t num_bytes) {
  const std::string what = "allocating " + std::to_string(num_bytes) +
                           " bytes of shared memory (free memory, or raise the memory limit of the container or job)";
  // No limit bounds a memfd: for one larger than the machine's memory, the kernel would kill processes, ours or not, to
  // make room.
  const auto page_bytes = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  if (num_bytes / page_bytes > static_cast<std::size_t>(sysconf(_SC_PHYS_PAGES))) fail(ENOMEM, what);
  Descriptor fd(memfd_create("dtrain", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!fd) fail(errno, "memfd_create");
  if (fchmod(fd.get(), S_IRUSR | S_IWUSR) != 0) fail(errno, "fchmod of shared memory");
  populate_with_large_pages(fd, num_bytes);
  int error = EINTR;  // a signal interrupts a long allocation and undoes it
  while (error == EINTR) error = posix_fallocate(fd.get(), 0, static_cast<off_t>(num_bytes));
  if (error != 0) fail(error, what);
  if (fcntl(fd.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) fail(errno, "F_ADD_SEALS");
  return fd;
}

std::optional<Descriptor> open_descriptor_of(pid_t pid, int fd) {
  const std::string path = "/proc/" + std::to_string(pid) + "/fd/" + std::to_string(fd);
  // In another process namespace the number may belong to any process, so opening must have no effect: no wait, no
  // controlling terminal.
  Descriptor opened(::open(path.c_str(), O_RDWR | O_CLOEXEC | O_NONBLOCK | O_NOCTTY));
  if (!opened) return std::nullopt;
  return opened;
}

}  // namespace dtrain
