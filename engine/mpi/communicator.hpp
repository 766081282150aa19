// SPDX-License-Identifier: Apache-2.0
// A communicator of our own, and transfers of bytes on it. All counts are in bytes.
#pragma once

#include <mpi.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

namespace dtrain::mpi {

// The largest transfer in one call; callers cut larger ones. Open MPI 4 and 5 have no large-count calls.
inline constexpr std::size_t max_transfer_bytes = std::size_t{1} << 30;

inline constexpr int any_source = -1;

// A transfer in flight. The buffer must stay valid until test() has returned true.
class Transfer {
 public:
  Transfer() = default;
  explicit Transfer(MPI_Request request) : request_(request) {}

  // True once the transfer is complete; drives MPI's progress.
  bool test();

  // Of a receive that is complete.
  int source() const { return status_.MPI_SOURCE; }
  std::size_t num_bytes() const;

 private:
  MPI_Request request_ = MPI_REQUEST_NULL;
  MPI_Status status_{};
};

// True once all of `transfers` are complete; tests each that is not.
bool test_all(std::span<Transfer> transfers);

class Replacement;

// Errors are returned by MPI and thrown by us. Copies are views: the handle is freed by close() alone, since freeing
// is collective and the order of destructors is not.
class Communicator {
 public:
  // Collective. Duplicates the communicator whose MPI_Comm lies at `address`, or the world for 0.
  static Communicator duplicate(std::uintptr_t address);

  // Collective.
  Communicator duplicate() const;

  // Collective over `ranks` (ranks of this communicator, in the order of the new one) only.
  Communicator create_group(std::span<const int> ranks, int tag) const;

  int rank() const { return rank_; }
  int size() const { return size_; }

  // Collective, blocks: `all` holds size() times as many bytes as `mine`.
  void all_gather(std::span<const std::byte> mine, std::span<std::byte> all) const;

  Transfer send(std::span<const std::byte> bytes, int destination, int tag) const;
  // Complete only when the receiver has begun to receive.
  Transfer send_synchronously(std::span<const std::byte> bytes, int destination, int tag) const;
  // `source` may be any_source.
  Transfer receive(std::span<std::byte> bytes, int source, int tag) const;
  // The largest tag.
  int max_tag() const;
  // A message of any rank that has come already; none otherwise. Blocks only while its bytes arrive.
  std::optional<std::vector<std::byte>> receive_any(int tag) const;
  Transfer broadcast(std::span<std::byte> bytes, int root) const;
  Transfer barrier() const;
  Transfer gather_to_all(std::span<const std::byte> mine, std::span<std::byte> all) const;

  // These six only where survives_deaths().
  // Local: all that waits in this communicator fails now, and all that is called in it later, on every rank.
  void revoke() const;
  // Collective over the ranks that live, blocks: a communicator of them, in their order. Also of a revoked one. All get
  // the same.
  Communicator shrink() const;
  // Likewise: whether all of them say so, and none has died but those whose death this rank knew before.
  bool agree(bool own) const;
  // Likewise, whoever has died.
  bool agree_of_living(bool own) const;
  // Local: whether it was revoked, on any rank, or a rank is known to have died. Drives MPI's progress.
  bool has_failed() const;
  // Local, blocks for up to half a second, until so many ranks are known to have died. To be called before shrink(): Open
  // MPI 5.0 may crash if it learns of a death in the midst of making a communicator.
  void await_failures(int expected) const;

  // Collective: frees the communicator.
  void close();

 private:
  friend class Replacement;
  friend Communicator admit(const Communicator& living, Replacement* own);
  explicit Communicator(MPI_Comm handle);
  int num_failed() const;

  MPI_Comm handle_ = MPI_COMM_NULL;
  int rank_ = 0;
  int size_ = 0;
};

}  // namespace dtrain::mpi
