// SPDX-License-Identifier: Apache-2.0
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstring>
#include <fstream>
#include <iterator>
#include <memory>
#include <string>
#include <system_error>
#include <utility>

#include "memory/segment.hpp"
#include "test.hpp"

namespace dtrain {
namespace {

using namespace test;

constexpr std::size_t page_bytes = 4096;

bool is_open(int fd) { return fcntl(fd, F_GETFD) >= 0; }

const Test descriptor("memory: a descriptor is closed once", Runs::alone, [] {
  const int fd = open("/dev/null", O_RDONLY | O_CLOEXEC);
  {
    Descriptor first(fd);
    Descriptor second(std::move(first));
    expect(!first && second.get() == fd,
           "moved");  // NOLINT(bugprone-use-after-move): the test is about the state after a move
    Descriptor third;
    third = std::move(second);
    expect(is_open(fd), "still open");
  }
  expect(!is_open(fd), "closed");
});

const Test memory("memory: zeroed, private to the user, of fixed size, closed on exec", Runs::alone, [] {
  const Descriptor fd = create_memory(3 * page_bytes);
  struct stat status{};
  expect(fstat(fd.get(), &status) == 0 && status.st_size == 3 * page_bytes, "size");
  expect(status.st_blocks * 512 >= 3 * static_cast<blkcnt_t>(page_bytes), "allocated at once");
  expect_equal(status.st_mode & 0777U, 0600U, "mode");
  expect((fcntl(fd.get(), F_GETFD) & FD_CLOEXEC) != 0, "closed on exec");
  for (const off_t num_bytes : {0, 4096, 16384}) {
    expect(ftruncate(fd.get(), num_bytes) != 0 && errno == EPERM, "sealed against another size");
  }
  expect(fcntl(fd.get(), F_ADD_SEALS, F_SEAL_WRITE) != 0 && errno == EPERM, "sealed against seals");
  const Mapping mapping(fd, 3 * page_bytes);
  expect(std::ranges::all_of(mapping.bytes(), [](std::byte b) { return b == std::byte{0}; }), "zeros");
});

const Test limits("memory: too large an allocation is an error, not a signal", Runs::alone, [] {
  // If create_memory() asks the kernel for too much, this limit keeps the kernel from killing processes.
  const rlimit small{.rlim_cur = 64 << 20, .rlim_max = 64 << 20};
  if (setrlimit(RLIMIT_FSIZE, &small) != 0) return fail("setrlimit");
  std::signal(SIGXFSZ, SIG_IGN);
  const auto too_much = std::make_error_code(std::errc::not_enough_memory).message();
  expect_throws<std::system_error>([] { create_memory(std::size_t{1} << 60); }, too_much);
  expect_throws<std::system_error>([] { create_memory(~std::size_t{0}); }, too_much);
  const Descriptor fd = create_memory(page_bytes);
  expect_throws<std::system_error>([&] { const Mapping wrong(fd, 2 * page_bytes); }, "has 4096 bytes, expected 8192");
});

const Test interrupted("memory: a signal does not stop an allocation", Runs::alone, [] {
  struct sigaction action{};
  action.sa_handler = [](int) {};  // without SA_RESTART
  sigaction(SIGPROF, &action, nullptr);
  const itimerval once{.it_interval = {}, .it_value = {.tv_sec = 0, .tv_usec = 2000}};
  for (int round = 0; round < 5; ++round) {
    setitimer(ITIMER_PROF, &once, nullptr);
    itimerval left = once;
    while (left.it_value.tv_usec > 0) {  // until the signal has arrived, most likely during an allocation
      create_memory(std::size_t{16} << 20);
      getitimer(ITIMER_PROF, &left);
    }
  }
});

const Test large_pages("memory: large pages where the system gives them on request", Runs::alone, [] {
  std::ifstream setting("/sys/kernel/mm/transparent_hugepage/shmem_enabled");
  const std::string words(std::istreambuf_iterator<char>(setting), {});
  if (words.find("[advise]") == std::string::npos) return skip("shmem_enabled is not advise");
  constexpr std::size_t num_bytes = (std::size_t{64} << 20) + 1;
  const Descriptor fd = create_memory(num_bytes);
  struct stat status{};
  expect(fstat(fd.get(), &status) == 0 && status.st_blocks * 512 == 64 * 1048576 + page_bytes,
         "no more than asked for");
  const Mapping mapping(fd, num_bytes);
  std::ranges::fill(mapping.bytes(), std::byte{1});
  std::ifstream pages("/proc/self/smaps_rollup");
  std::size_t large_kib = 0;
  for (std::string word; pages >> word;) {
    if (word == "ShmemPmdMapped:") pages >> large_kib;
  }
  expect(large_kib > 0, "some at least");  // the system may have few free ones
});

const Test moving("memory: a mapping moves, and is unmapped once", Runs::alone, [] {
  const Descriptor fd = create_memory(page_bytes);
  const auto mapped = [](const std::byte* address) {
    unsigned char resident = 0;
    return mincore(const_cast<std::byte*>(address), page_bytes, &resident) == 0;
  };
  std::byte* address = nullptr;
  {
    Mapping first(fd, page_bytes);
    address = first.bytes().data();
    Mapping second(std::move(first));
    Mapping third;
    third = std::move(second);
    expect(mapped(address) && third.bytes().data() == address, "moved");
  }
  expect(!mapped(address), "unmapped");
});

const Test forking("memory: a forked child has no mapping, and unmaps nothing", Runs::alone, [] {
  const Descriptor fd = create_memory(page_bytes);
  auto mapping = std::make_unique<Mapping>(fd, page_bytes);
  in_child([&mapping] {
    std::byte* const address = mapping->bytes().data();
    const void* own = mmap(address, page_bytes, PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    expect(own == address, "the place is free in the child");
    *address = std::byte{1};
    mapping.reset();
    unsigned char resident = 0;
    expect(mincore(address, page_bytes, &resident) == 0, "the child's own memory there stays");
  });
  expect(mapping->bytes()[0] == std::byte{0}, "the parent's is untouched");
});

const Test sharing("memory: another process opens it by process and descriptor number", Runs::alone, [] {
  const Descriptor fd = create_memory(page_bytes);
  const Mapping mapping(fd, page_bytes);
  const pid_t owner = getpid();
  in_child([&fd, owner] {
    const auto opened = open_descriptor_of(owner, fd.get());
    if (!opened) return skip("/proc/<pid>/fd does not open here");
    expect((fcntl(opened->get(), F_GETFD) & FD_CLOEXEC) != 0, "closed on exec");
    const Mapping theirs(*opened, page_bytes);
    theirs.bytes()[7] = std::byte{42};
    expect(!open_descriptor_of(owner, 1000), "no such descriptor");
  });
  expect(mapping.bytes()[7] == std::byte{42}, "the child's byte has come");
});

}  // namespace
}  // namespace dtrain
