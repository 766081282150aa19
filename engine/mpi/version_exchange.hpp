// SPDX-License-Identifier: Apache-2.0
// Exchange of a text about each rank's software, before anything else passes between the ranks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <vector>

namespace dtrain::mpi {

// Length of a text. It is the same in every version; otherwise ranks of different versions could not tell each other.
inline constexpr std::size_t version_text_bytes = 1024;

// Cuts the gathered bytes into the ranks' texts.
inline std::vector<std::string> texts_in(std::span<const std::byte> all) {
  std::vector<std::string> texts;
  for (; all.size() >= version_text_bytes; all = all.subspan(version_text_bytes)) {
    const auto* text = reinterpret_cast<const char*>(all.data());
    texts.emplace_back(text, strnlen(text, version_text_bytes));
  }
  return texts;
}

struct VersionExchange {
  std::vector<std::string> texts;  // one from each rank
  bool initialized_mpi;            // whether this call initialised MPI
};

// Gathers `own` from every rank. Collective over the communicator (see Communicator::duplicate), blocks. Initialises
// MPI unless it is initialised already. `own` has no zero bytes and at most version_text_bytes; throws Error for a
// longer one.
VersionExchange exchange_versions(std::uintptr_t communicator_address, const std::string& own);

}  // namespace dtrain::mpi
