// SPDX-License-Identifier: Apache-2.0
#include "mpi/communicator.hpp"

#include <algorithm>
#include <chrono>
#include <string>
#include <thread>

#include "mpi/library.hpp"
#include "mpi/ulfm.hpp"

namespace dtrain::mpi {
namespace {

int checked_count(std::size_t num_bytes) {
  if (num_bytes > max_transfer_bytes) {
    throw Error("a transfer of " + std::to_string(num_bytes) + " bytes is over the limit of one call, " +
                std::to_string(max_transfer_bytes));
  }
  return static_cast<int>(num_bytes);
}

}  // namespace

bool Transfer::test() {
  if (request_ == MPI_REQUEST_NULL) return true;  // MPI would overwrite the status
  int complete = 0;
  check(MPI_Test(&request_, &complete, &status_), "MPI_Test");
  return complete != 0;
}

std::size_t Transfer::num_bytes() const {
  int count = 0;
  check(MPI_Get_count(&status_, MPI_BYTE, &count), "MPI_Get_count");
  return static_cast<std::size_t>(count);
}

bool test_all(std::span<Transfer> transfers) {
  // Stops at the first that is not complete: each test of such a transfer makes MPI look at the network.
  return std::ranges::all_of(transfers, [](Transfer& transfer) { return transfer.test(); });
}

Communicator::Communicator(MPI_Comm handle) : handle_(handle) {
  check(MPI_Comm_set_errhandler(handle_, MPI_ERRORS_RETURN), "MPI_Comm_set_errhandler");
  check(MPI_Comm_rank(handle_, &rank_), "MPI_Comm_rank");
  check(MPI_Comm_size(handle_, &size_), "MPI_Comm_size");
}

Communicator Communicator::duplicate(std::uintptr_t address) {
  const MPI_Comm original = address == 0 ? MPI_COMM_WORLD : *reinterpret_cast<const MPI_Comm*>(address);
  MPI_Comm copy = MPI_COMM_NULL;
  check(MPI_Comm_dup(original, &copy), "MPI_Comm_dup");
  return Communicator(copy);
}

Communicator Communicator::duplicate() const {
  MPI_Comm copy = MPI_COMM_NULL;
  check(MPI_Comm_dup(handle_, &copy), "MPI_Comm_dup");
  return Communicator(copy);
}

Communicator Communicator::create_group(std::span<const int> ranks, int tag) const {
  MPI_Group all = MPI_GROUP_NULL;
  MPI_Group members = MPI_GROUP_NULL;
  MPI_Comm created = MPI_COMM_NULL;
  check(MPI_Comm_group(handle_, &all), "MPI_Comm_group");
  check(MPI_Group_incl(all, checked_count(ranks.size()), ranks.data(), &members), "MPI_Group_incl");
  const int code = MPI_Comm_create_group(handle_, members, tag, &created);
  MPI_Group_free(&members);
  MPI_Group_free(&all);
  check(code, "MPI_Comm_create_group");
  return Communicator(created);
}

void Communicator::all_gather(std::span<const std::byte> mine, std::span<std::byte> all) const {
  const int count = checked_count(mine.size());
  check(MPI_Allgather(mine.data(), count, MPI_BYTE, all.data(), count, MPI_BYTE, handle_), "MPI_Allgather");
}

Transfer Communicator::send(std::span<const std::byte> bytes, int destination, int tag) const {
  MPI_Request request = MPI_REQUEST_NULL;
  check(MPI_Isend(bytes.data(), checked_count(bytes.size()), MPI_BYTE, destination, tag, handle_, &request),
        "MPI_Isend");
  return Transfer(request);
}

Transfer Communicator::send_synchronously(std::span<const std::byte> bytes, int destination, int tag) const {
  MPI_Request request = MPI_REQUEST_NULL;
  check(MPI_Issend(bytes.data(), checked_count(bytes.size()), MPI_BYTE, destination, tag, handle_, &request),
        "MPI_Issend");
  return Transfer(request);
}

Transfer Communicator::barrier() const {
  MPI_Request request = MPI_REQUEST_NULL;
  check(MPI_Ibarrier(handle_, &request), "MPI_Ibarrier");
  return Transfer(request);
}

Transfer Communicator::receive(std::span<std::byte> bytes, int source, int tag) const {
  MPI_Request request = MPI_REQUEST_NULL;
  const int from = source == any_source ? MPI_ANY_SOURCE : source;
  check(MPI_Irecv(bytes.data(), checked_count(bytes.size()), MPI_BYTE, from, tag, handle_, &request), "MPI_Irecv");
  return Transfer(request);
}

int Communicator::max_tag() const {
  int* value = nullptr;
  int is_set = 0;
  check(MPI_Comm_get_attr(MPI_COMM_WORLD, MPI_TAG_UB, &value, &is_set), "MPI_Comm_get_attr");
  constexpr int promised_by_the_standard = 32767;
  return is_set != 0 ? *value : promised_by_the_standard;
}

std::optional<std::vector<std::byte>> Communicator::receive_any(int tag) const {
  int has_arrived = 0;
  MPI_Message message = MPI_MESSAGE_NULL;
  MPI_Status status;
  check(MPI_Improbe(MPI_ANY_SOURCE, tag, handle_, &has_arrived, &message, &status), "MPI_Improbe");
  if (has_arrived == 0) return std::nullopt;
  int num_bytes = 0;
  check(MPI_Get_count(&status, MPI_BYTE, &num_bytes), "MPI_Get_count");
  std::vector<std::byte> bytes(static_cast<std::size_t>(num_bytes));
  check(MPI_Mrecv(bytes.data(), num_bytes, MPI_BYTE, &message, MPI_STATUS_IGNORE), "MPI_Mrecv");
  return bytes;
}

Transfer Communicator::broadcast(std::span<std::byte> bytes, int root) const {
  MPI_Request request = MPI_REQUEST_NULL;
  check(MPI_Ibcast(bytes.data(), checked_count(bytes.size()), MPI_BYTE, root, handle_, &request), "MPI_Ibcast");
  return Transfer(request);
}

Transfer Communicator::gather_to_all(std::span<const std::byte> mine, std::span<std::byte> all) const {
  MPI_Request request = MPI_REQUEST_NULL;
  const int count = checked_count(mine.size());
  check(MPI_Iallgather(mine.data(), count, MPI_BYTE, all.data(), count, MPI_BYTE, handle_, &request), "MPI_Iallgather");
  return Transfer(request);
}

void Communicator::revoke() const { check(MPIX_Comm_revoke(handle_), "MPIX_Comm_revoke"); }

Communicator Communicator::shrink() const {
  MPI_Comm shrunk = MPI_COMM_NULL;
  check(MPIX_Comm_shrink(handle_, &shrunk), "MPIX_Comm_shrink");
  return Communicator(shrunk);
}

bool Communicator::agree(bool own) const {
  int flag = own ? 1 : 0;
  return MPIX_Comm_agree(handle_, &flag) == MPI_SUCCESS && flag != 0;
}

bool Communicator::agree_of_living(bool own) const {
  int flag = own ? 1 : 0;
  MPIX_Comm_agree(handle_, &flag);  // an error means that some ranks are dead; the flag is still that of the others
  return flag != 0;
}

int Communicator::num_failed() const {
  int flag = 0;
  MPI_Iprobe(MPI_ANY_SOURCE, MPI_ANY_TAG, MPI_COMM_SELF, &flag,
             MPI_STATUS_IGNORE);  // drives progress, by which MPI learns of deaths
  MPI_Group failed = MPI_GROUP_NULL;
  check(MPIX_Comm_get_failed(handle_, &failed), "MPIX_Comm_get_failed");
  int size = 0;
  const int code = MPI_Group_size(failed, &size);
  MPI_Group_free(&failed);
  check(code, "MPI_Group_size");
  return size;
}

bool Communicator::has_failed() const {
  if (num_failed() > 0) return true;
  int flag = 0;
  check(MPIX_Comm_is_revoked(handle_, &flag), "MPIX_Comm_is_revoked");
  return flag != 0;
}

void Communicator::await_failures(int expected) const {
  constexpr std::chrono::milliseconds patience(500);
  constexpr std::chrono::microseconds between_looks(200);
  const auto end = std::chrono::steady_clock::now() + patience;
  while (num_failed() < expected && std::chrono::steady_clock::now() < end) std::this_thread::sleep_for(between_looks);
}

void Communicator::close() {
  if (handle_ != MPI_COMM_NULL) check(MPI_Comm_free(&handle_), "MPI_Comm_free");
}

}  // namespace dtrain::mpi
