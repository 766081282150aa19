// SPDX-License-Identifier: Apache-2.0
// The engine's own communicators, and transfers of bytes on them. All counts are in bytes.
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

  // Returns true once the transfer is complete; drives MPI's progress.
  bool test();

  // The source and length of a message. Valid once its receive is complete.
  int source() const { return status_.MPI_SOURCE; }
  std::size_t num_bytes() const;

 private:
  MPI_Request request_ = MPI_REQUEST_NULL;
  MPI_Status status_{};
};

// Returns true once all of `transfers` are complete; tests them in order, up to the first that is not.
bool test_all(std::span<Transfer> transfers);

class Replacement;

// A view of an MPI communicator; a copy is another view. MPI returns errors, and the methods throw them. Only close()
// frees the handle, since freeing is collective and the order of destructors is not.
class Communicator {
 public:
  // Collective. Duplicates the communicator whose MPI_Comm lies at `address`, or the world communicator for 0.
  static Communicator duplicate(std::uintptr_t address);

  // Collective.
  Communicator duplicate() const;

  // Collective only over `ranks` (ranks of this communicator, in the order of the new one).
  Communicator create_group(std::span<const int> ranks, int tag) const;

  int rank() const { return rank_; }
  int size() const { return size_; }

  // Collective, blocks: `all` holds size() times as many bytes as `mine`.
  void all_gather(std::span<const std::byte> mine, std::span<std::byte> all) const;

  Transfer send(std::span<const std::byte> bytes, int destination, int tag) const;
  // Starts a send that is complete only when the receiver has begun to receive.
  Transfer send_synchronously(std::span<const std::byte> bytes, int destination, int tag) const;
  // Starts a receive; `source` may be any_source.
  Transfer receive(std::span<std::byte> bytes, int source, int tag) const;
  // The largest tag that MPI takes.
  int max_tag() const;
  // Returns a message of any rank that has arrived already; none otherwise. Blocks only while its bytes arrive.
  std::optional<std::vector<std::byte>> receive_any(int tag) const;
  Transfer broadcast(std::span<std::byte> bytes, int root) const;
  Transfer barrier() const;
  Transfer gather_to_all(std::span<const std::byte> mine, std::span<std::byte> all) const;

  // The next six functions are called only where survives_deaths().
  //
  // Makes all waits and calls in this communicator fail, now and later, on every rank. Local.
  void revoke() const;
  // Returns a communicator of the ranks that live, in their order; this one may be revoked. Collective over these
  // ranks, blocks. All of them get the same ranks.
  Communicator shrink() const;
  // Returns whether `own` is true on all ranks that live, and no rank has died except those whose death this rank knew
  // before. Collective over the ranks that live, blocks.
  bool agree(bool own) const;
  // Returns whether `own` is true on all ranks that live, even if others have died. Collective over the ranks that
  // live, blocks.
  bool agree_of_living(bool own) const;
  // Returns whether the communicator was revoked, on any rank, or one of its ranks is known to have died. Local; drives
  // MPI's progress.
  bool has_failed() const;
  // Waits until `expected` ranks are known to have died, for up to half a second. Local, blocks. Call it before
  // shrink(): Open MPI 5.0 may crash if it learns of a death while it makes a communicator.
  void await_failures(int expected) const;

  // Frees the communicator. Collective.
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
