// SPDX-License-Identifier: Apache-2.0
#include "mpi/version_exchange.hpp"

#include <cstring>

#include "mpi/communicator.hpp"
#include "mpi/library.hpp"

namespace dtrain::mpi {

VersionExchange exchange_versions(std::uintptr_t communicator_address, const std::string& own) {
  if (own.size() > version_text_bytes) {
    throw Error("a text of versions of " + std::to_string(own.size()) + " bytes is over the limit, " +
                std::to_string(version_text_bytes));
  }
  VersionExchange exchange{.texts = {}, .initialized_mpi = initialize()};
  Communicator world = Communicator::duplicate(communicator_address);
  std::vector<std::byte> mine(version_text_bytes);
  std::memcpy(mine.data(), own.data(), own.size());
  std::vector<std::byte> all(version_text_bytes * static_cast<std::size_t>(world.size()));
  world.all_gather(mine, all);
  exchange.texts = texts_in(all);
  world.close();
  return exchange;
}

}  // namespace dtrain::mpi
