// SPDX-License-Identifier: Apache-2.0
#include "mpi/introduction.hpp"

#include <cstring>

#include "mpi/communicator.hpp"
#include "mpi/library.hpp"

namespace dtrain::mpi {

Introductions introduce(std::uintptr_t communicator_address, const std::string& own) {
  if (own.size() > introduction_bytes) {
    throw Error("an introduction of " + std::to_string(own.size()) + " bytes is over the limit, " +
                std::to_string(introduction_bytes));
  }
  Introductions introductions{.texts = {}, .initialized_mpi = initialize()};
  Communicator world = Communicator::duplicate(communicator_address);
  std::vector<std::byte> mine(introduction_bytes);
  std::memcpy(mine.data(), own.data(), own.size());
  std::vector<std::byte> all(introduction_bytes * static_cast<std::size_t>(world.size()));
  world.all_gather(mine, all);
  introductions.texts = texts_in(all);
  world.close();
  return introductions;
}

}  // namespace dtrain::mpi
