// SPDX-License-Identifier: Apache-2.0
#include "mpi/library.hpp"

#include <array>
#include <cstddef>
#include <cstdlib>
#include <optional>
#include <string>

#include "mpi/replacement.hpp"
#include "mpi/ulfm.hpp"

// From PMIx, the library by which Open MPI 5 talks to its launcher.
extern "C" int PMIx_Finalize(const void* info, std::size_t num_infos) __attribute__((weak));

namespace dtrain::mpi {

void check(int code, const char* call, std::source_location where) {
  if (code == MPI_SUCCESS) return;
  std::array<char, MPI_MAX_ERROR_STRING> text{};
  int length = 0;
  if (MPI_Error_string(code, text.data(), &length) != MPI_SUCCESS) length = 0;
  throw Error(
      std::string(call) + " failed at " + where.file_name() + ":" + std::to_string(where.line()) + ": " +
      (length > 0 ? std::string(text.data(), static_cast<std::size_t>(length)) : "error " + std::to_string(code)));
}

bool initialize() {
  int initialized = 0;
  check(MPI_Initialized(&initialized), "MPI_Initialized");
  if (is_finalized()) throw Error("MPI was finalised in this process and cannot be started again");
  int provided = 0;
  if (initialized != 0) {
    check(MPI_Query_thread(&provided), "MPI_Query_thread");
  } else {
    const std::optional<Deadline> guard = Replacement::guard_start();
    check(MPI_Init_thread(nullptr, nullptr, MPI_THREAD_MULTIPLE, &provided), "MPI_Init_thread");
  }
  if (provided < MPI_THREAD_MULTIPLE) {
    throw Error("MPI gives thread level " + std::to_string(provided) + ", MPI_THREAD_MULTIPLE (" +
                std::to_string(MPI_THREAD_MULTIPLE) +
                ") is needed. If your code initialises MPI, ask for MPI_THREAD_MULTIPLE there");
  }
  return initialized == 0;
}

void finalize() {
  if (!is_finalized()) check(MPI_Finalize(), "MPI_Finalize");
}

bool is_finalized() {
  int finalized = 0;
  check(MPI_Finalized(&finalized), "MPI_Finalized");
  return finalized != 0;
}

void leave() {
  if (PMIx_Finalize != nullptr) PMIx_Finalize(nullptr, 0);
}

bool survives_deaths() {
  // MPICH has these functions too, but does not survive a death.
  // NOLINTNEXTLINE(concurrency-mt-unsafe): no thread of the engine changes the environment
  const char* is_on = std::getenv("OMPI_MCA_mpi_ft_enable");
  return MPIX_Comm_shrink != nullptr && is_on != nullptr && std::string(is_on) == "1";
}

std::pair<int, int> world_rank_and_size() {
  int rank = 0;
  int size = 0;
  check(MPI_Comm_rank(MPI_COMM_WORLD, &rank), "MPI_Comm_rank");
  check(MPI_Comm_size(MPI_COMM_WORLD, &size), "MPI_Comm_size");
  return {rank, size};
}

std::string library_version() {
  std::array<char, MPI_MAX_LIBRARY_VERSION_STRING> text{};
  int length = 0;
  check(MPI_Get_library_version(text.data(), &length), "MPI_Get_library_version");
  const std::string version(text.data());
  return version.substr(0, version.find('\n'));
}

void abort(int exit_code) {
  MPI_Abort(MPI_COMM_WORLD, exit_code);
  std::_Exit(exit_code);  // in case the library returns
}

}  // namespace dtrain::mpi
