// SPDX-License-Identifier: Apache-2.0
// What the ranks say of themselves before anything else passes between them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <vector>

namespace dtrain::mpi {

// The same in every version, or versions that differ could not tell each other so.
inline constexpr std::size_t introduction_bytes = 1024;

// The texts in what was gathered of all ranks.
inline std::vector<std::string> texts_in(std::span<const std::byte> all) {
  std::vector<std::string> texts;
  for (; all.size() >= introduction_bytes; all = all.subspan(introduction_bytes)) {
    const auto* text = reinterpret_cast<const char*>(all.data());
    texts.emplace_back(text, strnlen(text, introduction_bytes));
  }
  return texts;
}

struct Introductions {
  std::vector<std::string> texts;  // of each rank
  bool initialized_mpi;            // this call did it
};

// Collective over the communicator (see Communicator::duplicate), blocks. Initialises MPI unless that has been done.
// `own` has no zero bytes and at most introduction_bytes; throws Error for more.
Introductions introduce(std::uintptr_t communicator_address, const std::string& own);

}  // namespace dtrain::mpi
